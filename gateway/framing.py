"""Measure what clients send, without input or output: heads of HTTP requests and small WebSocket frames."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from enum import Enum, auto
from http import HTTPStatus
from typing import NamedTuple

import httptools

from gateway.limits.bucket import TokenBucket

MAX_HEAD_BYTES = 64 * 2**10
"""Largest head of a request, from its first byte to the blank line, in bytes."""

MAX_UPGRADE_LINE_BYTES, MAX_UPGRADE_LINES = 8190, 128
"""Largest header line, in bytes without its end, and most header lines of a WebSocket's upgrade; websockets takes no more."""

SMALL_BYTES = 160
"""Frames with a smaller payload, 5 ms of audio, are limited in number. Frames of microphones hold 10 ms or more."""

SMALL_FRAMES_PER_SEC = 500
"""Average rate of small frames of one WebSocket, pings and fragments included; also their burst."""

PIECE_BYTES = 4096
"""Frames are handed on in pieces of about this size. One read can hold 40,000 frames, which would block the event loop."""

UPGRADE_OFFER = re.compile(rb"\r\nupgrade:(?![ \t]*websocket[ \t]*(?:\r|\Z))[^\r\n]*", re.IGNORECASE)
"""An offer to upgrade to anything but a WebSocket, as Java's HttpClient makes with every request (h2c). A server ignores it
(RFC 9110, section 7.8), but httptools would drop the request's body."""

UNFINISHED_LINE = re.compile(rb"\r(?:\n(?:[^\n]{0,8}|upgrade:[^\n]*))?\Z", re.IGNORECASE)
"""The end of a head's beginning that may become an offer, with the line break before it."""

HEALTH_TARGET = re.compile(rb"/health(?:[/?]|\Z)")


class Part(Enum):
    """The part of a request that comes next."""

    NONE = auto()
    HEAD = auto()
    BODY = auto()


class Refusal(NamedTuple):
    """Why a request is refused before the application sees it."""

    status: HTTPStatus
    message: str


class RequestMeter:
    """Measures one connection's HTTP requests (RFC 9112) with the parser that uvicorn uses.

    Attributes:
        part: the part of a request that comes next.
        refusal: why the connection has to end, if it has to.
        heads: how many requests have a complete head.
        health_only: whether all of those are for ``/health``.
    """

    def __init__(self) -> None:
        self.part = Part.NONE
        self.refusal: Refusal | None = None
        self.health_only = True
        self.heads = 0
        self._parser = httptools.HttpRequestParser(self)
        if hasattr(self._parser, "set_dangerous_leniencies"):  # as uvicorn does, so that both parsers see the same requests
            self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._stopped = False
        self._piece_bytes = 0
        self._head_bytes = 0  # of a head that is not complete
        self._unfinished = b""
        self._tail = b""  # what was handed on last of a head: its end may begin there
        self._target = b""
        self._lines = self._longest_line_bytes = 0

    @property
    def is_http_1_1(self) -> bool:
        """Whether the client understands interim answers."""
        return self._parser.get_http_version() == "1.1"

    @property
    def head_pending(self) -> bool:
        """Whether something of a head has come, but not all of it."""
        return self.part is Part.HEAD or self._head_bytes > 0 or bool(self._unfinished)

    def take(self, data: bytes) -> bytes:
        """Measure what came, and return what the server may parse. See ``refusal`` afterwards."""
        if self._stopped:
            return data
        if self.part is not Part.BODY:
            data = self._without_offers(self._unfinished + data)
        start = 0
        while start < len(data) and not self._stopped and not self.refusal:
            piece = data[start : start + MAX_HEAD_BYTES - self._head_bytes]
            self._feed(piece)
            start += len(piece)
        self._tail = (self._tail + data)[-3:] if self.part is Part.HEAD else b""
        return data

    def on_message_begin(self) -> None:
        """Begin a request; a callback of the parser, as are the following methods."""
        self.part = Part.HEAD
        self._target = b""
        self._lines = self._longest_line_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Note the next part of the request's target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header's size."""
        self._lines += 1
        self._longest_line_bytes = max(self._longest_line_bytes, len(name) + len(value) + 2)

    def on_headers_complete(self) -> None:
        """End the head."""
        self.part = Part.BODY
        self.heads += 1
        self.health_only = self.health_only and bool(HEALTH_TARGET.match(self._target))
        if self._parser.should_upgrade() and (
            self._lines > MAX_UPGRADE_LINES or self._longest_line_bytes > MAX_UPGRADE_LINE_BYTES
        ):
            self.refusal = Refusal(
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"The upgrade has {self._lines} headers, the longest of {self._longest_line_bytes} bytes; "
                f"at most {MAX_UPGRADE_LINES} headers of {MAX_UPGRADE_LINE_BYTES} bytes are allowed.",
            )

    def on_message_complete(self) -> None:
        """End the request. What follows in the same piece is not counted: its beginning is not known."""
        self.part = Part.NONE
        self._head_bytes = -self._piece_bytes

    def _feed(self, piece: bytes) -> None:
        self._piece_bytes = len(piece)
        try:
            self._parser.feed_data(piece)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._stopped = True  # uvicorn's parser stops here too, and answers
        self._head_bytes = 0 if self.part is Part.BODY else self._head_bytes + len(piece)
        if self._head_bytes + len(self._unfinished) >= MAX_HEAD_BYTES:
            self.refusal = Refusal(
                HTTPStatus.BAD_REQUEST, f"The head of the request is too large; at most {MAX_HEAD_BYTES} bytes are allowed."
            )

    def _without_offers(self, data: bytes) -> bytes:
        """Remove offers to upgrade from a head's lines, and keep back a line that may become one."""
        end = (self._tail + data).find(b"\r\n\r\n") - len(self._tail)
        ends = end >= -len(self._tail)
        unfinished = None if ends else UNFINISHED_LINE.search(data)
        lines, self._unfinished = (data[: unfinished.start()], unfinished[0]) if unfinished else (data, b"")
        head_end = max(0, end + 2) if ends else len(lines)
        return UPGRADE_OFFER.sub(b"", lines[:head_end]) + lines[head_end:]


