"""``/v1/realtime``: OpenAI's realtime transcription sessions, a face of the live engine, and the keys for their clients."""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import Any

import structlog
from fastapi import APIRouter, Request, WebSocket
from starlette.websockets import WebSocketDisconnect

from gateway import metrics
from gateway.api.error_schema import openapi_responses
from gateway.api.openai_errors import body_of, headers_of
from gateway.api.openai_realtime_events import read_secret_request
from gateway.api.realtime_config import EventError, SessionConfig
from gateway.api.realtime_session import Connection
from gateway.api.realtime_turns import decoder_options
from gateway.api.sockets import accept, count_close, count_refusal, count_request, deny, key_of
from gateway.errors import ApiError, ErrorKind
from gateway.limits.auth import check_key
from gateway.limits.origins import check_origin
from gateway.logs import current_request_id
from gateway.service import Service

SUBPROTOCOL = "realtime"

log = structlog.get_logger()
router = APIRouter()
secrets_router = APIRouter()


@router.websocket("/v1/realtime")
async def serve_realtime(socket: WebSocket) -> None:
    """Admit a session and serve it, or refuse it before the upgrade."""
    service: Service = socket.app.state.service
    began = time.monotonic()
    status, label = 101, metrics.UNKNOWN_MODEL
    with contextlib.ExitStack() as held:
        held.enter_context(service.tracing.span("GET /v1/realtime", socket.headers))
        try:
            check_origin(socket.headers, service.settings)
            caller, session = service.client_secrets.redeem(key_of(socket))
            config = SessionConfig().merge(dict(session))
            if name := socket.query_params.get("model"):
                config = config.with_model(name)
            label = model = service.resolve_model(config.model) if config.model else next(iter(service.settings.models))
            place = held.enter_context(service.sessions.admit(caller, socket.client.host if socket.client else None))
            service.languages(model)  # refused here if it can't be served
            decoder_options(service, model, config)
        except ApiError as error:
            status = error.kind.status
            await _refuse(socket, error)
        else:
            await accept(socket, SUBPROTOCOL if SUBPROTOCOL in socket.scope.get("subprotocols", ()) else None)
            connection = Connection(socket, service, caller, model, config, place)
            with service.sessions.connected(connection):
                code = await connection.serve()
            count_close(code, connection.received_secs)
            log.info(
                "realtime session closed",
                model=label,
                code=code,
                audio_secs=round(connection.received_secs, 3),
                duration_secs=round(time.monotonic() - began, 3),
            )
    count_request("realtime", label, status, began)


@secrets_router.post("/v1/realtime/client_secrets", summary="Create a key for a client of yours", responses=openapi_responses())
async def create_client_secret(request: Request) -> dict[str, Any]:
    """Create a key that expires, for sessions with the settings of the request."""
    service: Service = request.app.state.service
    caller = check_key(request.headers, service.settings)
    try:
        wanted = read_secret_request(await request.body())
    except EventError as error:
        raise ApiError(ErrorKind.INVALID_VALUE, error.message, error.param) from None
    value, expires_at = service.client_secrets.issue(caller, wanted.session, wanted.lifetime_secs)
    session = {**wanted.config.render(f"sess_{secrets.token_hex(12)}"), "expires_at": expires_at}
    return {"value": value, "expires_at": expires_at, "session": session}


async def _refuse(socket: WebSocket, error: ApiError) -> None:
    """Refuse a session by an HTTP status."""
    count_refusal(error)
    log.info("realtime session refused", code=error.kind.code)
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        await deny(socket, error, body_of(error, current_request_id()), headers_of(error))
