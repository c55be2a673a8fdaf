"""The Grafana dashboards: ``python -m deploy.grafana.dashboards`` writes them as JSON, which provisioning loads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from string import ascii_uppercase

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel as TimeSeries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef

JSON = Path(__file__).parent / "json"
PROMETHEUS = DataSourceRef(type_val="prometheus", uid="prometheus")

COLUMNS = 24
PANELS_A_ROW = 3
PANEL_HEIGHT = 8

RATE = "[$__rate_interval]"
AUDIO_ENDPOINTS = 'endpoint=~"batch|stream"'
OURS = 'reason=~"backend_.*|internal|not_ready"'
TURNED_AWAY = 'reason=~"no_capacity|draining|quota_exceeded"'
NETWORKS = 'model=~".*(preprocessor|encoder|encoder_exclusive|encoder_stream|decoder_joint)"'
"""Also of imported models, which have a prefix."""

Query = tuple[str, str]
"""PromQL, and the legend of its lines."""


class Panel:
    """A panel of lines.

    Args:
        title: of the panel.
        unit: Grafana's name of the unit.
        queries: the lines.
        note: description, where the title needs one.
    """

    def __init__(self, title: str, unit: str, *queries: Query, note: str = "") -> None:
        self.title = title
        self.unit = unit
        self.queries = queries
        self.note = note


@dataclass(frozen=True)
class Board:
    """A dashboard: its panels by the titles of their rows."""

    uid: str
    title: str
    rows: dict[str, tuple[Panel, ...]]


def rate(metric: str, by: str = "", matchers: str = "") -> str:
    """Return PromQL for the summed growth of a counter per second."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{f'{{{matchers}}}' if matchers else ''}{RATE}))"


def ratio(above: str, below: str) -> str:
    """Return PromQL for the ratio of two sums with the same labels; no value where the second is 0."""
    return f"{above} / ({below} > 0)"


def each_audio_second(of_models: str) -> str:
    """Return PromQL for a sum by model per second of audio that the decoders received."""
    return f"{of_models} / on () group_left () ({rate('asr_decoder_audio_seconds_total')} > 0)"


def decoder_ratio(counter: str) -> str:
    """Return PromQL for one of the decoder's counters per second of audio that it received."""
    return ratio(rate(f"asr_decoder_{counter}_total"), rate("asr_decoder_audio_seconds_total"))


def mean_seconds(duration: str) -> Query:
    """Return the mean of one of Triton's durations per request, by model."""
    return ratio(f"{rate(duration, 'model')} / 1e6", rate("nv_inference_request_success", "model")), "{{model}}"


def quantiles(metric: str, matchers: str = "") -> tuple[Query, ...]:
    """Return the median and the 95th percentile of a histogram, by model."""
    return tuple(
        (f"histogram_quantile({share}, {rate(f'{metric}_bucket', 'model, le', matchers)})", f"p{share * 100:g} {{{{model}}}}")
        for share in (0.5, 0.95)
    )


SERVICE = Board(
    "amira-service",
    "AMIRA ASR: service",
    {
        "Load": (
            Panel(
                "Requests",
                "reqps",
                (rate("asr_requests_total", "endpoint", AUDIO_ENDPOINTS), "{{endpoint}}"),
                note="Recordings, and streams when they end.",
            ),
            Panel("Streams", "short", ("sum(asr_active_connections)", "live"), ("sum(asr_stream_capacity)", "capacity")),
            Panel(
                "Places in use",
                "percentunit",
                ("asr:streams:utilisation", "streams {{namespace}}"),
                note="The autoscaler uses this.",
            ),
            Panel(
                "Audio",
                "short",
                (rate("asr_audio_seconds_total", "endpoint"), "{{endpoint}}"),
                note="Seconds of audio per second.",
            ),
            Panel("Recordings in flight", "short", ("sum(asr_active_batches)", "recordings")),
            Panel(
                "Gateways",
                "short",
                ("sum by (version) (asr_build_info)", "{{version}}"),
                ("sum(asr_draining)", "draining"),
            ),
        ),
        "Errors": (
            Panel("Failures of ours", "percentunit", ("asr:failures:ratio_rate5m", "of requests and streams {{namespace}}")),
            Panel("Refused and failed", "reqps", (rate("asr_rejections_total", "reason"), "{{reason}}")),
            Panel(
                "HTTP statuses",
                "reqps",
                (rate("asr_requests_total", "status", AUDIO_ENDPOINTS), "{{status}}"),
                note="101: a stream that was admitted.",
            ),
        ),
        "Latency": (
            Panel(
                "Partials behind their audio",
                "s",
                *quantiles("asr_partial_latency_seconds"),
                note="Real-time streams only.",
            ),
            Panel("Finals behind the end", "s", *quantiles("asr_final_latency_seconds")),
            Panel("Recordings", "s", *quantiles("asr_request_duration_seconds", 'endpoint="batch"')),
            Panel(
                "Lag of streams",
                "s",
                *quantiles("asr_stream_lag_seconds"),
                note="Audio received but not yet decoded. Real-time streams only.",
            ),
            Panel("One request to Triton", "s", *quantiles("triton_inference_duration_seconds")),
        ),
    },
)

