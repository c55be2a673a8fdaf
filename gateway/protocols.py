"""What uvicorn's protocols leave to the peer's good will: how long a request's head takes, how many frames come, who reads."""

from __future__ import annotations

import asyncio
import re
import socket
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame
from websockets.http11 import Request

from gateway.limits.bucket import TokenBucket

HEAD_SECS = 10.0
"""A request's head must come within this time, from the connection or from its own first byte."""

MAX_HEAD_BYTES = 64 * 2**10
"""A head that is larger, and not yet whole, is refused."""

SMALL_BYTES = 160
"""Frames with less than this, 5 ms of audio, cost more than they bring. Microphones' have 10 ms or more."""

SMALL_A_SECOND = 500
"""Small frames of one WebSocket that are taken, on average; in the first second twice as many. Pings and fragments count."""

LINGER_SECS, QUIET_SECS = 5.0, 0.3
"""What a peer still sends when it is cut off is discarded for the one time, or until nothing came for the other."""

MAX_ADDRESSES = 10_000
"""Of so many the last connections are remembered."""

RECEIVE_BYTES = 128 * 2**10
"""Audio of a WebSocket that may wait in the kernel, 4 s; Linux doubles it for its own needs. By itself it takes megabytes of
what comes faster than it is decoded, which no other limit counts and behind which pings wait."""

PIECE_BYTES = 4096
"""What comes is parsed in pieces of this size: one read can hold forty thousand frames, in which others would stand still."""

OFFER_OF_HTTP2 = re.compile(rb"\r\nupgrade:[ \t]*h2c[^\r\n]*", re.IGNORECASE)
"""Java's HttpClient makes it with every request. It is to be ignored, but httptools would drop the body for it."""

UNFINISHED_LINE = re.compile(rb"\r(\n[^\n]{0,80})?\Z")
"""What a piece of a head ends with that may become an offer: a line's beginning, and the end of the line before it."""


class Arrivals:
    """How many connections each address has opened of late.

    Args:
        rate: how many are let in, a second on average; twice as many at once.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def admit(self, address: str) -> bool:
        """Whether one more may come from this address."""
        bucket = self._buckets.pop(address, None) or TokenBucket(self._rate, 2 * self._rate)
        self._buckets[address] = bucket
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        if bucket.level < 1:
            return False
        bucket.take(1)
        return True


class Config(uvicorn.Config):
    """Uvicorn's, with what the protocols of all connections share."""

    def __init__(self, app: Any, connects_an_address: float, **options: Any) -> None:
        super().__init__(app, http=HttpProtocol, ws=WebSocketProtocol, **options)
        self.arrivals = Arrivals(connects_an_address)


