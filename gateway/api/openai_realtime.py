"""``/v1/realtime``: OpenAI's realtime transcription sessions, a face of the live engine, and the keys for their clients."""

from __future__ import annotations

import contextlib
import secrets
import time
from typing import Any

import orjson
import structlog
from fastapi import APIRouter, Request, WebSocket
from starlette.responses import Response
from starlette.websockets import WebSocketDisconnect, WebSocketState

from gateway import metrics, tracing
from gateway.api.error_schema import openapi_responses
from gateway.api.openai_errors import body_of, headers_of
from gateway.api.openai_realtime_events import read_secret_request
from gateway.api.realtime_config import EventError, SessionConfig
from gateway.api.realtime_session import Connection
from gateway.errors import ApiError, ErrorKind
from gateway.limits.auth import check_key, key_in
from gateway.limits.origins import check_origin
from gateway.logs import REQUEST_ID_HEADER, current_request_id
from gateway.service import Service

SUBPROTOCOL = "realtime"
KEY_SUBPROTOCOL = "openai-insecure-api-key."
"""Prefix of the subprotocol by which browsers send a key."""

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
            caller, session = service.client_secrets.redeem(_key_of(socket))
            config = SessionConfig().merge(dict(session))
            name = socket.query_params.get("model") or config.model
            label = model = service.resolve_model(name) if name else next(iter(service.settings.models))
            place = held.enter_context(service.sessions.admit(caller, socket.client.host if socket.client else None))
            service.triton.ensemble(service.settings.models[model])  # refused here if it can't be served
        except ApiError as error:
            status = error.kind.status
            await _refuse(socket, error)
        else:
            await _accept(socket)
            connection = Connection(socket, service, caller, model, config, place)
            with service.sessions.connected(connection):
                code = await connection.serve()
            metrics.CLOSES.labels(str(code)).inc()
            tracing.describe(close_code=code, audio_secs=connection.received_secs)
            log.info(
                "realtime session closed",
                model=label,
                code=code,
                audio_secs=round(connection.received_secs, 3),
                duration_secs=round(time.monotonic() - began, 3),
            )
    metrics.REQUESTS.labels("realtime", label, str(status)).inc()
    metrics.REQUEST_DURATION.labels("realtime", label).observe(time.monotonic() - began)


@secrets_router.post("/v1/realtime/client_secrets", summary="Create a key for a client of yours", responses=openapi_responses())
async def create_client_secret(request: Request) -> dict[str, Any]:
    """Answer with a key that expires, for sessions that begin as the request says."""
    service: Service = request.app.state.service
    caller = check_key(request.headers, service.settings)
    try:
        wanted = read_secret_request(await request.body())
    except EventError as error:
        raise ApiError(ErrorKind.INVALID_VALUE, error.message, error.param) from None
    value, expires_at = service.client_secrets.issue(caller, wanted.session, wanted.lifetime_secs)
    session = {**wanted.config.render(f"sess_{secrets.token_hex(12)}"), "expires_at": expires_at}
    return {"value": value, "expires_at": expires_at, "session": session}


def _key_of(socket: WebSocket) -> str:
    """Return the key that a client sent as a header or as a subprotocol; empty if there is none."""
    offered = (name for name in socket.scope.get("subprotocols", ()) if name.startswith(KEY_SUBPROTOCOL))
    return key_in(socket.headers) or next(offered, "").removeprefix(KEY_SUBPROTOCOL)


async def _accept(socket: WebSocket) -> None:
    """Upgrade, and take ``realtime`` if it is offered."""
    headers = [(REQUEST_ID_HEADER.lower().encode(), (current_request_id() or "").encode())]
    await socket.accept(SUBPROTOCOL if SUBPROTOCOL in socket.scope.get("subprotocols", ()) else None, headers)


async def _refuse(socket: WebSocket, error: ApiError) -> None:
    """Refuse a session by an HTTP status."""
    metrics.REJECTIONS.labels(error.kind.code).inc()
    tracing.fail(error.kind)
    log.info("realtime session refused", code=error.kind.code)
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        if socket.application_state is WebSocketState.CONNECTING:
            request_id = current_request_id()
            headers = {**error.headers(), **headers_of(error), REQUEST_ID_HEADER: request_id or ""}
            body = orjson.dumps(body_of(error, request_id))
            await socket.send_denial_response(Response(body, error.kind.status, headers, "application/json"))
