"""Measure the heads of HTTP requests and small WebSocket frames; no input or output."""

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
"""Maximum size of a request's head, from its first byte to the blank line, in bytes."""

MAX_UPGRADE_LINE_BYTES, MAX_UPGRADE_LINES = 8190, 128
"""Maximum size of a header line, in bytes without its line break, and maximum number of header lines in a WebSocket's upgrade.
websockets accepts no more."""

SMALL_BYTES = 160
"""Payload size below which frames are limited in number: 5 ms of audio. Frames of microphones have 10 ms or more."""

SMALL_FRAMES_PER_SEC = 500
"""Maximum average rate of small frames of one WebSocket, pings and fragments included; also the burst."""

PIECE_BYTES = 4096
"""Approximate size of the pieces in which frames are passed on. One read can have 40,000 frames, which would block the event
loop."""

UPGRADE_OFFER = re.compile(rb"\r\nupgrade:(?![ \t]*websocket[ \t]*(?:\r|\Z))[^\r\n]*", re.IGNORECASE)
"""Offer to upgrade to anything but a WebSocket, such as h2c in every request of Java's HttpClient. A server may ignore it
(RFC 9110, section 7.8), but httptools would drop the request's body."""

UNFINISHED_LINE = re.compile(rb"\r(?:\n(?:[^\n]{0,8}|upgrade:[^\n]*))?\Z", re.IGNORECASE)
"""End of an incomplete head that may become an offer, with the line break before it."""

HEALTH_TARGET = re.compile(rb"/health(?:[/?]|\Z)")


class Part(Enum):
    """Part of a request."""

    NONE = auto()
    HEAD = auto()
    BODY = auto()


class Refusal(NamedTuple):
    """Response to a request that is refused before the application gets it."""

    status: HTTPStatus
    message: str


class RequestMeter:
    """Measures the HTTP requests of a connection (RFC 9112) with uvicorn's parser.

    Attributes:
        part: the part of a request that is expected next; NONE between requests.
        refusal: set if the connection must be refused.
        heads: number of requests with a complete head.
        health_only: whether all of them are for ``/health``.
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
        self._tail = b""  # last bytes of a head that were passed on; the end of the head may begin there
        self._target = b""
        self._lines = self._longest_line_bytes = 0

    @property
    def is_http_1_1(self) -> bool:
        """Whether the client supports interim responses."""
        return self._parser.get_http_version() == "1.1"

    @property
    def head_pending(self) -> bool:
        """Whether a head has begun and is not complete."""
        return self.part is Part.HEAD or self._head_bytes > 0 or bool(self._unfinished)

    @property
    def incomplete(self) -> bool:
        """Whether a request has begun and is not complete."""
        return self.part is not Part.NONE or self.head_pending

    @property
    def is_one_complete(self) -> bool:
        """Whether there was exactly one request, and it is complete."""
        return self.heads == 1 and self.part is Part.NONE

    def take(self, data: bytes) -> bytes:
        """Measure received data, and return the data for the server to parse. Check ``refusal`` afterwards."""
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
        """Begin a request. This and the following methods are callbacks of the parser."""
        self.part = Part.HEAD
        self._target = b""
        self._lines = self._longest_line_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Append a part of the request's target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Measure a header line."""
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
        """End the request. Data after it in the same piece is not counted, since its start is not known."""
        self.part = Part.NONE
        self._head_bytes = -self._piece_bytes

    def _feed(self, piece: bytes) -> None:
        self._piece_bytes = len(piece)
        try:
            self._parser.feed_data(piece)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._stopped = True  # uvicorn's parser stops here too, and uvicorn responds
        self._head_bytes = 0 if self.part is Part.BODY else self._head_bytes + len(piece)
        if self._head_bytes + len(self._unfinished) >= MAX_HEAD_BYTES:
            self.refusal = Refusal(
                HTTPStatus.BAD_REQUEST, f"The head of the request is too large; at most {MAX_HEAD_BYTES} bytes are allowed."
            )

    def _without_offers(self, data: bytes) -> bytes:
        """Remove offers to upgrade from a head's lines, and hold back a line that may become one."""
        end = (self._tail + data).find(b"\r\n\r\n") - len(self._tail)
        ends = end >= -len(self._tail)
        unfinished = None if ends else UNFINISHED_LINE.search(data)
        lines, self._unfinished = (data[: unfinished.start()], unfinished[0]) if unfinished else (data, b"")
        head_end = max(0, end + 2) if ends else len(lines)
        return UPGRADE_OFFER.sub(b"", lines[:head_end]) + lines[head_end:]


class FrameMeter:
    """Finds the frames in the data of a WebSocket (RFC 6455, section 5.2), and limits the rate of small ones.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._allowance = TokenBucket(SMALL_FRAMES_PER_SEC, SMALL_FRAMES_PER_SEC, clock)
        self._limited = False  # there were small frames within the last second
        self._flooded_since: float | None = None
        self._payload_left = 0

    @property
    def within_frame(self) -> bool:
        """Whether the last frame is not complete."""
        return self._payload_left > 0

    def cut(self, data: bytes, start: int) -> int:
        """Count the frames of the next piece, and return the end of the piece.

        Args:
            data: data of the connection.
            start: end of the last piece.

        Returns:
            The end of a frame or of the data; ``start`` if there is only a part of a frame's header.
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
        """Return the time that the next piece must wait in seconds; 0 or less if it need not wait."""
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
        """Return the time since which small frames are delayed in seconds; 0 if they are not."""
        self.wait_secs()  # the flood may have ended
        return self._clock() - self._flooded_since if self._flooded_since else 0.0


class FrameQueue:
    """Data of a WebSocket that was not passed on yet.

    Args:
        clock: returns seconds.

    Attributes:
        meter: measures the frames, and limits the rate of small ones.
        pending: whether there is data.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.meter = FrameMeter(clock)
        self.pending = False
        self._data = b""
        self._start = 0  # of the next piece

    @property
    def incomplete(self) -> bool:
        """Whether there is data, or the last frame that was passed on is not complete."""
        return self.pending or self.meter.within_frame

    def append(self, data: bytes) -> None:
        """Append received data."""
        self._data = self._data[self._start :] + data if self._data else data
        self._start = 0
        self.pending = True

    def take_piece(self) -> bytes:
        """Remove and return the next piece; empty if there is only a part of a frame's header."""
        start = self._start
        self._start = end = self.meter.cut(self._data, start)
        piece = self._data[start:end]
        if end == len(self._data):
            self._data, self._start, self.pending = b"", 0, False
        return piece

    def clear(self) -> None:
        """Remove all data."""
        self._data, self._start, self.pending = b"", 0, False