class HttpProtocol(HttpToolsProtocol):
    """HTTP whose connections don't come too fast, and whose requests must have a head before long."""

    _head_deadline: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _unfinished = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a head; a connection too many ends here, which costs a tenth of what an answer would."""
        super().connection_made(transport)
        assert isinstance(self.config, Config)  # noqa: S101 (it made this)
        if self.client and not self.config.arrivals.admit(self.client[0]):
            transport.abort()
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._has_head()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Wait for the head whose first byte is here."""
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        """Wait no more."""
        self._has_head()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Take data; refuse a head that is too large."""
        in_body = self.cycle is not None and self.cycle.more_body
        if not in_body:
            data = self._without_offer(self._unfinished + data)
        super().data_received(data)
        if self._head_deadline:
            self._head_bytes += len(data)
            if self._head_bytes + len(self._unfinished) > MAX_HEAD_BYTES:
                self._has_head()
                self.send_400_response("The head of the request is too large.")

    def _without_offer(self, data: bytes) -> bytes:
        """A head's lines without an offer of HTTP/2; one that may become one waits for its end."""
        end = data.find(b"\r\n\r\n")
        unfinished = UNFINISHED_LINE.search(data) if end < 0 else None
        lines, self._unfinished = (data[: unfinished.start()], unfinished[0]) if unfinished else (data, b"")
        offer = OFFER_OF_HTTP2.search(lines, 0, end + 2 if end >= 0 else len(lines))
        return lines[: offer.start()] + lines[offer.end() :] if offer else lines

    def _await_head(self) -> None:
        self._has_head()
        self._head_bytes = 0
        self._head_deadline = self.loop.call_later(HEAD_SECS, self.transport.close)

    def _has_head(self) -> None:
        if self._head_deadline:
            self._head_deadline.cancel()
            self._head_deadline = None


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """WebSockets that are read only as fast as small frames are allowed to come, and only while their peer reads too."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin with a full allowance."""
        super().connection_made(transport)
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        self._unparsed = bytearray()
        self._allowance = TokenBucket(SMALL_A_SECOND, SMALL_A_SECOND, self.loop.time)
        self._flooded_since: float | None = None
        self._later: asyncio.TimerHandle | None = None
        self._sink: Callable[[bytes], bool] | None = None
        self._awaited = False  # by the application, which has no message in hand
        self._sunk = False  # something of the last piece

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop what was not parsed."""
        self._unparsed.clear()
        self._cancel()
        self._sink = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take data; after a fault of the peer's none of it."""
        if self.conn.parser_exc:
            self._close_later()
            return
        self._unparsed += data
        self._go_on()

    def handle_parser_exception(self) -> None:
        """Close for a fault of the peer's, such as a frame that is far too large, once it has sent what it was about to send.

        What is not read when a connection is closed makes TCP reset it, and the peer might never see why.
        """
        assert self.conn.close_sent  # noqa: S101 (the parser's part)
        self.queue.put_nowait(
            {"type": "websocket.disconnect", "code": self.conn.close_sent.code, "reason": self.conn.close_sent.reason}
        )
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self._unparsed.clear()
        self._linger_until = self.loop.time() + LINGER_SECS
        self._close_later()

    def flooding_secs(self) -> float:
        """For how long the peer has now been held back because of its small frames."""
        self._wait_secs()  # it may have stopped meanwhile
        return self.loop.time() - self._flooded_since if self._flooded_since else 0.0

    def offer_to(self, sink: Callable[[bytes], bool]) -> None:
        """Offer each binary message to a function before it is put into the queue, as long as that would be the next message.

        Most are audio, and to wake a task for each of them takes longer than to take it.
        """
        self._sink = sink

    def send_receive_event_to_app(self) -> None:
        """Hand on a message that is whole."""
        if self._sink and self._awaited and self.queue.empty() and self.curr_msg_data_type == "bytes":
            self.frames = [b"".join(self.frames)]
            if self._sink(self.frames[0]):
                self.frames = []
                self._sunk = True
                return
        super().send_receive_event_to_app()

    def handle_connect(self, event: Request) -> None:
        """Let the application know of a flood, and have messages offered."""
        super().handle_connect(event)
        if self.response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
            self.scope["state"].update(flooding_secs=self.flooding_secs, offer_to=self.offer_to)

    def handle_events(self) -> None:
        """Count small frames."""
        self._allowance.take(sum(isinstance(event, Frame) and len(event.data) < SMALL_BYTES for event in self.conn.events))
        super().handle_events()

    def resume_writing(self) -> None:
        """The peer reads again, so it is read again."""
        super().resume_writing()
        self._go_on()

    async def send(self, message: Any) -> None:
        """Send; after a close what is left has to be gone through for the peer's own."""
        await super().send(message)
        if self.close_sent:
            self._go_on()

    async def receive(self) -> Any:
        """The next message; when there is none left, more is parsed."""
        self._awaited = True
        try:
            message = await self.queue.get()
        finally:
            self._awaited = False
        if self.queue.empty():
            self._go_on()
        return message

    def _close_later(self) -> None:
        """Close when no more has come for a while, or too much."""
        if self.close_timer:
            self.close_timer.cancel()
        self.close_timer = self.loop.call_at(min(self.loop.time() + QUIET_SECS, self._linger_until), self.transport.close)

    def _go_on(self) -> None:
        """Parse what came, and read on, for as long as the application keeps up and the peer keeps to its pace and reads."""
        self._cancel()
        while self._unparsed and not self.transport.is_closing():
            wait_secs = self._wait_secs()
            if wait_secs > 0:
                self._later = self.loop.call_later(wait_secs, self._go_on)
            if wait_secs > 0 or self._must_wait():
                break
            self._sunk = False
            piece = bytes(self._unparsed[:PIECE_BYTES])
            del self._unparsed[:PIECE_BYTES]
            super().data_received(piece)
            if self._sunk and self._unparsed:
                self._later = self.loop.call_later(0, self._go_on)  # after the others
                break
            if self.conn.handshake_exc and not self.handshake_complete:
                self._refuse_head(self.conn.handshake_exc)
        if self.conn.parser_exc:
            self._unparsed.clear()
        hold = bool(self._unparsed) or self._must_wait()
        if hold is not self.read_paused and not self.transport.is_closing():
            self.read_paused = hold
            (self.transport.pause_reading if hold else self.transport.resume_reading)()

    def _refuse_head(self, reason: Exception) -> None:
        """Answer a head that HTTP took and websockets does not, as for a line of more than 8 KiB; uvicorn would stay silent."""
        response = self.conn.reject(HTTPStatus.BAD_REQUEST, f"Failed to open a WebSocket connection: {reason.__cause__}.\n")
        self.transport.write(b"".join(self.conn.data_to_send()) or response.serialize())
        self.handshake_complete = self.close_sent = True
        self._unparsed.clear()
        self.transport.close()

    def _must_wait(self) -> bool:
        """Whether the application has messages to take, or the peer has; after the close nobody takes any."""
        return not self.close_sent and not (self.queue.empty() and self.writable.is_set())

    def _wait_secs(self) -> float:
        """Until the next frame may come, at the least."""
        left = self._allowance.level
        if left < 0:
            self._flooded_since = self._flooded_since or self.loop.time()
        elif left == self._allowance.size:  # a second without any
            self._flooded_since = None
        return -left / self._allowance.rate

    def _cancel(self) -> None:
        if self._later:
            self._later.cancel()
            self._later = None
