"""The application: routes, error bodies, request ids, limits and logs around them."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from typing import Any

import orjson
import structlog
from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway import __version__, metrics, tracing
from gateway.api import health, native_rest, native_websocket
from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.logs import REQUEST_ID_HEADER, current_request_id
from gateway.service import Service
from gateway.tracing import Tracing

MAX_REQUEST_ID_CHARS = 128
LINGER_SECS = 5.0
MIN_BODY_RATE = 16_000
"""Bytes a second that a body must come with, on average, after its first ``stream_timeout_secs``; half of real time."""

KIND_OF_STATUS = {400: ErrorKind.INVALID_BODY, 404: ErrorKind.NOT_FOUND, 405: ErrorKind.METHOD_NOT_ALLOWED}

log = structlog.get_logger()


def create_app(settings: Settings) -> FastAPI:
    """The gateway for these settings; it connects to Triton when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = Service(settings, spans)
        app.state.service = service
        await service.start()
        try:
            yield
        finally:
            await service.close()
            await spans.close()

    spans = Tracing(settings)
    metrics.initialise(settings.models, settings.models.values(), settings.max_concurrent_streams)
    app = FastAPI(
        title="AMIRA ASR server",
        version=__version__,
        description="Speech to text, for recordings here and for live streams over the WebSocket /v2/decode/stream/{model}.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.include_router(native_rest.router)
    app.include_router(native_websocket.router)
    app.include_router(health.router)
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_crash)
    app.add_middleware(RequestMiddleware, settings=settings, spans=spans)
    if settings.enable_cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, "Retry-After"],
        )
    app.add_middleware(
        CorrelationIdMiddleware,
        header_name=REQUEST_ID_HEADER,
        generator=lambda: uuid.uuid4().hex,
        validator=lambda given: len(given) <= MAX_REQUEST_ID_CHARS and given.isascii() and given.isprintable(),
        transformer=lambda given: given,
    )
    return app


class RequestMiddleware:
    """Counts, logs and traces every HTTP request, and cuts off a body that is too large, or too slow, while it streams in."""

    def __init__(self, app: ASGIApp, settings: Settings, spans: Tracing) -> None:
        self._app = app
        self._settings = settings
        self._spans = spans

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        endpoint, model = _labels(scope, self._settings)
        if endpoint == "batch":
            with self._spans.span(f"{scope['method']} /v2/decode/batch/{{model}}", Headers(scope=scope), model=model):
                await self._serve(scope, receive, send, endpoint, model)
        else:
            await self._serve(scope, receive, send, endpoint, model)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, endpoint: str, model: str) -> None:
        began = time.perf_counter()
        status = ErrorKind.INTERNAL.status
        limit, received_bytes = self._settings.max_request_size, 0
        patience_secs = self._settings.stream_timeout_secs
        declared = Headers(scope=scope).get("content-length", "0")
        complete = declared == "0" and scope["method"] == "GET"

        async def counted_receive() -> Message:
            nonlocal received_bytes, complete
            if declared.isdecimal() and int(declared) > limit:
                raise ApiError(ErrorKind.BODY_TOO_LARGE, f"the body has {declared} bytes; at most {limit} are taken")
            left_secs = began + patience_secs + received_bytes / MIN_BODY_RATE - time.perf_counter()
            try:
                message = await asyncio.wait_for(receive(), None if complete else left_secs)
            except asyncio.TimeoutError:
                came = f"{received_bytes} bytes of the body came in {time.perf_counter() - began:.1f} s"
                rule = f"after the first {patience_secs:g} s it takes {MIN_BODY_RATE} a second"
                raise ApiError(ErrorKind.BODY_TOO_SLOW, f"{came}; {rule}") from None
            received_bytes += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received_bytes > limit:
                raise ApiError(ErrorKind.BODY_TOO_LARGE, f"the body has more than {limit} bytes, which is the limit")
            return message

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not complete:  # or the server would go on reading what nobody wants
                    MutableHeaders(scope=message)["Connection"] = "close"
            elif not complete and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await _linger(receive)
                message = {"type": "http.response.body"}
            await send(message)

        try:
            await self._app(scope, counted_receive, watched_send)
        except ClientDisconnect:
            status = metrics.CLIENT_GONE
        finally:
            duration = time.perf_counter() - began
            tracing.describe(status=status, body_bytes=received_bytes)
            metrics.REQUESTS.labels(endpoint, model, str(status)).inc()
            metrics.REQUEST_DURATION.labels(endpoint, model).observe(duration)
            log_request = log.info if endpoint in ("batch", "other") else log.debug
            log_request(
                "request",
                method=scope["method"],
                endpoint=endpoint,
                model=model,
                status=status,
                body_bytes=received_bytes,
                duration_ms=round(duration * 1000, 1),
            )


async def _linger(receive: Receive) -> None:
    """Discard the rest of a refused body for a while: a client that is cut off while it sends may never see the answer."""
    deadline = time.monotonic() + LINGER_SECS
    with contextlib.suppress(asyncio.TimeoutError):
        while (await asyncio.wait_for(receive(), deadline - time.monotonic())).get("more_body", False):
            pass


def _labels(scope: MutableMapping[str, Any], settings: Settings) -> tuple[str, str]:
    """Endpoint and model of a request, each from a closed set."""
    path = scope["path"]
    if path.startswith("/v2/decode/batch/"):
        model = path.removeprefix("/v2/decode/batch/")
        return "batch", model if model in settings.models else metrics.UNKNOWN_MODEL
    endpoint = path.removeprefix("/").partition("/")[0]
    return endpoint if endpoint in ("health", "metrics") else "other", metrics.UNKNOWN_MODEL


async def _answer_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101 (registered for it alone)
    metrics.REJECTIONS.labels(error.kind.code).inc()
    tracing.fail(error.kind)
    return Response(
        orjson.dumps(error.body(current_request_id())), error.kind.status, error.headers(), media_type="application/json"
    )


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """The framework's own refusals, in our body."""
    assert isinstance(error, HTTPException)  # noqa: S101 (registered for it alone)
    kind = KIND_OF_STATUS.get(error.status_code, ErrorKind.INTERNAL)
    messages = {
        ErrorKind.NOT_FOUND: f"there is nothing at {request.url.path[:200]!r}",
        ErrorKind.METHOD_NOT_ALLOWED: f"{request.method} is not allowed at {request.url.path[:200]!r}",
    }
    response = await _answer_error(request, ApiError(kind, messages.get(kind, str(error.detail))))
    response.headers.update(error.headers or {})
    return response


async def _answer_crash(request: Request, error: Exception) -> Response:
    log.error("request failed", exc_info=error)
    response = await _answer_error(request, ApiError(ErrorKind.INTERNAL, "internal error"))
    response.headers[REQUEST_ID_HEADER] = current_request_id() or ""  # this answer is made outside the middleware
    return response
