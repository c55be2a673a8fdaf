"""Build the ASGI application: routes, middleware and error responses."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import orjson
import structlog
from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from gateway import __version__, metrics, tracing
from gateway.api import (
    health,
    native_rest,
    native_websocket,
    openai_errors,
    openai_realtime,
    openai_rest,
    pages,
    riva_server,
)
from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.limits.origins import check_origin
from gateway.logs import REQUEST_ID_HEADER, current_request_id, is_request_id
from gateway.middleware import AccessLog, BodyLimit, BodyLimits
from gateway.service import Service
from gateway.tracing import Tracing

KIND_OF_STATUS = {400: ErrorKind.INVALID_BODY, 404: ErrorKind.NOT_FOUND, 405: ErrorKind.METHOD_NOT_ALLOWED}

log = structlog.get_logger()


def create_app(settings: Settings) -> FastAPI:
    """Return the gateway's application, which connects to Triton at its startup."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = Service(settings, spans)
        app.state.service = service
        async with AsyncExitStack() as running:
            running.push_async_callback(spans.close)
            await service.start()
            running.push_async_callback(service.close)
            if settings.riva_port is not None:
                app.state.riva = await running.enter_async_context(riva_server.run(service))
            yield

    spans = Tracing(settings)
    metrics.initialise(settings.models, settings.models.values(), settings.max_concurrent_streams)
    app = FastAPI(
        title="AMIRA ASR server",
        version=__version__,
        description="Speech to text, for recordings here and for live streams over the WebSocket /v2/decode/stream/{model}.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
    )
    app.include_router(native_rest.router, dependencies=[Depends(_check_origin)])
    app.include_router(openai_rest.router, dependencies=[Depends(_check_origin)])
    app.include_router(openai_realtime.secrets_router, dependencies=[Depends(_check_origin)])
    app.include_router(openai_realtime.router)
    app.include_router(native_websocket.router)
    app.include_router(health.router)
    app.include_router(pages.pages_router(pages=bool(settings.page)))
    if settings.page:
        app.include_router(pages.formats_router(), dependencies=[Depends(_check_origin)])
    app.add_exception_handler(ApiError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_crash)
    app.add_middleware(BodyLimit, limits=BodyLimits.from_settings(settings))
    app.add_middleware(AccessLog, settings=settings, spans=spans)
    if settings.enable_cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, "Retry-After", openai_errors.SHOULD_RETRY_HEADER],
        )
    app.add_middleware(
        CorrelationIdMiddleware,
        header_name=REQUEST_ID_HEADER,
        generator=lambda: uuid.uuid4().hex,
        validator=is_request_id,
        transformer=lambda given: given,
    )
    return app


async def _check_origin(request: Request) -> None:
    service: Service = request.app.state.service
    check_origin(request.headers, service.settings)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101 (registered for it alone)
    metrics.REJECTIONS.labels(error.kind.code).inc()
    tracing.fail(error.kind)
    body, headers = error.body(current_request_id()), error.headers()
    if request.url.path.startswith(openai_rest.PREFIX):
        body, headers = openai_errors.body_of(error, current_request_id()), headers | openai_errors.headers_of(error)
    return Response(orjson.dumps(body), error.kind.status, headers, media_type="application/json")


async def _answer_http_exception(request: Request, error: Exception) -> Response:
    """Convert an error of the framework to the API's error response."""
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
    response.headers[REQUEST_ID_HEADER] = current_request_id() or ""  # this response does not pass the middleware
    return response
