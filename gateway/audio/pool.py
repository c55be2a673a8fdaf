"""Decode each file in a process of its own, so that a malicious file affects only its own request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import structlog

from gateway.audio.body import OpenFile
from gateway.audio.errors import EXTRA
from gateway.audio.jobs import Job
from gateway.audio.media_types import CONTAINERS, identify_body
from gateway.audio.raw import RawFormat, check_raw
from gateway.audio.reader import START_SECS, FileReader, LiveReader, RawReader, Reader, StuckError
from gateway.audio.sniff import RAW, Format
from gateway.errors import ApiError, ErrorKind

MIN_PLACES = 2
"""Minimum number of files decoded at once, so that one slow file does not delay all others."""

CPU_SECS, MIN_SPEED = 2.0, 50.0
"""Limit of CPU time: a fixed part in seconds, and the minimum speed of decoding, relative to real time.

FLAC, Opus and Vorbis are decoded and resampled 300 to 1000 times faster than real time."""

SEARCHED_BYTES_PER_SEC = 10 * 2**20
"""Minimum speed of the search for frames or pages before the first audio, in bytes per second of CPU time."""

MEMORY_BYTES, MEMORY_PER_BYTE = 128 * 2**20, 2
"""Limit of memory: a fixed part, and a multiple of the file's size, which is mapped."""

STOP_SECS = 5.0
"""Time after which the server of the processes is killed if it has not ended by itself, in seconds."""

COPIED_BYTES = 2**20
"""Size of the parts in which a body is copied, with a turn for other tasks in between; a part takes less than a millisecond."""

PACKAGE_ROOT = Path(__file__).parents[2]

log = structlog.get_logger()


