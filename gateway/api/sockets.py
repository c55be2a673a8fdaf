"""Upgrade, refusal and counting of connections, for all WebSocket faces."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import WebSocket
from starlette.responses import Response
from starlette.websockets import WebSocketState

from gateway import metrics, tracing
from gateway.errors import ApiError
from gateway.limits.auth import key_in
from gateway.logs import REQUEST_ID_HEADER, current_request_id

KEY_SUBPROTOCOL = "openai-insecure-api-key."
"""Prefix of the subprotocol by which browsers send a key, since a page cannot set headers."""


def key_of(socket: WebSocket) -> str:
    """Return the key that a client sent as a header or as a subprotocol; empty if there is none."""
    offered = (name for name in socket.scope.get("subprotocols", ()) if name.startswith(KEY_SUBPROTOCOL))
    return key_in(socket.headers) or next(offered, "").removeprefix(KEY_SUBPROTOCOL)


async def accept(socket: WebSocket, subprotocol: str | None) -> None:
    """Accept the upgrade, with the request's id in the response."""
    await socket.accept(subprotocol, [(REQUEST_ID_HEADER.lower().encode(), (current_request_id() or "").encode())])


async def deny(socket: WebSocket, error: ApiError, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
    """Respond to the handshake with an error's HTTP status, unless it has a response already.

    Args:
        socket: the connection.
        error: reason of the refusal.
        body: body of the response, in the format of the face.
        headers: headers of the face, besides those of the error and the request's id.
    """
    if socket.application_state is WebSocketState.CONNECTING:
        headers = {**error.headers(), **headers, REQUEST_ID_HEADER: current_request_id() or ""}
        await socket.send_denial_response(Response(orjson.dumps(body), error.kind.status, headers, "application/json"))


def count_refusal(error: ApiError) -> None:
    """Count a refused connection, and mark its span."""
    metrics.REJECTIONS.labels(error.kind.code).inc()
    tracing.fail(error.kind)


def count_close(code: int, audio_secs: float) -> None:
    """Count the close of an admitted connection, and describe it on its span."""
    metrics.CLOSES.labels(str(code)).inc()
    tracing.describe(close_code=code, audio_secs=audio_secs)


def count_request(endpoint: str, model: str, status: int, began: float) -> None:
    """Count an ended connection.

    Args:
        endpoint: label of the face in metrics.
        model: label of the model in metrics.
        status: HTTP status of the handshake.
        began: start of the connection, in seconds of ``time.monotonic``.
    """
    metrics.REQUESTS.labels(endpoint, model, str(status)).inc()
    metrics.REQUEST_DURATION.labels(endpoint, model).observe(time.monotonic() - began)