class FrameMeter:
    """Finds the frames in one WebSocket's bytes (RFC 6455, section 5.2), and limits the rate of small ones.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._allowance = TokenBucket(SMALL_FRAMES_PER_SEC, SMALL_FRAMES_PER_SEC, clock)
        self._limited = False  # small frames came within the last second
        self._flooded_since: float | None = None
        self._payload_left = 0

    @property
    def within_frame(self) -> bool:
        """Whether the peer has not sent the whole of its last frame."""
        return self._payload_left > 0

    def cut(self, data: bytes, start: int) -> int:
        """Count the frames of the next piece, and return its end.

        Args:
            data: bytes of the connection.
            start: where the last piece ended.

        Returns:
            The end of the piece, which is the end of a frame or of the data; ``start`` if only a part of a frame's header is
            there.
        """
        position = min(start + self._payload_left, len(data))
        self._payload_left -= position - start
        small = 0
        while position - start < PIECE_BYTES and position + 2 <= len(data):
            second = data[position + 1]
            length = second & 0x7F
            extra_bytes = 0 if length < 126 else 2 if length == 126 else 8  # noqa: PLR2004
            payload = position + 2 + extra_bytes + (4 if second & 0x80 else 0)
            if payload > len(data):
                break
            if extra_bytes:
                length = int.from_bytes(data[position + 2 : position + 2 + extra_bytes], "big")
            small += length < SMALL_BYTES
            position = min(payload + length, len(data))
            self._payload_left = payload + length - position
        if small:
            self._limited = True
            self._allowance.take(small)
        return position

    def wait_secs(self) -> float:
        """Return how long the next piece has to wait; at most 0 if it need not."""
        if not self._limited:
            return 0.0
        left = self._allowance.level
        if left < 0:
            self._flooded_since = self._flooded_since or self._clock()
        elif left == self._allowance.size:  # a second without small frames
            self._flooded_since = None
            self._limited = False
        return -left / self._allowance.rate

    def flooding_secs(self) -> float:
        """Return how long the peer has been held back for its small frames; 0 if it is not."""
        self.wait_secs()  # the flood may have ended
        return self._clock() - self._flooded_since if self._flooded_since else 0.0
