"""Guard uvicorn's connections: header timeout and size, connect rate, small-frame rate, slow readers, lingering closes.

A ``Connection`` stands between the event loop's transport and uvicorn's protocol, and hands on what the limits allow. uvicorn's
protocol sees a ``GuardedTransport``. Nothing private of uvicorn is used: its protocols are named in its configuration, and
called as any ``asyncio.Protocol``.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.framing import FrameMeter, Part, Refusal, RequestMeter
from gateway.limits.connects import Guard, Verdict

HEAD_SECS = 10.0
"""Timeout of a request's head, from the connection or from the head's first byte."""

HEALTH_ONLY_SECS = 1.0
"""Timeout of the head of a connection beyond the connect rate."""

LINGER_SECS, QUIET_SECS = 5.0, 0.3
"""A connection that is closed while its peer still sends discards what comes until nothing came for QUIET_SECS, at most for
LINGER_SECS. Otherwise TCP resets the connection, and the peer may lose the answer (RFC 9112, section 9.6)."""

RECEIVE_BYTES = 128 * 2**10
"""Kernel buffer of a WebSocket, 4 s of audio; Linux doubles the value for its own needs. Its default takes megabytes of audio
that comes faster than it is decoded, which no other limit counts and behind which pings wait."""

HALF_CLOSED_POLL_SECS = 0.2
"""Interval at which a half-closed connection is checked for a reset, which the event loop does not report."""

TCP_CLOSE = 7
"""State of a connection that was reset, as the first byte of TCP_INFO has it (Linux, include/net/tcp_states.h)."""

CONNECTION = "gateway.guard.connection"
"""Key of the connection in an ASGI scope's state; removed before the application gets the scope."""


class Config(uvicorn.Config):
    """uvicorn's configuration, with a guard before its protocols.

    Args:
        app: the application.
        guard: what its connections share.
        options: of ``uvicorn.Config``.
    """

    def __init__(self, app: ASGIApp, guard: Guard[Any], **options: Any) -> None:
        async def guarded_app(scope: Scope, receive: Receive, send: Send) -> None:
            if connection := scope.get("state", {}).pop(CONNECTION, None):
                connection.application_called()
            await app(scope, receive, send)

        super().__init__(guarded_app, http="httptools", ws="websockets-sansio", **options)
        self.guard = guard

    def load(self) -> None:
        """Put ``Connection`` in the place of the protocol for HTTP."""
        super().load()
        self.inner_class: Callable[..., Any] = self.http_protocol_class
        self.http_protocol_class = Connection