TRITON = Board(
    "amira-triton",
    "AMIRA ASR: Triton",
    {
        "Models": (
            Panel("Requests", "reqps", (rate("nv_inference_request_success", "model"), "{{model}}")),
            Panel("Queue", "s", mean_seconds("nv_inference_queue_duration_us"), note="Mean per request."),
            Panel(
                "Compute",
                "s",
                mean_seconds("nv_inference_compute_infer_duration_us"),
                note="Mean per request. rnnt_greedy_bls only accepts requests; asr_ensemble is that and detokenizer.",
            ),
            Panel("Waiting", "short", ("sum by (model) (nv_inference_pending_request_count)", "{{model}}")),
            Panel(
                "Batch size",
                "short",
                (ratio(rate("nv_inference_count", "model"), rate("nv_inference_exec_count", "model")), "{{model}}"),
                note="As Triton counts it: a batch for an ONNX model is one request, which counts as 1.",
            ),
            Panel(
                "Failures by reason",
                "reqps",
                (rate("nv_inference_request_failure", "model, reason"), "{{model}} {{reason}}"),
            ),
        ),
        "Decoder": (
            Panel("Streams with state", "short", ("sum by (instance) (asr_decoder_sequences)", "{{instance}}")),
            Panel(
                "Windows that wait",
                "short",
                ("sum by (instance) (asr_decoder_waiting_windows)", "{{instance}}"),
                note="For an encoder call. They grow without end when the machine has more streams than it can decode.",
            ),
            Panel(
                "Wait for the encoder",
                "s",
                ("asr:triton_queue_seconds:mean_5m", "per window {{namespace}}"),
                note="The autoscaler uses this. Triton's own queue of rnnt_greedy_bls stays empty.",
            ),
            Panel(
                "Batch sizes",
                "short",
                (
                    ratio(rate("asr_decoder_windows_total"), rate("asr_decoder_encode_calls_total")),
                    "windows per encoder call",
                ),
                (ratio(rate("asr_decoder_rows_total"), rate("asr_decoder_calls_total")), "streams per decoder_joint call"),
            ),
            Panel(
                "Calls",
                "reqps",
                (rate("asr_decoder_encode_calls_total", "instance"), "encoder {{instance}}"),
                (rate("asr_decoder_calls_total", "instance"), "decoder_joint {{instance}}"),
            ),
            Panel(
                "Tokens and segments",
                "short",
                (rate("asr_decoder_tokens_total", "instance"), "tokens {{instance}}"),
                (rate("asr_decoder_segments_total", "instance"), "segments {{instance}}"),
                note="Per second, as they become final.",
            ),
            Panel(
                "Audio",
                "short",
                (rate("asr_decoder_audio_seconds_total", "instance"), "{{instance}}"),
                note="Seconds of audio per second.",
            ),
        ),
        "Machine": (
            Panel("CPU", "percentunit", ("nv_cpu_utilization", "{{instance}}")),
            Panel("Memory", "percentunit", ("nv_cpu_memory_used_bytes / nv_cpu_memory_total_bytes", "{{instance}}")),
            Panel(
                "GPU",
                "percentunit",
                ("nv_gpu_utilization", "busy {{instance}} {{gpu_uuid}}"),
                ("nv_gpu_memory_used_bytes / nv_gpu_memory_total_bytes", "memory {{instance}} {{gpu_uuid}}"),
            ),
        ),
    },
)

