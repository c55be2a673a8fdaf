"""Decode files in processes of their own, so that no file stops anything but itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from gateway.audio.jobs import DIED, DONE, FAILED, MAX_MESSAGE_BYTES, SAMPLES, Failure, Job
from gateway.audio.media_types import identify_body
from gateway.audio.raw import read_pcm
from gateway.audio.sniff import RAW, Content
from gateway.errors import ApiError, ErrorKind

MIN_PLACES = 2
"""Files decoded at once on a machine with one CPU, so that one slow file does not delay all others."""

CPU_SECS, MIN_SPEED = 2.0, 50.0
"""Limit of CPU time: a fixed part, and the maximum length of audio divided by the slowest decoding, relative to real time.

FLAC, Opus and Vorbis are decoded and resampled 300 to 1000 times faster than real time."""

WALL_FACTOR = 10.0
"""Limit of elapsed time, relative to that of CPU time; a busy machine gives a process a part of a CPU."""

MEMORY_BYTES, MEMORY_PER_BYTE = 128 * 2**20, 4
"""Limit of memory: a fixed part, and a multiple of the file's size, which is copied twice."""

COPIED_BYTES = 2**20
"""Part of a file that is copied before other tasks get a turn; copying it takes less than a millisecond."""

PACKAGE_ROOT = Path(__file__).parents[2]

log = structlog.get_logger()


class FilePool:
    """Decodes audio of any kind; files in processes of their own, which end with the request that they work for.

    The first file starts a server, ``worker``, that forks for each file.

    Args:
        places: maximum number of files decoded at once; as a rule the number of CPUs.
    """

    def __init__(self, places: int | None = None) -> None:
        self._places = asyncio.Semaphore(places or max(MIN_PLACES, len(os.sched_getaffinity(0))))
        self._starting = asyncio.Lock()
        self._server: Process | None = None
        self._control: socket.socket | None = None

    async def decode(self, body: bytes, content_type: str, max_secs: float) -> NDArray[np.int16]:
        """Decode a body to 16 kHz mono samples. Raw PCM waits for nothing.

        Args:
            body: the whole body.
            content_type: its media type, as in ``media_types.identify_body``.
            max_secs: maximum length of the audio in seconds.

        Returns:
            Samples [n], at least one. Read-only for raw PCM, which shares the body's memory.

        Raises:
            ApiError: the body is not decodable audio, is longer than allowed, or costs too much to decode.
        """
        content = identify_body(body, content_type)
        if content.format == RAW:
            return read_pcm(body, max_secs)
        async with self._places:
            return await self._decode_file(body, content, max_secs)

    async def close(self) -> None:
        """End all decoding."""
        async with self._starting:
            await self._stop()

    async def _decode_file(self, body: bytes, content: Content, max_secs: float) -> NDArray[np.int16]:
        cpu_secs = math.ceil(CPU_SECS + max_secs / MIN_SPEED)
        job = Job(content.format.name, content.start, max_secs, cpu_secs, MEMORY_BYTES + MEMORY_PER_BYTE * len(body))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:  # closing it ends the job
            ours.setblocking(False)
            with theirs, _in_memory() as file:
                await _write(file, body)
                await self._send(json.dumps(asdict(job)).encode(), [file, theirs.fileno()])
            try:
                return await asyncio.wait_for(_receive(ours, job), WALL_FACTOR * cpu_secs)
            except asyncio.TimeoutError:
                message = f"The file was not decoded within {WALL_FACTOR * cpu_secs:g} s. The server is busy; please retry."
                raise ApiError(ErrorKind.NO_CAPACITY, message) from None

    async def _send(self, message: bytes, descriptors: list[int]) -> None:
        """Give a job to the server, and start the server where there is none."""
        async with self._starting:
            if self._control:
                try:
                    socket.send_fds(self._control, [message], descriptors)
                except OSError:
                    log.warning("file worker lost", pid=self._server and self._server.pid)
                    await self._stop()
                else:
                    return
            socket.send_fds(await self._start(), [message], descriptors)

    async def _start(self) -> socket.socket:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
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
            with contextlib.suppress(ProcessLookupError):
                self._server.kill()
            await self._server.wait()
            self._server = None


@contextlib.contextmanager
def _in_memory() -> Iterator[int]:
    """Make a file in memory; gives its descriptor."""
    file = os.memfd_create("audio")
    try:
        yield file
    finally:
        os.close(file)


async def _write(file: int, body: bytes) -> None:
    """Copy a body, and let other tasks run in between."""
    for at in range(0, len(body), COPIED_BYTES):
        part = memoryview(body)[at : at + COPIED_BYTES]
        while part:
            part = part[os.write(file, part) :]
        await asyncio.sleep(0)


async def _receive(answer: socket.socket, job: Job) -> NDArray[np.int16]:
    """Collect the samples that a decoding process sends.

    Raises:
        ApiError: it sends none, or not all.
    """
    loop = asyncio.get_running_loop()
    samples = bytearray()
    while message := await loop.sock_recv(answer, MAX_MESSAGE_BYTES):
        kind, content = message[:1], message[1:]
        if kind == SAMPLES:
            samples += content
        elif kind == DONE:
            return np.frombuffer(samples, np.int16)
        elif kind == FAILED:
            failure = Failure(**json.loads(content))
            raise ApiError(ErrorKind[failure.kind], failure.message, failure.param)
        elif kind == DIED:
            raise _explain(-int(content), job)
    raise _explain(0, job)


def _explain(died_of: int, job: Job) -> ApiError:
    """Return the error for a process that ended without an answer.

    Args:
        died_of: the signal that ended it; 0 or less where none did.
        job: what it worked on.
    """
    log.warning("file worker died", signal=died_of, format=job.format)
    if died_of in (signal.SIGXCPU, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL):
        problem = f"takes more than {job.cpu_secs} s of CPU time to decode" if died_of == signal.SIGXCPU else "is damaged"
        return ApiError(ErrorKind.UNDECODABLE_AUDIO, f"The {job.format} file {problem}.")
    return ApiError(ErrorKind.NO_CAPACITY, "Decoding the file was interrupted; please retry.")
