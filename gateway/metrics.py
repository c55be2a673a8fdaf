"""The gateway's Prometheus metrics. Labels come from closed sets, and every set of labels exists at 0 from the start."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from gateway import __version__
from gateway.errors import ErrorKind

UNKNOWN_MODEL = "unknown"
"""Label of every model name that the configuration does not have."""

SHORT_SECS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0)
BEHIND_SECS = (*SHORT_SECS, 20.0, 30.0, 60.0)
LONG_SECS = (*SHORT_SECS, 30.0, 60.0, 300.0, 1800.0, 7200.0)

disable_created_metrics()  # type: ignore[no-untyped-call]  # one series more for each counter and histogram, of no use

REQUESTS = Counter("asr_requests", "HTTP requests and streams by their HTTP status", ["endpoint", "model", "status"])
REQUEST_DURATION = Histogram(
    "asr_request_duration_seconds", "Time to answer a request", ["endpoint", "model"], buckets=LONG_SECS
)
ACTIVE_CONNECTIONS = Gauge("asr_active_connections", "Live streams")
ACTIVE_BATCHES = Gauge("asr_active_batches", "Batch requests being answered or waiting for a place")
STREAM_CAPACITY = Gauge("asr_stream_capacity", "Most live streams at once")
TRITON_DURATION = Histogram("triton_inference_duration_seconds", "Time of a request to Triton", ["model"], buckets=SHORT_SECS)
PARTIAL_LATENCY = Histogram(
    "asr_partial_latency_seconds",
    "From the arrival of the audio that completed a window to its partial, of streams not faster than speech",
    ["model"],
    buckets=BEHIND_SECS,
)
FINAL_LATENCY = Histogram("asr_final_latency_seconds", "From the end of a stream to its final", ["model"], buckets=SHORT_SECS)
STREAM_LAG = Histogram(
    "asr_stream_lag_seconds",
    "Audio received but not yet decoded for good, at each answer, of streams not faster than speech",
    ["model"],
    buckets=BEHIND_SECS,
)
AUDIO_SECONDS = Counter("asr_audio_seconds", "Seconds of audio received", ["endpoint", "model"])
REJECTIONS = Counter("asr_rejections", "Requests and streams refused or failed, by error code", ["reason"])
CLOSES = Counter("asr_websocket_closes", "WebSocket closes by code", ["code"])
STREAM_RECOVERIES = Counter("asr_stream_recoveries", "Streams that Triton failed, by whether they went on", ["outcome"])
REPLAYED_AUDIO = Counter("asr_replayed_audio_seconds", "Seconds of audio that were sent to Triton once more")
BREAKER_STATE = Gauge(
    "asr_circuit_breaker_state", "New streams for a Triton: 0 they go there, 1 one does as a trial, 2 none", ["endpoint"]
)
TRITON_READY = Gauge(
    "asr_triton_ready", "1 while a Triton has all models of the settings loaded and recognises speech", ["endpoint"]
)
BACKEND_DEATHS = Counter(
    "asr_backend_deaths", "Times that a Triton or a model's process died with requests in flight", ["endpoint"]
)
DRAINING = Gauge("asr_draining", "1 while the gateway drains")
EVENT_LOOP_TASKS = Gauge("asr_event_loop_tasks", "Tasks of the gateway's event loop")
BUFFER_USAGE = Gauge("memory_pool_usage", "Share of the streams' audio buffers in use, 0 to 1")
BUILD_INFO = Gauge("asr_build_info", "Always 1", ["version"])

RECOVERED, FAILED = "recovered", "failed"

CLIENT_GONE = 499
"""The status of a request whose client vanished while it sent it; nginx counts it so."""

DISCONNECTED = 1006
"""Code of a close without a close frame: the client disappeared."""

PEER_CLOSES = {1000, 1001, 1009, 1012}
"""Other codes of streams that were left: the client was done with it, or with its page; a frame was far too large; the server
was stopped without a drain."""


def initialise(models: Iterable[str], ensembles: Iterable[str], stream_capacity: int) -> None:
    """Make every set of labels, so that rates start from 0."""
    names = (*models, UNKNOWN_MODEL)
    statuses = {HTTPStatus.OK, HTTPStatus.SWITCHING_PROTOCOLS, CLIENT_GONE, *(kind.status for kind in ErrorKind)}
    for model in names:
        for endpoint in ("batch", "stream"):
            REQUEST_DURATION.labels(endpoint, model)
            AUDIO_SECONDS.labels(endpoint, model)
            for status in statuses:
                REQUESTS.labels(endpoint, model, str(int(status)))
        for histogram in (PARTIAL_LATENCY, FINAL_LATENCY, STREAM_LAG):
            histogram.labels(model)
    for endpoint, answers in (("health", (200, 503)), ("metrics", (200,)), ("other", (200, 404, 405))):
        REQUEST_DURATION.labels(endpoint, UNKNOWN_MODEL)
        for answer in answers:
            REQUESTS.labels(endpoint, UNKNOWN_MODEL, str(answer))
    for ensemble in ensembles:
        TRITON_DURATION.labels(ensemble)
    for kind in ErrorKind:
        REJECTIONS.labels(kind.code)
    for code in {DISCONNECTED, *PEER_CLOSES, *(kind.close_code for kind in ErrorKind)}:
        CLOSES.labels(str(code))
    STREAM_RECOVERIES.labels(RECOVERED)
    STREAM_RECOVERIES.labels(FAILED)
    STREAM_CAPACITY.set(stream_capacity)
    BUILD_INFO.labels(__version__).set(1)
