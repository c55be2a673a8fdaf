"""Convert a live stream's bytes to samples: raw audio, WAV, or a container that is decoded as it arrives."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from gateway.audio.body import Body
from gateway.audio.errors import undecodable
from gateway.audio.joined import HEADER_BYTES, find_beginning
from gateway.audio.pool import FilePool
from gateway.audio.raw import DEFAULT, RawFormat, RawStream
from gateway.audio.reader import Reader
from gateway.audio.sniff import RAW, WAV, Format, StreamStart
from gateway.audio.wav import read_stream_header
from gateway.errors import ApiError, ErrorKind

DRAIN_SECS = 20.0
"""Timeout for progress of a container's process after the stream's end, in seconds."""


class Kind(Enum):
    """Kind of a stream."""

    UNKNOWN = auto()
    RAW = auto()
    WAV_HEADER = auto()
    WAV = auto()
    CONTAINER = auto()


class StreamInput:
    """Converts a stream's bytes to samples.

    Raw audio must be cut between samples, though not between the channels of one; a file may be cut anywhere.

    Args:
        raw: the format of the stream if it is raw audio.
        files: decodes containers.
        append: called with 16 kHz samples [n]; may wait.
        max_secs: maximum length of the audio in seconds.
        resumable: whether the client may continue the stream later, so that it must be raw audio.

    Attributes:
        failed: future that gets the error of a container that is not decodable.
    """

    def __init__(
        self,
        raw: RawFormat,
        files: FilePool,
        append: Callable[[NDArray[np.int16]], Awaitable[None]],
        max_secs: float,
        *,
        resumable: bool = False,
    ) -> None:
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._raw = raw
        self._files = files
        self._append = append
        self._max_secs = max_secs
        self._resumable = resumable
        self._kind = Kind.UNKNOWN
        self._start: StreamStart | None = StreamStart()
        self._held = b""  # bytes of a stream whose kind or header is not known yet
        self._converter = None if raw == DEFAULT else RawStream(raw)
        self._header_bytes = 0  # that a WAV file's header has at least
        self._left_bytes: int | None = None  # of a WAV file's audio
        self._pipe: socket.socket | None = None
        self._pump: asyncio.Task[None] | None = None
        self._moved, self._appending = 0, False  # blocks, and whether one waits for room
        self._process = contextlib.AsyncExitStack()

    @property
    def begun(self) -> bool:
        """Whether any bytes of the stream were received."""
        return bool(self._held) or self._kind is not Kind.UNKNOWN

    def resume(self) -> None:
        """Treat the stream as raw audio that continues an earlier part."""
        self._kind, self._start = Kind.RAW, None

    async def feed(self, data: bytes) -> None:
        """Convert the next bytes.

        Raises:
            ApiError: the stream has a format that is not supported, or is not decodable.
        """
        if self._kind is Kind.RAW:
            if self._start:
                self._start.check(data)
            await self._feed_raw(data)
        elif self._kind is Kind.UNKNOWN:
            assert self._start  # noqa: S101 (only a resumed stream has none)
            self._held += data
            found = self._start.check(data)
            if not found and len(data) % self._raw.sample_bytes and not self._start.may_be_container:
                found = self._start.end()
            if found:
                await self._begin(found)
        elif self._kind is Kind.WAV_HEADER:
            self._held += data
            await self._read_header()
        elif self._kind is Kind.WAV:
            await self._feed_wav(data)
        else:
            await self._feed_pipe(data)

    async def end(self) -> None:
        """Convert the rest of the stream at its end.

        Raises:
            ApiError: as ``feed``.
        """
        found = self._start.end() if self._start and self._kind in (Kind.UNKNOWN, Kind.RAW) else None
        if found and self._kind is Kind.UNKNOWN:
            await self._begin(found)
        if self._kind is Kind.WAV_HEADER:
            raise undecodable("The WAV stream ends within its header.")
        if self._kind is Kind.CONTAINER:
            await self._end_pipe()
        elif self._converter:
            await self._give(self._converter.finish(whole=self._kind is Kind.RAW))

    async def close(self) -> None:
        """End the decoding."""
        if self._pump:
            self._pump.cancel()
            await asyncio.gather(self._pump, return_exceptions=True)
        await self._process.aclose()
        self.failed.cancel()

    async def _begin(self, found: Format) -> None:
        held, self._held = self._held, b""
        if found == RAW:
            self._kind = Kind.RAW
            await self._feed_raw(held)
            return
        if self._resumable:
            message = f"The stream starts like {found.name}; streams that can be resumed (amira.v2) must be raw audio."
            raise ApiError(ErrorKind.UNSUPPORTED_MEDIA, message)
        if found == WAV:
            self._kind, self._held = Kind.WAV_HEADER, held
            await self._read_header()
            return
        self._kind = Kind.CONTAINER
        self._pipe, reader = await self._process.enter_async_context(self._files.stream(found, self._max_secs))
        self._pump = asyncio.create_task(self._move(reader), name="stream container")
        self._pump.add_done_callback(self._report)
        await self._feed_pipe(held)

    async def _feed_raw(self, data: bytes) -> None:
        if len(data) % self._raw.sample_bytes:
            bits, rule = 8 * self._raw.sample_bytes, "an even number" if self._raw.sample_bytes == 2 else "a multiple of 4"  # noqa: PLR2004
            raise ApiError(ErrorKind.ODD_LENGTH, f"the frame has {len(data)} bytes; {bits}-bit samples need {rule}")
        await self._give(self._converter.convert(data) if self._converter else np.frombuffer(data, "<i2"))

    async def _read_header(self) -> None:
        if len(self._held) >= self._header_bytes:
            header = read_stream_header(self._held)
            if isinstance(header, int):
                self._header_bytes = header
                return
            audio, self._held = self._held[header.start :], b""
            self._kind, self._converter, self._left_bytes = Kind.WAV, RawStream(header.format), header.size
            await self._feed_wav(audio)

    async def _feed_wav(self, data: bytes) -> None:
        assert self._converter  # noqa: S101 (made with the header)
        rest = b""
        if self._left_bytes is not None:
            data, rest = data[: self._left_bytes], data[self._left_bytes :]
            self._left_bytes -= len(data)
        await self._give(self._converter.convert(data))
        if rest:
            await self._seek_header(rest)

    async def _seek_header(self, data: bytes) -> None:
        """Search for another file after the audio of a WAV file; other bytes are tags."""
        assert self._converter  # noqa: S101 (made with the header)
        self._held += data
        at = find_beginning(WAV, Body(self._held))
        if at < 0:
            self._held = self._held[-HEADER_BYTES:]
            return
        await self._give(self._converter.finish(whole=False))
        self._kind, self._held, self._header_bytes = Kind.WAV_HEADER, self._held[at:], 0
        await self._read_header()

    async def _feed_pipe(self, data: bytes) -> None:
        assert self._pipe and self._pump  # noqa: S101, PT018 (made when the stream began)
        if self._pump.done():
            self._pump.result()
        with contextlib.suppress(ConnectionError):  # the pump fails with the reason
            await asyncio.get_running_loop().sock_sendall(self._pipe, data)

    async def _end_pipe(self) -> None:
        assert self._pipe and self._pump  # noqa: S101, PT018 (made when the stream began)
        with contextlib.suppress(OSError):
            self._pipe.shutdown(socket.SHUT_WR)
        moved = -1
        while not self._pump.done():
            if moved == self._moved and not self._appending:
                raise ApiError(ErrorKind.NO_CAPACITY, f"The end of the stream was not decoded within {DRAIN_SECS:g} s.")
            moved = self._moved
            await asyncio.wait([self._pump], timeout=DRAIN_SECS)
        self._pump.result()

    async def _move(self, reader: Reader) -> None:
        """Append the samples that a process decodes."""
        async for block in reader:
            self._moved += 1
            await self._give(np.ascontiguousarray(block[0]))

    async def _give(self, samples: NDArray[np.int16]) -> None:
        if len(samples):
            self._appending = True
            await self._append(samples)
            self._appending = False

    def _report(self, pump: asyncio.Task[None]) -> None:
        if not pump.cancelled() and not self.failed.done() and (error := pump.exception()):
            self.failed.set_exception(error)
            self.failed.exception()  # the next call may raise it instead; mark it as retrieved
