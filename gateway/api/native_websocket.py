"""``/v2/decode/stream/{model}``: a face of the live engine, with the project's own WebSocket messages.

With a resumable dialect the client gets session tokens, with which it can continue after a lost connection.

Two tasks serve a socket: one reads frames into the session, one writes the session's events. A full session stops the reader,
and TCP slows the client. A third task detects clients that are idle, or flood the server with small frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from enum import Enum
from typing import Any

import orjson
import structlog
from fastapi import APIRouter, WebSocket
from starlette.websockets import WebSocketDisconnect

from gateway import metrics, tracing
from gateway.api.native_messages import Dialect, message_of, read_events, read_latency
from gateway.api.phrases import decoding_options
from gateway.api.sockets import accept, count_close, count_refusal, count_request, deny, key_of
from gateway.audio.raw import DEFAULT, parse_raw_format
from gateway.audio.stream import StreamInput
from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.framing import SMALL_BYTES, SMALL_FRAMES_PER_SEC
from gateway.limits.origins import check_origin, origin_allowed
from gateway.live.events import Failed
from gateway.live.session import Session
from gateway.live.states import Ending, State
from gateway.logs import current_request_id
from gateway.service import Service

log = structlog.get_logger()
router = APIRouter()


class Control(Enum):
    """Frames of one byte."""

    END = b"\x00"
    KEEPALIVE = b"\x01"


def read_frame(frame: bytes, max_bytes: int) -> bytes | Control:
    """Return the content of a binary frame: bytes of the stream, or a control.

    Raises:
        ApiError: the frame is empty, larger than ``max_bytes``, or an unknown control.
    """
    size = len(frame)
    if 1 < size <= max_bytes:
        return frame
    if not frame:
        raise ApiError(ErrorKind.EMPTY_FRAME, "the frame is empty; audio frames have at least 2 bytes")
    if size == 1:
        try:
            return Control(frame)
        except ValueError:
            known = "known: 0x00 end, 0x01 keepalive"
            raise ApiError(ErrorKind.UNKNOWN_CONTROL, f"control byte 0x{frame.hex()} is not known; {known}") from None
    raise ApiError(ErrorKind.FRAME_TOO_LARGE, f"the frame has {size} bytes; at most {max_bytes} are taken")


def read_resume(text: str) -> str:
    """Return the session token of ``{"type": "resume", "session": TOKEN}``.

    Raises:
        ApiError: the text frame is not such a message.
    """
    try:
        request = orjson.loads(text)
        session = request["session"] if request["type"] == "resume" else None
    except (orjson.JSONDecodeError, KeyError, TypeError):
        session = None
    if not isinstance(session, str):
        raise ApiError(ErrorKind.TEXT_FRAME, 'the text frame is not understood; known: {"type": "resume", "session": …}')
    return session


class Connection:
    """One WebSocket, from the upgrade to the close.

    Args:
        socket: the accepted WebSocket.
        session: session of its stream.
        audio: converts the frames into samples of the session.
        settings: settings of the gateway.
        dialect: dialect of its messages.
        flooding_secs: returns the time for which the client's small frames have been delayed, in seconds.
    """

    def __init__(
        self,
        socket: WebSocket,
        session: Session,
        audio: StreamInput,
        settings: Settings,
        *,
        dialect: Dialect,
        flooding_secs: Callable[[], float],
    ) -> None:
        self._socket = socket
        self._session = session
        self._audio = audio
        self._dialect = dialect
        self._flooding_secs = flooding_secs
        self._max_frame_bytes = settings.max_frame_bytes
        self._timeout_secs = settings.stream_timeout_secs
        self._waits_since: float | None = None  # for a frame

    async def serve(self) -> int:
        """Serve the stream; return the code that closed the socket."""
        writer = asyncio.create_task(self._write(), name="stream writer")
        reader = asyncio.create_task(self._read(), name="stream reader")
        watch = asyncio.create_task(self._watch(), name="stream watch")
        tasks = (writer, reader, watch)  # a final that was sent counts, even if another task ended at the same time
        try:
            ends = (*tasks, self._audio.failed)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            ended = next(end for end in ends if end.done())
            self._session.abandon()
            writer.cancel()
            return await self._close(ended.exception())
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._audio.close()

    async def _read(self) -> None:
        """Take frames until the client ends the stream, then wait until it disconnects.

        Raises:
            ApiError: a frame violates the protocol.
            WebSocketDisconnect: the client disconnected.
        """
        receive, audio, ended = self._socket.receive, self._audio, False
        while True:
            self._waits_since = None if ended else time.monotonic()
            message = await receive()
            self._waits_since = None
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message["code"])
            if ended:
                continue
            frame = message.get("bytes")
            if frame is None:
                self._resume(message["text"])
                continue
            content = read_frame(frame, self._max_frame_bytes)
            if content is Control.END:
                ended = True
                await audio.end()
                self._session.end()
            elif content is not Control.KEEPALIVE:
                await audio.feed(content)

    def _resume(self, text: str) -> None:
        if not self._dialect.resumable:
            raise ApiError(ErrorKind.TEXT_FRAME, "text frames are not understood; audio and control bytes are binary")
        if self._session.state is not State.CONNECTING or self._audio.begun:
            raise ApiError(ErrorKind.TEXT_FRAME, "resume comes first, before any audio")
        self._session.resume(read_resume(text))
        self._audio.resume()

    async def _write(self) -> None:
        """Send the session's events until it has ended.

        Raises:
            ApiError: the session failed, or the client does not read.
            WebSocketDisconnect: the client disconnected.
        """
        async for event in self._session:
            if isinstance(event, Failed):
                raise event.error
            if message := message_of(event, self._dialect):
                await self._send(message)

    async def _watch(self) -> None:
        """Check at intervals that frames arrive and are large enough; a timer per frame would cost more.

        Raises:
            ApiError: no frame arrived for too long, or too many small ones.
        """
        limit = self._timeout_secs
        while True:
            idle_secs = time.monotonic() - self._waits_since if self._waits_since else 0.0
            flooding_secs = self._flooding_secs()
            if idle_secs >= limit:
                raise ApiError(ErrorKind.STREAM_IDLE, f"nothing was received for {limit:g} s; send audio or keepalives")
            if flooding_secs >= limit:
                rule = f"more than {SMALL_FRAMES_PER_SEC} frames per second below {SMALL_BYTES} bytes were sent for {limit:g} s"
                raise ApiError(ErrorKind.QUOTA_EXCEEDED, f"{rule}; send larger ones")
            await asyncio.sleep(limit - max(idle_secs, flooding_secs))

    async def _close(self, error: BaseException | None) -> int:
        """Close the socket, after an error frame if the stream ended with an error; return the close code."""
        if isinstance(error, WebSocketDisconnect):
            return error.code if error.code in metrics.PEER_CLOSES else metrics.DISCONNECTED
        if error is None:
            code = ErrorKind.DRAINING.close_code if self._session.ending is Ending.DRAIN else 1000
            message = None
        else:
            if not isinstance(error, ApiError):
                log.error("stream failed", exc_info=error)
                error = ApiError(ErrorKind.INTERNAL, "internal error")
            metrics.REJECTIONS.labels(error.kind.code).inc()
            tracing.fail(error.kind)
            code, message = error.kind.close_code, error.frame(current_request_id())
        with contextlib.suppress(WebSocketDisconnect, RuntimeError, asyncio.TimeoutError, ApiError):  # gone, or does not read
            if message:
                await self._send(message)
            await asyncio.wait_for(self._socket.close(code), self._timeout_secs)
        return code

    async def _send(self, message: dict[str, Any]) -> None:
        """Send a message.

        Raises:
            ApiError: the client did not read for as long as a stream may be idle.
        """
        text = orjson.dumps(message).decode()
        try:
            await asyncio.wait_for(self._socket.send_text(text), self._timeout_secs)
        except asyncio.TimeoutError:
            raise ApiError(ErrorKind.STREAM_IDLE, f"nothing was read for {self._timeout_secs:g} s") from None


@router.websocket("/v2/decode/stream/{model}")
async def decode_stream(socket: WebSocket, model: str) -> None:
    """Admit a stream and serve it, or refuse it before the upgrade."""
    service: Service = socket.app.state.service
    label = model if model in service.settings.models else metrics.UNKNOWN_MODEL
    dialect = Dialect.chosen(socket.scope.get("subprotocols", ()))
    began = time.monotonic()
    status = 101
    with contextlib.ExitStack() as place:
        place.enter_context(service.tracing.span("GET /v2/decode/stream/{model}", socket.headers, model=label))
        try:
            check_origin(socket.headers, service.settings)
            caller, _ = service.client_secrets.redeem(key_of(socket))
            service.check_model(model)
            query = socket.query_params
            detection, options = read_events(query), read_latency(query)
            options |= service.language_options(model, query.getlist("language"))
            options |= decoding_options(query)
            service.check_alternatives(model, options, live=True)
            raw = parse_raw_format(query)
            if dialect.resumable and (raw.rate, raw.channels) != (DEFAULT.rate, DEFAULT.channels):
                message = f"streams that can be resumed ({dialect.value}) must have {DEFAULT.rate} Hz and one channel"
                raise ApiError(ErrorKind.UNACCEPTABLE, message, "sample_rate")
            held = place.enter_context(service.sessions.admit(caller, socket.client.host if socket.client else None))
            session = service.sessions.open(
                model, caller, place=held, resumable=dialect.resumable, detection=detection, options=options
            )
        except ApiError as error:
            status = error.kind.status
            await _refuse(socket, error, service)
        else:
            async with session:
                await _accept(socket)
                audio = StreamInput(
                    raw, service.files, session.append, service.settings.max_stream_audio_secs, resumable=dialect.resumable
                )
                flooding_secs = socket.state.flooding_secs
                connection = Connection(socket, session, audio, service.settings, dialect=dialect, flooding_secs=flooding_secs)
                code = await connection.serve()
            count_close(code, session.received_secs)
            log.info(
                "stream closed",
                model=label,
                code=code,
                audio_secs=round(session.received_secs, 3),
                duration_secs=round(time.monotonic() - began, 3),
            )
    count_request("stream", label, status, began)


@router.websocket("/{path:path}")
async def unknown_path(socket: WebSocket, path: str) -> None:
    """Refuse a stream at any other path."""
    await _refuse(socket, ApiError(ErrorKind.NOT_FOUND, f"there is nothing at {'/' + path[:200]!r}"), socket.app.state.service)


async def _accept(socket: WebSocket) -> None:
    """Upgrade, and select the dialect's subprotocol: a browser closes the connection if none that it offers is selected."""
    await accept(socket, Dialect.chosen(socket.scope.get("subprotocols", ())).value or None)


async def _refuse(socket: WebSocket, error: ApiError, service: Service) -> None:
    """Refuse a stream by an HTTP status. A page cannot read it, so a browser gets the upgrade and an error frame instead."""
    count_refusal(error)
    request_id = current_request_id()
    log.info("stream refused", code=error.kind.code)
    origin = socket.headers.get("origin")
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        if origin is not None and origin_allowed(origin, socket.headers.get("host", ""), service.settings):
            await _accept(socket)
            await socket.send_text(orjson.dumps(error.frame(request_id)).decode())
            await socket.close(error.kind.close_code)
            metrics.CLOSES.labels(str(error.kind.close_code)).inc()
        else:
            await deny(socket, error, error.body(request_id), {})
