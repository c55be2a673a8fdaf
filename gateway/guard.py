"""Limit uvicorn's connections: header timeout and size, connect rate, small-frame rate, slow readers, lingering closes.

A ``GuardedConnection`` stands between the event loop's transport and uvicorn's protocol, and passes on what the limits allow.
uvicorn's protocol gets a ``GuardedTransport``. Nothing private of uvicorn is used: its configuration names its protocols, and
they are called like any ``asyncio.Protocol``.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.framing import FrameQueue, Refusal, RequestMeter
from gateway.limits.connects import ConnectionLimits, Standing
from gateway.transport import GuardedTransport

HEAD_SECS = 10.0
"""Timeout of a request's head, from the connection or from the head's first byte."""

EXCESS_HEAD_SECS = 1.0
"""Timeout of the head on a connection beyond the connect rate."""

LINGER_SECS, QUIET_SECS = 5.0, 0.3
"""A connection that is closed while its peer still sends discards data until none has arrived for QUIET_SECS, at most for
LINGER_SECS. Otherwise TCP resets the connection, and the peer may lose the response (RFC 9112, section 9.6)."""

RECEIVE_BYTES = 128 * 2**10
"""Kernel receive buffer of a WebSocket, 4 s of audio; Linux doubles the value for its own needs. The default holds megabytes of
audio that arrives faster than it is decoded. No other limit counts this audio, and pings wait behind it."""

RESET_POLL_SECS = 0.2
"""Interval at which a half-closed connection is checked for a reset, which the event loop does not report."""

TCP_CLOSE = 7
"""State of a connection that was reset, the first byte of TCP_INFO (Linux, include/net/tcp_states.h)."""

CONNECTION = "gateway.guard.connection"
"""Key of the connection in an ASGI scope's state; removed before the application gets the scope."""


class State(Enum):
    """State of a connection. It only moves down this list, and any state may move to CLOSED.

    HTTP: requests are passed to uvicorn; the timer limits the time of a head.
    WEBSOCKET: frames are passed to uvicorn; the timer ends a pause for small frames.
    HALF_CLOSED: the peer sends no more, but may wait for a response; the timer checks for a reset.
    LINGERING: closed for uvicorn; data of the peer is discarded; the timer closes the connection.
    CLOSED: nothing is passed on.
    """

    HTTP = auto()
    WEBSOCKET = auto()
    HALF_CLOSED = auto()
    LINGERING = auto()
    CLOSED = auto()


HTTP, WEBSOCKET, HALF_CLOSED, LINGERING, CLOSED = State
ENDED = (CLOSED, LINGERING)
"""States in which uvicorn's protocol sees a closed transport."""


class Config(uvicorn.Config):
    """uvicorn's configuration, with ``GuardedConnection`` in front of its protocols.

    Args:
        app: the application.
        limits: limits that all connections share.
        options: options of ``uvicorn.Config``.
    """

    def __init__(self, app: ASGIApp, limits: ConnectionLimits[Any], **options: Any) -> None:
        async def guarded_app(scope: Scope, receive: Receive, send: Send) -> None:
            if connection := scope.get("state", {}).pop(CONNECTION, None):
                connection.application_called = True
            await app(scope, receive, send)

        super().__init__(guarded_app, http="httptools", ws="websockets-sansio", **options)
        self.limits = limits

    def load(self) -> None:
        """Replace uvicorn's protocol for HTTP by ``GuardedConnection``."""
        super().load()
        self.inner_class: Callable[..., Any] = self.http_protocol_class
        self.http_protocol_class = GuardedConnection