TROUBLE = Board(
    "amira-trouble",
    "AMIRA ASR: trouble",
    {
        "Towards Triton": (
            Panel("Up", "short", ("up", "{{job}} {{instance}}")),
            Panel(
                "Circuit breaker",
                "short",
                ("max by (endpoint) (asr_circuit_breaker_state)", "{{endpoint}}"),
                note="0 closed, 1 half-open, 2 open.",
            ),
            Panel(
                "Tritons ready",
                "short",
                ("min by (endpoint) (asr_triton_ready)", "{{endpoint}}"),
                note="1: models loaded and canaries answered, as the gateway that sees the least has it.",
            ),
            Panel(
                "Deaths of backends",
                "short",
                (f"max by (endpoint) (increase(asr_backend_deaths_total{RATE}))", "{{endpoint}}"),
                note="Of Triton or a model's process, with requests in flight.",
            ),
            Panel(
                "Recoveries of streams",
                "short",
                (f"sum by (outcome) (increase(asr_stream_recoveries_total{RATE}))", "{{outcome}}"),
            ),
            Panel(
                "Replayed audio",
                "short",
                (rate("asr_replayed_audio_seconds_total"), "seconds per second"),
                note="Sent to Triton again to recover streams.",
            ),
            Panel(
                "Evictions",
                "short",
                (f"sum by (instance) (increase(asr_decoder_evictions_total{RATE}))", "{{instance}}"),
                note="Streams that the decoder dropped because they idled.",
            ),
            Panel("Triton's failures", "reqps", (rate("nv_inference_request_failure", "reason"), "{{reason}}")),
        ),
        "Towards clients": (
            Panel(
                "Streams closed other than by 1000",
                "reqps",
                (rate("asr_websocket_closes_total", "code", 'code!="1000"'), "{{code}}"),
                note="1006: the client vanished. 1012: a drain ended it. 4503: no capacity, or Triton failed.",
            ),
            Panel("Failed by us", "reqps", (rate("asr_rejections_total", "reason", OURS), "{{reason}}")),
            Panel("Turned away", "reqps", (rate("asr_rejections_total", "reason", TURNED_AWAY), "{{reason}}")),
        ),
        "Gateways": (
            Panel("Audio buffers in use", "percentunit", ("memory_pool_usage", "{{instance}}")),
            Panel("Memory", "bytes", ('process_resident_memory_bytes{job="gateway"}', "{{instance}}")),
            Panel(
                "CPU",
                "short",
                (rate("process_cpu_seconds_total", "instance", 'job="gateway"'), "{{instance}}"),
                note="Cores. A gateway is one event loop, which uses little more than one.",
            ),
            Panel("Tasks", "short", ("asr_event_loop_tasks", "{{instance}}"), note="Of the event loop; about six per stream."),
        ),
    },
)

COST = Board(
    "amira-cost",
    "AMIRA ASR: cost",
    {
        "Seconds of work per second of audio": (
            Panel(
                "Models",
                "s",
                ("asr:compute_seconds_per_audio_second:rate5m", "{{model}} {{namespace}}"),
                (f"sum by (namespace) (asr:compute_seconds_per_audio_second:rate5m{{{NETWORKS}}})", "networks {{namespace}}"),
                note="rnnt_greedy_bls only accepts requests; asr_ensemble is that and detokenizer. Only networks adds up.",
            ),
            Panel(
                "Calls of the networks",
                "s",
                (decoder_ratio("encode_seconds"), "preprocessor and encoder"),
                (decoder_ratio("decode_seconds"), "decoder_joint"),
                note="Duration of whole batches, as the decoder waits for them; encoder calls may overlap.",
            ),
            Panel(
                "Gateways",
                "s",
                (
                    ratio(rate("process_cpu_seconds_total", matchers='job="gateway"'), rate("asr_audio_seconds_total")),
                    "CPU time",
                ),
            ),
            Panel(
                "Queues",
                "s",
                (each_audio_second(f"{rate('nv_inference_queue_duration_us', 'model')} / 1e6"), "{{model}}"),
            ),
        ),
        "What drives it": (
            Panel(
                "Decoder calls for a second of audio",
                "short",
                (decoder_ratio("calls"), "calls"),
                note="Falls when streams share calls.",
            ),
            Panel(
                "Requests for a second of audio",
                "short",
                (each_audio_second(rate("nv_inference_request_success", "model")), "{{model}}"),
            ),
            Panel(
                "Audio", "short", (rate("asr_audio_seconds_total", "model"), "{{model}}"), note="Seconds of audio per second."
            ),
        ),
    },
)

BOARDS = {"service": SERVICE, "triton": TRITON, "trouble": TROUBLE, "cost": COST}


def build(board: Board) -> Dashboard:
    """Return a dashboard for Grafana."""
    dashboard: Dashboard = (
        Dashboard(board.title)
        .uid(board.uid)
        .tags(["amira"])
        .refresh("30s")
        .time("now-1h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
    )
    ids = count(1)
    for title, panels in board.rows.items():
        dashboard.with_row(Row(title).id(next(ids)))
        for lines in panels:
            dashboard.with_panel(_lines(lines).id(next(ids)))
    return dashboard


def as_json() -> Iterator[tuple[Path, str]]:
    """Return each dashboard's file and its content."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    for name, board in BOARDS.items():
        yield JSON / f"{name}.json", encoder.encode(build(board).build()) + "\n"


def _lines(drawn: Panel) -> TimeSeries:
    lines: TimeSeries = (
        TimeSeries()
        .title(drawn.title)
        .unit(drawn.unit)
        .min(0)
        .fill_opacity(8)
        .height(PANEL_HEIGHT)
        .span(COLUMNS // PANELS_A_ROW)
        .datasource(PROMETHEUS)
    )
    if drawn.note:
        lines.description(drawn.note)
    for letter, (query, legend) in zip(ascii_uppercase, drawn.queries, strict=False):
        lines.with_target(Dataquery().ref_id(letter).expr(query).legend_format(legend).range().datasource(PROMETHEUS))
    return lines


if __name__ == "__main__":
    for path, text in as_json():
        path.write_text(text)