class FilePool:
    """Decodes audio of any format; each file in a process of its own, which ends with its request.

    The first file starts a server, ``worker``, that forks for each file.

    Args:
        places: maximum number of files decoded at once; usually the number of CPUs.
    """

    def __init__(self, places: int | None = None) -> None:
        self._places = asyncio.Semaphore(places or max(MIN_PLACES, len(os.sched_getaffinity(0))))
        self._starting = asyncio.Lock()
        self._server: Process | None = None
        self._control: socket.socket | None = None

    @contextlib.asynccontextmanager
    async def read(
        self, file: bytes | BinaryIO | int, content_type: str, *, raw: RawFormat, separate: bool, max_secs: float
    ) -> AsyncIterator[Reader]:
        """Decode a file to 16 kHz samples while they are read. Raw audio needs no process and no place.

        The file is not loaded. Its process is at most some seconds of audio ahead of the reader, and pauses while nothing is
        read. Leaving the context ends the process.

        Args:
            file: its bytes, or an open file, or its descriptor; read from its first byte, and not closed.
            content_type: its media type, as in ``media_types.identify_body``.
            raw: the format of the file if it is raw audio.
            separate: whether to keep the channels instead of mixing them down to one.
            max_secs: maximum length of the audio in seconds.

        Raises:
            ApiError: the file is not decodable audio, is longer than allowed, or costs too much to decode; also from the
                iteration of the reader.
        """
        body = file if isinstance(file, bytes) else OpenFile(file if isinstance(file, int) else file.fileno())
        content = identify_body(body, content_type)
        if content.format == RAW:
            check_raw(len(body), raw, max_secs)
            yield RawReader(body, raw, separate=separate)
            return
        if isinstance(file, bytes):
            with _in_memory() as copy:
                await _write(copy, file)
                async with self.read(copy, content_type, raw=raw, separate=separate, max_secs=max_secs) as reader:
                    yield reader
            return
        descriptor = file if isinstance(file, int) else file.fileno()
        memory_bytes = MEMORY_BYTES + MEMORY_PER_BYTE * len(body)
        cpu_secs = CPU_SECS + len(body) / SEARCHED_BYTES_PER_SEC
        job = Job(content.format.name, content.start, False, separate, max_secs, cpu_secs, MIN_SPEED, memory_bytes)
        async with self._run(job, descriptor, FileReader) as reader:
            yield reader

    @contextlib.asynccontextmanager
    async def stream(self, format_: Format, max_secs: float) -> AsyncIterator[tuple[socket.socket, Reader]]:
        """Decode a container as it arrives.

        Args:
            format_: one of ``sniff.LIVE_DEMUXERS``.
            max_secs: maximum length of the audio in seconds.

        Yields:
            A non-blocking socket for the container's bytes, to be shut down at their end, and the reader of its samples [1, n].

        Raises:
            ApiError: ``UNSUPPORTED_MEDIA``, the extra is not installed; the reader's iteration raises the errors of ``read``.
        """
        if not CONTAINERS:
            message = f"The stream is {format_.name}, which this server can't decode: {EXTRA}, or send raw audio or WAV."
            raise ApiError(ErrorKind.UNSUPPORTED_MEDIA, message)
        job = Job(format_.name, 0, True, False, max_secs, CPU_SECS, MIN_SPEED, MEMORY_BYTES)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            ours.setblocking(False)
            async with self._run(job, theirs.fileno(), LiveReader) as reader:
                theirs.close()
                yield ours, reader

    @contextlib.asynccontextmanager
    async def _run(self, job: Job, file: int, kind: type[FileReader]) -> AsyncIterator[Reader]:
        """Start a job; leaving the context ends it."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        wanted, demand = os.pipe()
        with ours, os.fdopen(demand, "wb", buffering=0) as asks:  # closing them ends the job
            ours.setblocking(False)
            server: Process | None = None

            async def start() -> None:
                nonlocal server
                server = await self._send(json.dumps(asdict(job)).encode(), [file, theirs.fileno(), wanted])

            reader = kind(job, ours, asks, self._places)
            try:
                await reader.open(start, theirs)
            except StuckError:
                await self._replace(server)
                message = f"Decoding the {job.format} file did not start within {START_SECS:g} s; please retry."
                raise ApiError(ErrorKind.NO_CAPACITY, message) from None
            finally:
                theirs.close()
                os.close(wanted)
            yield reader

    async def close(self) -> None:
        """End all decoding."""
        async with self._starting:
            await self._stop()

    async def _send(self, message: bytes, descriptors: list[int]) -> Process | None:
        """Send a job to the server, and start the server if there is none; return the server."""
        async with self._starting:
            if self._control:
                try:
                    await asyncio.wait_for(_send_fds(self._control, message, descriptors), START_SECS)
                except (OSError, asyncio.TimeoutError):
                    log.warning("file worker lost", pid=self._server and self._server.pid)
                    await self._stop()
                else:
                    return self._server
            await _send_fds(await self._start(), message, descriptors)
            return self._server

    async def _replace(self, server: Process | None) -> None:
        """End a server that takes no jobs, unless it has ended; the next file starts another."""
        async with self._starting:
            if server and server is self._server:
                log.warning("file worker stuck", pid=server.pid)
                with contextlib.suppress(ProcessLookupError):
                    server.kill()
                await self._stop()

    async def _start(self) -> socket.socket:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        with theirs:
            path = os.pathsep.join(filter(None, (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH"))))
            self._server = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "gateway.audio.worker", str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},  # forks must not have threads
            )
        log.debug("file worker started", pid=self._server.pid)
        return self._control

    async def _stop(self) -> None:
        if self._control:
            self._control.close()
            self._control = None
        if self._server:
            try:  # when its socket is closed, the server ends its forked processes, and then itself
                await asyncio.wait_for(self._server.wait(), STOP_SECS)
            except asyncio.TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._server.kill()
                await self._server.wait()
            self._server = None


@contextlib.contextmanager
def _in_memory() -> Iterator[int]:
    """Create a file in memory, and return its descriptor."""
    file = os.memfd_create("audio")
    try:
        yield file
    finally:
        os.close(file)


async def _send_fds(control: socket.socket, message: bytes, descriptors: list[int]) -> None:
    """Send a message with descriptors; wait while the socket's buffer is full of earlier ones.

    Raises:
        OSError: the other end is closed.
    """
    loop, writable = asyncio.get_running_loop(), asyncio.Event()
    while True:
        try:
            socket.send_fds(control, [message], descriptors)
        except BlockingIOError:
            loop.add_writer(control, writable.set)
            try:
                await writable.wait()
            finally:
                loop.remove_writer(control)
            writable.clear()
        else:
            return


async def _write(file: int, body: bytes) -> None:
    """Copy a body in parts, with a turn for other tasks in between."""
    for at in range(0, len(body), COPIED_BYTES):
        part = memoryview(body)[at : at + COPIED_BYTES]
        while part:
            part = part[os.write(file, part) :]
        await asyncio.sleep(0)