class GuardedConnection(asyncio.Protocol):
    """Connection of a client: first HTTP, after an upgrade a WebSocket.

    Args: those of uvicorn's protocols.

    Attributes:
        state: current state.
        application_called: whether the application has got a request.
    """

    def __init__(self, config: Config, app_state: dict[str, Any], **others: Any) -> None:
        self.state = HTTP
        self.application_called = False
        self._loop = asyncio.get_running_loop()
        self._limits: ConnectionLimits[GuardedConnection] = config.limits
        state = {**app_state, CONNECTION: self, "flooding_secs": self._flooding_secs}
        self._make_inner = partial(config.inner_class, config=config, app_state=state, **others)
        self._inner: Any = None  # uvicorn's protocol
        self._transport: asyncio.Transport
        self._address = ""
        self._standing = Standing.COUNTED
        self._timer: asyncio.TimerHandle | None = None  # see State
        self._linger_until = 0.0
        self._requests = RequestMeter()
        self._frames = FrameQueue(self._loop.time)
        self._held = False  # the transport is not read
        self._inner_paused = False  # uvicorn's protocol does not read
        self._peer_reads = True
        self._written = False

    # Called by the event loop

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # of a TCP listener
        """Accept the connection, or abort it, which costs a tenth of a response."""
        self._transport = transport
        peer = transport.get_extra_info("peername")
        self._address = str(peer[0]) if peer else ""
        now = self._loop.time()
        for connection in self._limits.take_idle(now):
            connection.close_when_idle()
        self._standing = self._limits.arrive(self, self._address, now)
        if self._standing is Standing.REFUSED:
            self.abort()
            return
        self._inner = self._make_inner()
        self._inner.connection_made(GuardedTransport(transport, self))
        self._await_head(HEAD_SECS if self._standing is Standing.COUNTED else EXCESS_HEAD_SECS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Free everything that the connection held."""
        self.state = CLOSED
        self._stop_timer()
        self._limits.leave(self)
        self._frames.clear()
        self._release_inner(exc)

    def data_received(self, data: bytes) -> None:
        """Pass data on as far as the limits allow."""
        if self.state is WEBSOCKET:
            self._frames.append(data)
            self._pass_frames()
        elif self.state is LINGERING:
            self._wait_for_quiet()
        elif not self.is_closing():
            self._pass_request(data)

    def eof_received(self) -> bool:
        """Keep the connection open for the response to a single request; otherwise return False, which closes it."""
        before = self.state
        if before in ENDED:
            return False
        self.state = HALF_CLOSED
        if before is WEBSOCKET or not self._requests.is_one_complete:
            return False
        self._inner.shutdown()  # closes the connection after the response
        if self.is_closing() or not self._requests.is_http_1_1:
            return False
        if not self._written:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # a client that has left answers with a reset
        self._watch_for_reset()
        return True

    def pause_writing(self) -> None:
        """Stop passing frames: responses to pings would pile up."""
        self._peer_reads = False
        if self._inner:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Pass frames again."""
        self._peer_reads = True
        if self._inner:
            self._inner.resume_writing()
        self._pass_frames_soon()

    # Called by uvicorn's protocol through its transport, and by the limits

    def is_closing(self) -> bool:
        """Return whether uvicorn's protocol must not write any more."""
        return self.state in ENDED or self._transport.is_closing()

    def upgrade(self, protocol: asyncio.BaseProtocol) -> None:
        """Continue as a WebSocket."""
        self.state = WEBSOCKET
        self._stop_timer()
        self._limits.keep(self)
        self._inner = protocol
        connection: socket.socket = self._transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        self._loop.call_soon(self._check_upgrade)

    def pause_reading(self) -> None:
        """Pass on nothing more. A WebSocket is still read until there is data that cannot be passed on."""
        self._inner_paused = True
        if self.state is not WEBSOCKET:
            self._hold(True)

    def resume_reading(self) -> None:
        """Pass data on again."""
        self._inner_paused = False
        if self.state is WEBSOCKET:
            self._pass_frames_soon()
        else:
            self._hold(False)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write, unless the connection is closed for uvicorn."""
        if self.state not in ENDED:
            self._written = True
            self._transport.write(data)

    def close(self) -> None:
        """Close after the written data; linger if the peer is still sending."""
        if self.state in ENDED:
            return
        self._stop_timer()
        if self._inner and self._peer_is_sending():
            self.state = LINGERING
            self._frames.clear()
            self._linger_until = self._loop.time() + LINGER_SECS
            self._hold(False)
            self._wait_for_quiet()
            self._loop.call_soon(self._release_inner)  # or a server that stops would wait for it, and close it again
        else:
            self._close_now()

    def close_when_idle(self) -> None:
        """Close now, or after the response that is due."""
        if self._inner:
            self._inner.shutdown()

    def abort(self) -> None:
        """Close without the written data."""
        self.state = CLOSED
        self._transport.abort()

    # HTTP

    def _pass_request(self, data: bytes) -> None:
        self._limits.touch(self, self._loop.time())
        data = self._requests.take(data)
        if self._requests.refusal:
            self._refuse(self._requests.refusal)
            return
        if self._requests.heads:
            self._standing = self._limits.recount(self._address, self._standing, health_only=self._requests.health_only)
            if self._standing is Standing.REFUSED:
                self.abort()
                return
        if not self._requests.head_pending:
            self._stop_timer()
        elif not self._timer:
            self._await_head(HEAD_SECS)
        if data:
            self._inner.data_received(data)
        if self._requests.heads and self._standing is Standing.EXCESS:
            self._inner.shutdown()  # after one response

    def _refuse(self, refusal: Refusal) -> None:
        """Respond instead of the application, and close."""
        body = refusal.message.encode()
        head = (
            f"HTTP/1.1 {refusal.status.value} {refusal.status.phrase}\r\nContent-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self.write(head.encode() + body)
        self.close()

    def _await_head(self, timeout_secs: float) -> None:
        self._timer = self._loop.call_later(timeout_secs, self._give_up_head)

    def _give_up_head(self) -> None:
        if self._inner_paused:  # the head may be in the kernel's buffer, behind a request that is being answered
            self._await_head(HEAD_SECS)
        else:
            self._close_now()

    def _watch_for_reset(self) -> None:
        """Abort a half-closed connection whose client has left."""
        if self._transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE:
            self.abort()
        else:
            self._timer = self._loop.call_later(RESET_POLL_SECS, self._watch_for_reset)

    # WebSocket

    def _check_upgrade(self) -> None:
        """Refuse an upgrade that is valid HTTP but not a valid WebSocket handshake: uvicorn would not respond."""
        if not self.application_called and not self.is_closing():
            self._refuse(Refusal(HTTPStatus.BAD_REQUEST, "The upgrade is not a WebSocket handshake (RFC 6455, section 4.1)."))

    def _flooding_secs(self) -> float:
        return self._frames.meter.flooding_secs()

    def _pass_frames_soon(self) -> None:
        """Pass frames in the next turn of the event loop, after what is due now."""
        if self.state is WEBSOCKET and (self._frames.pending or self._held):
            self._loop.call_soon(self._pass_frames)

    def _pass_frames(self) -> None:
        """Pass frames while the application takes them, the peer keeps to its rate, and the peer reads."""
        if self.state is not WEBSOCKET or self._transport.is_closing():
            return
        if self._timer:
            self._stop_timer()
        frames, held = self._frames, False
        while frames.pending:
            wait_secs = frames.meter.wait_secs()
            if wait_secs > 0:
                self._timer = self._loop.call_later(wait_secs, self._pass_frames)
            held = wait_secs > 0 or self._inner_paused or not self._peer_reads
            if held or not (piece := frames.take_piece()):
                break
            self._inner.data_received(piece)
            if self.state is not WEBSOCKET or self._transport.is_closing():
                return
        if held is not self._held:
            self._hold(held)

    # Effects

    def _hold(self, held: bool) -> None:
        """Stop or resume reading the transport."""
        if held is not self._held and not self._transport.is_closing():
            self._held = held
            (self._transport.pause_reading if held else self._transport.resume_reading)()

    def _peer_is_sending(self) -> bool:
        """Return whether the peer has sent a part of a request or of a frame, or frames that were not passed on."""
        if self.state is WEBSOCKET:
            return self._frames.incomplete
        return self.state is HTTP and self._requests.incomplete

    def _wait_for_quiet(self) -> None:
        """Close when no more data has arrived for QUIET_SECS, or at the end of LINGER_SECS."""
        self._stop_timer()
        self._timer = self._loop.call_at(min(self._loop.time() + QUIET_SECS, self._linger_until), self._close_now)

    def _close_now(self) -> None:
        """Close after the written data."""
        self.state = CLOSED
        self._transport.close()

    def _release_inner(self, error: Exception | None = None) -> None:
        if self._inner:
            self._inner.connection_lost(error)
        self._inner = None  # a reference cycle

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
