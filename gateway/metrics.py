"""Prometheus metrics of the gateway. Label values come from closed sets, and every label set exists at 0 from the start."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus
from itertools import product

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics

from gateway import __version__
from gateway.errors import ErrorKind

UNKNOWN_MODEL = "unknown"
"""Label for all model names that are not in the settings."""

SHORT_SECS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0)
BEHIND_SECS = (*SHORT_SECS, 20.0, 30.0, 60.0)
LONG_SECS = (*SHORT_SECS, 30.0, 60.0, 300.0, 1800.0, 7200.0)

disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series per counter and histogram that nobody uses

REQUESTS = Counter("asr_requests", "HTTP requests and streams by HTTP status", ["endpoint", "model", "status"])
REQUEST_DURATION = Histogram(
    "asr_request_duration_seconds", "Duration of a request or stream", ["endpoint", "model"], buckets=LONG_SECS
)
ACTIVE_CONNECTIONS = Gauge("asr_active_connections", "Live streams")
ACTIVE_BATCHES = Gauge("asr_active_batches", "Batch requests in progress or waiting for a place")
STREAM_CAPACITY = Gauge("asr_stream_capacity", "Maximum number of live streams")
TRITON_DURATION = Histogram(
    "triton_inference_duration_seconds", "Duration of a request to Triton", ["model"], buckets=SHORT_SECS
)
PARTIAL_LATENCY = Histogram(
    "asr_partial_latency_seconds",
    "Time from the arrival of the audio that completes a window to its partial, for streams in real time",
    ["model"],
    buckets=BEHIND_SECS,
)
FINAL_LATENCY = Histogram(
    "asr_final_latency_seconds", "Time from the end of a stream to its final", ["model"], buckets=SHORT_SECS
)
STREAM_LAG = Histogram(
    "asr_stream_lag_seconds",
    "Seconds of audio received and not yet decoded for good, at each response of Triton, for streams in real time",
    ["model"],
    buckets=BEHIND_SECS,
)
AUDIO_SECONDS = Counter("asr_audio_seconds", "Seconds of audio received", ["endpoint", "model"])
REJECTIONS = Counter("asr_rejections", "Refused or failed requests and streams by error code", ["reason"])
CLOSES = Counter("asr_websocket_closes", "WebSocket closes by code", ["code"])
STREAM_RECOVERIES = Counter(
    "asr_stream_recoveries", "Streams with a failed request to Triton, by outcome of the recovery", ["outcome"]
)
REPLAYED_AUDIO = Counter("asr_replayed_audio_seconds", "Seconds of audio resent to Triton")
BREAKER_STATE = Gauge("asr_circuit_breaker_state", "Circuit breaker of a Triton: 0 closed, 1 half-open, 2 open", ["endpoint"])
TRITON_READY = Gauge(
    "asr_triton_ready", "1 while a Triton has all configured models loaded and recognises speech, else 0", ["endpoint"]
)
BACKEND_DEATHS = Counter(
    "asr_backend_deaths", "Deaths of a Triton or of a model's process with requests in flight", ["endpoint"]
)
DRAINING = Gauge("asr_draining", "1 while the gateway drains, else 0")
EVENT_LOOP_TASKS = Gauge("asr_event_loop_tasks", "Tasks in the event loop of the gateway")
BUFFER_USAGE = Gauge("memory_pool_usage", "Share of the audio buffers in use, 0 to 1")
BUILD_INFO = Gauge("asr_build_info", "Always 1", ["version"])

RECOVERED, FAILED = "recovered", "failed"

CLIENT_GONE = 499
"""Status of a request whose client disconnected before the response, as in nginx."""

DISCONNECTED = 1006
"""Code of a connection that ended without a close frame (RFC 6455, 7.4.1)."""

PEER_CLOSES = {1000, 1001, 1009, 1012}
"""Other close codes: the client is done, the client leaves its page, a frame is far too large, or the server stops without a
drain."""


def initialise(models: Iterable[str], ensembles: Iterable[str], stream_capacity: int) -> None:
    """Create every label set at 0.

    Args:
        models: public names of the models.
        ensembles: their Triton ensembles.
        stream_capacity: maximum number of live streams.
    """
    names = (*models, UNKNOWN_MODEL)
    statuses = {HTTPStatus.OK, HTTPStatus.SWITCHING_PROTOCOLS, CLIENT_GONE, *(kind.status for kind in ErrorKind)}
    for model, endpoint in product(names, ("batch", "stream", "realtime")):
        REQUEST_DURATION.labels(endpoint, model)
        for status in statuses:
            REQUESTS.labels(endpoint, model, str(int(status)))
    for model, endpoint in product(names, ("batch", "stream")):  # turns of realtime sessions count as streams
        AUDIO_SECONDS.labels(endpoint, model)
    for model, histogram in product(names, (PARTIAL_LATENCY, FINAL_LATENCY, STREAM_LAG)):
        histogram.labels(model)
    others = sorted({200, *(kind.status for kind in ErrorKind)})
    for endpoint, answers in (("health", [200, 503]), ("metrics", [200]), ("other", others)):
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