class Connection(asyncio.Protocol):
    """One client's connection, first for HTTP and after an upgrade for a WebSocket.

    Args: those that uvicorn gives its protocols.
    """

    def __init__(self, config: Config, app_state: dict[str, Any], **others: Any) -> None:
        self.loop = asyncio.get_running_loop()
        self._guard: Guard[Connection] = config.guard
        state = {**app_state, CONNECTION: self, "flooding_secs": self.flooding_secs}
        self._make_inner = partial(config.inner_class, config=config, app_state=state, **others)
        self._inner: Any = None  # uvicorn's protocol
        self._transport: GuardedTransport
        self._address = ""
        self._counted = True  # by the connect rate
        self._one_answer = False
        self._timer: asyncio.TimerHandle | None = None  # for a head, for small frames, or to linger
        self._linger_until: float | None = None
        self._requests = RequestMeter()
        self._frames: FrameMeter | None = None  # of a WebSocket
        self._unparsed = b""  # from _parsed_bytes on
        self._parsed_bytes = 0
        self._peer_reads = True
        self._application_called = False

    # What the event loop calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # of a TCP listener
        """Admit the connection, or end it, which costs a tenth of what an answer would."""
        self._transport = GuardedTransport(transport, self)
        peer = transport.get_extra_info("peername")
        self._address = str(peer[0]) if peer else ""
        now = self.loop.time()
        for connection in self._guard.take_idle(now):
            connection.close_when_idle()
        verdict = self._guard.arrive(self, self._address, now)
        if verdict is Verdict.REFUSED:
            transport.abort()
            return
        self._counted = verdict is Verdict.WELCOME
        self._one_answer = not self._counted
        self._inner = self._make_inner()
        self._inner.connection_made(self._transport)
        self._await_head(HEAD_SECS if self._counted else HEALTH_ONLY_SECS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop what was not parsed."""
        self._cancel_timer()
        self._guard.leave(self)
        self._unparsed = b""
        self._leave_inner(exc)

    def data_received(self, data: bytes) -> None:
        """Hand on data as far as the limits allow."""
        if self._linger_until is not None:
            self._linger()
        elif self._frames:
            self._unparsed = self._unparsed[self._parsed_bytes :] + data if self._unparsed else data
            self._parsed_bytes = 0
            self._parse_frames()
        elif not self._transport.is_closing():
            self._take_request(data)

    def eof_received(self) -> bool:
        """Answer a request whose client sends no more, but may still read; close any other connection."""
        self._transport.at_eof = True
        if self._frames or self._linger_until is not None or self._requests.heads != 1 or self._requests.part is not Part.NONE:
            return False
        self._inner.shutdown()  # closes the connection after the answer
        if self._transport.is_closing() or not self._requests.is_http_1_1:
            return False
        if not self._transport.written:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # a client that has left answers with a reset
        self._watch_for_reset()
        return True

    def pause_writing(self) -> None:
        """Stop parsing frames: answers to pings would pile up."""
        self._peer_reads = False
        if self._inner:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        """Parse on."""
        self._peer_reads = True
        if self._inner:
            self._inner.resume_writing()
        self.parse_soon()

    # What uvicorn's protocol causes through its transport

    def upgrade(self, protocol: asyncio.BaseProtocol) -> None:
        """Go on as a WebSocket."""
        self._cancel_timer()
        self._guard.keep(self)
        self._inner = protocol
        self._frames = FrameMeter(self.loop.time)
        connection: socket.socket = self._transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        self.loop.call_soon(self._check_upgrade)

    def parse_soon(self) -> None:
        """Parse what is there, after what is due now."""
        if self._frames and (self._unparsed or self._transport.holding):
            self.loop.call_soon(self._parse_frames)

    def close(self) -> None:
        """Close at once, or after a while if the peer is about to send more."""
        self._cancel_timer()
        if self._frames:
            sending = self._frames.within_frame or self._parsed_bytes < len(self._unparsed)
        else:
            sending = self._requests.part is not Part.NONE or self._requests.head_pending
        if sending and self._inner and not self._transport.at_eof:
            self._unparsed = b""
            self._linger_until = self.loop.time() + LINGER_SECS
            self._transport.hold(False)
            self._linger()
            self.loop.call_soon(self._leave_inner)  # uvicorn is done with it; a server that stops must not close it again
        else:
            self._transport.close_now()

    # What the application, the transport and the guard need

    @property
    def is_websocket(self) -> bool:
        """Whether the connection was upgraded."""
        return self._frames is not None

    def application_called(self) -> None:
        """Note that the application has a request."""
        self._application_called = True

    def flooding_secs(self) -> float:
        """Return how long the peer has been held back for its small frames; 0 if it is not."""
        return self._frames.flooding_secs() if self._frames else 0.0

    def close_when_idle(self) -> None:
        """Close now, or after the answer that is due."""
        if self._inner:
            self._inner.shutdown()

    def _leave_inner(self, error: Exception | None = None) -> None:
        if self._inner:
            self._inner.connection_lost(error)
        self._inner = None  # a reference cycle

    def _take_request(self, data: bytes) -> None:
        self._guard.touch(self, self.loop.time())
        data = self._requests.take(data)
        if self._requests.refusal:
            self._refuse(self._requests.refusal)
            return
        if self._requests.heads and self._counted is self._requests.health_only and not self._recount():
            self._transport.abort()
            return
        if not self._requests.head_pending:
            self._cancel_timer()
        elif not self._timer:
            self._await_head(HEAD_SECS)
        if data:
            self._inner.data_received(data)
        if not self._counted and self._one_answer and self._requests.heads:
            self._inner.shutdown()

    def _recount(self) -> bool:
        """Count a connection by its requests; False if it has to end."""
        if self._requests.health_only:
            self._guard.refund(self._address)
            self._counted = False
            return True
        self._counted = self._guard.admit(self._address)
        return self._counted

    def _refuse(self, refusal: Refusal) -> None:
        """Answer in the application's stead, and close."""
        body = refusal.message.encode()
        head = (
            f"HTTP/1.1 {refusal.status.value} {refusal.status.phrase}\r\nContent-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        self._transport.write(head.encode() + body)
        self._transport.close()

    def _check_upgrade(self) -> None:
        """Refuse an upgrade that is valid HTTP but no WebSocket's: uvicorn would not answer it."""
        if not self._application_called and not self._transport.is_closing():
            self._refuse(Refusal(HTTPStatus.BAD_REQUEST, "The upgrade is no WebSocket's (RFC 6455, section 4.1)."))

    def _parse_frames(self) -> None:
        """Hand on frames while the application takes them, and the peer keeps to its rate and reads."""
        assert self._frames  # noqa: S101 (the callers' part)
        if self._transport.is_closing():
            return
        self._cancel_timer()
        held = False
        while self._parsed_bytes < len(self._unparsed) and not held:
            wait_secs = self._frames.wait_secs()
            held = wait_secs > 0 or self._transport.inner_paused or not self._peer_reads
            if wait_secs > 0:
                self._timer = self.loop.call_later(wait_secs, self._parse_frames)
            if not held:
                begin, self._parsed_bytes = self._parsed_bytes, self._frames.cut(self._unparsed, self._parsed_bytes)
                if self._parsed_bytes == begin:
                    break  # the rest of a frame's header has to come first
                self._inner.data_received(self._unparsed[begin : self._parsed_bytes])
                if self._transport.is_closing():
                    return
        if self._parsed_bytes == len(self._unparsed):
            self._unparsed, self._parsed_bytes = b"", 0
        self._transport.hold(held)

    def _await_head(self, timeout_secs: float) -> None:
        self._timer = self.loop.call_later(timeout_secs, self._give_up_head)

    def _give_up_head(self) -> None:
        if self._transport.inner_paused:  # the head may be in the kernel's buffer, behind a request that is being answered
            self._await_head(HEAD_SECS)
        else:
            self._transport.close_now()

    def _linger(self) -> None:
        """Close when no more has come for a while, or too much."""
        assert self._linger_until is not None  # noqa: S101 (the callers' part)
        self._cancel_timer()
        self._timer = self.loop.call_at(min(self.loop.time() + QUIET_SECS, self._linger_until), self._transport.close_now)

    def _watch_for_reset(self) -> None:
        """End a half-closed connection whose client has left."""
        if self._transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE:
            self._transport.abort()
        else:
            self._timer = self.loop.call_later(HALF_CLOSED_POLL_SECS, self._watch_for_reset)

    def _cancel_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


class GuardedTransport(asyncio.Transport):
    """The transport that uvicorn's protocols see.

    Args:
        transport: the event loop's.
        connection: decides when it is read and closed.

    Attributes:
        inner_paused: uvicorn's protocol does not want to read.
        holding: the event loop's transport is not read.
        written: something was written.
        at_eof: the peer sends no more.
    """

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        super().__init__()
        self._transport = transport
        self._connection = connection
        self._protocol: asyncio.BaseProtocol = connection
        self._closed = False
        self.inner_paused = self.holding = self.written = self.at_eof = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return what the event loop's transport knows."""
        return self._transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        """Return whether the connection is closed, or closes when its peer has sent what it was sending."""
        return self._closed or self._transport.is_closing()

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return uvicorn's protocol."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Change from HTTP to a WebSocket."""
        self._protocol = protocol
        self._connection.upgrade(protocol)

    def pause_reading(self) -> None:
        """Hand on nothing more. A WebSocket is read until something has come that can't be handed on."""
        self.inner_paused = True
        if not self._connection.is_websocket:
            self.hold(True)

    def resume_reading(self) -> None:
        """Hand on what comes."""
        self.inner_paused = False
        if self._connection.is_websocket:
            self._connection.parse_soon()
        else:
            self.hold(False)

    def hold(self, held: bool) -> None:
        """Read the event loop's transport, or not."""
        if held is not self.holding and not self._transport.is_closing():
            self.holding = held
            (self._transport.pause_reading if held else self._transport.resume_reading)()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write, unless the connection is closed."""
        if not self._closed:
            self.written = True
            self._transport.write(data)

    def close(self) -> None:
        """Close when the peer has sent what it was sending."""
        if not self._closed:
            self._closed = True
            self._connection.close()

    def close_now(self) -> None:
        """Close after what was written."""
        self._closed = True
        self._transport.close()

    def abort(self) -> None:
        """Close without what was written."""
        self._closed = True
        self._transport.abort()
