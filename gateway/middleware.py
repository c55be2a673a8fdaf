"""ASGI middleware for HTTP requests: body limits, and the log event, metrics and span of each request."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import metrics, tracing
from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.tracing import Tracing

MIN_BODY_BYTES_PER_SEC = 16_000
"""Minimum average rate of a body after its first ``stream_timeout_secs``; half of real time for raw PCM."""

LARGE_BODIES, SMALL_BODY_BYTES = 8, 10 * 2**20
"""Maximum total size of the bodies in flight: this number of bodies of the maximum size, or one of this size per place."""

BATCH_PREFIX = "/v2/decode/batch/"
OPENAI_TRANSCRIPTIONS = "/v1/audio/transcriptions"

log = structlog.get_logger()


@dataclass(frozen=True)
class BodyLimits:
    """Limits on request bodies.

    Attributes:
        max_bytes: maximum size of a body.
        max_json_bytes: maximum size of a JSON body, which takes many times its size when parsed.
        max_total_bytes: maximum total size of the bodies of all requests in flight.
        patience_secs: time after which ``MIN_BODY_BYTES_PER_SEC`` applies.
    """

    max_bytes: int
    max_json_bytes: int
    max_total_bytes: int
    patience_secs: float

    @classmethod
    def from_settings(cls, settings: Settings) -> BodyLimits:
        """Return the limits that the settings give."""
        places, largest = settings.max_concurrent_batches + settings.inference_queue_size, settings.max_request_size
        total = max(places * min(SMALL_BODY_BYTES, largest), LARGE_BODIES * largest)
        return cls(largest, settings.max_json_size, total, patience_secs=settings.stream_timeout_secs)


@dataclass
class Received:
    """Bytes received of all requests in flight, in memory or on disk."""

    bytes: int = 0


class BodyLimit:
    """Refuses a body that is compressed, too large or too slow, while it is received.

    Args:
        app: the application.
        limits: limits on one body, and on all of them.
    """

    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        self._app = app
        self._limits = limits
        self._received = Received()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            body = _Body(scope, receive, send, self._limits, self._received)
            try:
                await self._app(scope, body.receive, body.send)
            finally:
                self._received.bytes -= body.received_bytes
        else:
            await self._app(scope, receive, send)


class _Body:
    """Body of a request that is being received."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: BodyLimits, received: Received) -> None:
        headers = Headers(scope=scope)
        is_json = headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json"
        self._receive = receive
        self._send = send
        self._max_bytes = min(limits.max_json_bytes, limits.max_bytes) if is_json else limits.max_bytes
        self._limits = limits
        self._received = received
        self._began = time.monotonic()
        self.received_bytes = 0
        self._coding = headers.get("content-encoding", "").strip().lower()
        declared = headers.get("content-length", "0")
        self._declared_bytes = int(declared) if declared.isdecimal() else 0
        self._complete = not self._declared_bytes and "transfer-encoding" not in headers

    async def receive(self) -> Message:
        """Return the next part of the body.

        Raises:
            ApiError: the body is compressed, too large or too slow, or the bodies in flight are too large together.
        """
        if self._coding not in ("", "identity"):
            raise ApiError(
                ErrorKind.UNSUPPORTED_MEDIA, f"Content-Encoding {self._coding[:40]!r} is not supported; send it uncompressed"
            )
        if self._declared_bytes > self._max_bytes:
            raise ApiError(
                ErrorKind.BODY_TOO_LARGE, f"the body has {self._declared_bytes} bytes; at most {self._max_bytes} are allowed"
            )
        try:
            message = await asyncio.wait_for(self._receive(), None if self._complete else self._left_secs())
        except asyncio.TimeoutError:
            raise ApiError(
                ErrorKind.BODY_TOO_SLOW,
                f"{self.received_bytes} bytes of the body were received in {time.monotonic() - self._began:.1f} s; "
                f"after the first {self._limits.patience_secs:g} s it has to come at {MIN_BODY_BYTES_PER_SEC} bytes per second",
            ) from None
        size = len(message.get("body", b""))
        self.received_bytes += size
        self._received.bytes += size
        self._complete = not message.get("more_body", False)
        if self.received_bytes > self._max_bytes:
            raise ApiError(ErrorKind.BODY_TOO_LARGE, f"the body has more than the allowed {self._max_bytes} bytes")
        if self._received.bytes > self._limits.max_total_bytes:
            raise ApiError(ErrorKind.NO_CAPACITY, "the bodies of the requests in flight are too large together; please retry")
        return message

    async def send(self, message: Message) -> None:
        """Send; close the connection after a response to an incomplete body, which would otherwise be read to its end."""
        if message["type"] == "http.response.start" and not self._complete:
            MutableHeaders(scope=message)["Connection"] = "close"
        await self._send(message)

    def _left_secs(self) -> float:
        return self._began + self._limits.patience_secs + self.received_bytes / MIN_BODY_BYTES_PER_SEC - time.monotonic()


class AccessLog:
    """Logs, counts and traces every HTTP request.

    Args:
        app: the application.
        settings: settings of the gateway.
        spans: creates spans.
    """

    def __init__(self, app: ASGIApp, settings: Settings, spans: Tracing) -> None:
        self._app = app
        self._settings = settings
        self._spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})
        endpoint, model = _labels(scope["path"], self._settings)
        if endpoint == "batch":
            route = OPENAI_TRANSCRIPTIONS if scope["path"] == OPENAI_TRANSCRIPTIONS else f"{BATCH_PREFIX}{{model}}"
            with self._spans.span(f"{scope['method']} {route}", Headers(scope=scope), model=model):
                await self._serve(scope, receive, send, endpoint, model)
        else:
            await self._serve(scope, receive, send, endpoint, model)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, endpoint: str, model: str) -> None:
        began = time.perf_counter()
        seen: dict[str, Any] = {"status": ErrorKind.INTERNAL.status, "body_bytes": 0}

        async def counted_receive() -> Message:
            message = await receive()
            seen["body_bytes"] += len(message.get("body", b""))
            return message

        async def watched_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
            await send(message)

        try:
            await self._app(scope, counted_receive, watched_send)
        except ClientDisconnect:
            seen["status"] = metrics.CLIENT_GONE
        finally:
            duration_secs = time.perf_counter() - began
            model = scope["state"].get("model", model)  # OpenAI's API names it in the body
            tracing.describe(**seen, model=model)
            metrics.REQUESTS.labels(endpoint, model, str(seen["status"])).inc()
            metrics.REQUEST_DURATION.labels(endpoint, model).observe(duration_secs)
            log_request = log.info if endpoint in ("batch", "other") else log.debug
            duration_ms = round(duration_secs * 1000, 1)
            log_request("request", method=scope["method"], endpoint=endpoint, model=model, **seen, duration_ms=duration_ms)


def _labels(path: str, settings: Settings) -> tuple[str, str]:
    """Return the labels for a request's endpoint and model, each from a closed set."""
    if path.startswith(BATCH_PREFIX):
        model = path.removeprefix(BATCH_PREFIX)
        return "batch", model if model in settings.models else metrics.UNKNOWN_MODEL
    if path == OPENAI_TRANSCRIPTIONS:
        return "batch", metrics.UNKNOWN_MODEL
    endpoint = path.removeprefix("/").partition("/")[0]
    return endpoint if endpoint in ("health", "metrics") else "other", metrics.UNKNOWN_MODEL
