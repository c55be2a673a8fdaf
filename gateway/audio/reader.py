"""Read the samples of one recording, block by block."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from io import FileIO

import numpy as np
import structlog

from gateway.audio import RATE
from gateway.audio.body import Slices
from gateway.audio.convert import Pcm
from gateway.audio.jobs import DIED, DONE, FAILED, MAX_MESSAGE_BYTES, MORE, OPENED, PAUSED, SAMPLES, Failure, Job
from gateway.audio.raw import RawFormat, read_raw
from gateway.errors import ApiError, ErrorKind

WALL_FACTOR = 10.0
"""Limit of elapsed time, as a multiple of the limit of CPU time; on a busy machine a process gets only a part of a CPU.

Time between two batches, while nothing is read, does not count."""

RAW_BATCH_SECS = 10
"""Raw audio that a thread reads at once, in seconds; with less, changing threads would take longer than reading."""

START_SECS = 15.0
"""Timeout for the server to take a job, even just after its start; after it the server is stuck."""

log = structlog.get_logger()


class StuckError(Exception):
    """The server of the decoding processes does not take jobs."""


class Reader(ABC):
    """Reads the samples of one recording, once.

    Attributes:
        channels: number of channels; 1 where they are mixed.
    """

    channels = 1

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[Pcm]:
        """Iterate over blocks [channels, n] of about a second.

        Raises:
            ApiError: the rest is not decodable, or is longer than allowed.
        """


class RawReader(Reader):
    """Reads raw audio; from a file in a thread, since the disk may be slow.

    Args:
        body: whole frames.
        format_: format of the body.
        separate: whether to keep the channels.
    """

    def __init__(self, body: Slices, format_: RawFormat, *, separate: bool) -> None:
        self.channels = format_.channels if separate else 1
        self._in_memory = isinstance(body, bytes)
        self._blocks = read_raw(body, format_, separate=separate)

    async def __aiter__(self) -> AsyncIterator[Pcm]:
        """Iterate."""
        if self._in_memory:
            for block in self._blocks:
                if block.size:
                    yield block
            return
        while batch := await asyncio.to_thread(self._read_batch):
            for block in batch:
                if block.size:
                    yield block

    def _read_batch(self) -> list[Pcm]:
        return list(itertools.islice(self._blocks, RAW_BATCH_SECS))


class FileReader(Reader):
    """Reads the samples from a decoding process, batch by batch; the process holds a place while it decodes.

    Args:
        job: the job of the process.
        answer: socket with the messages of the process.
        demand: pipe for requests of the next batch.
        places: limits the number of processes that decode at once.
    """

    def __init__(
        self,
        job: Job,
        answer: socket.socket,
        demand: FileIO,
        places: asyncio.Semaphore,
    ) -> None:
        self._job = job
        self._answer = answer
        self._demand = demand
        self._places = places
        self._blocks: deque[Pcm] = deque()
        self._complete = False
        self._decoded_secs = 0.0
        self._waited_secs = 0.0

    async def open(self, start: Callable[[], Awaitable[None]], theirs: socket.socket) -> None:
        """Start the process, and read the first batch.

        Args:
            start: starts the process.
            theirs: the process's end of ``answer``, which is closed here.

        Raises:
            ApiError: there is no audio.
            StuckError: the server did not take the job.
        """
        async with self._places:
            await self._start(start, theirs)
            await self._receive_batch()

    async def _start(self, start: Callable[[], Awaitable[None]], theirs: socket.socket) -> None:
        await start()
        theirs.close()  # otherwise the end of the process would not be noticed
        receiving = asyncio.get_running_loop().sock_recv(self._answer, MAX_MESSAGE_BYTES)
        try:
            message = await asyncio.wait_for(receiving, START_SECS)
        except asyncio.TimeoutError:
            raise StuckError from None
        self._take(message[:1], message[1:])

    async def __aiter__(self) -> AsyncIterator[Pcm]:
        """Iterate."""
        while True:
            while self._blocks:
                yield self._blocks.popleft()
            if self._complete:
                return
            async with self._places:
                with contextlib.suppress(BrokenPipeError):  # the last message has the reason
                    self._demand.write(MORE)
                await self._receive_batch()

    async def _receive_batch(self) -> None:
        began = time.monotonic()
        while True:
            limit = WALL_FACTOR * self._job.cpu_limit(self._decoded_secs)
            left = limit - self._waited_secs - (time.monotonic() - began)
            try:
                message = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self._answer, MAX_MESSAGE_BYTES), left)
            except asyncio.TimeoutError:
                text = f"The file was not decoded within {limit:g} s. The server is busy; please retry."
                raise ApiError(ErrorKind.NO_CAPACITY, text) from None
            if self._take(message[:1], message[1:]):
                break
        self._waited_secs += time.monotonic() - began

    def _take(self, kind: bytes, content: bytes) -> bool:
        """Handle a message; return whether it is the last one of a batch."""
        if kind == OPENED:
            self.channels = int(content)
        elif kind == SAMPLES:
            block = np.frombuffer(content, np.int16).reshape(-1, self.channels).T
            self._decoded_secs += block.shape[1] / RATE
            self._blocks.append(block)
        elif kind == FAILED:
            failure = Failure(**json.loads(content))
            raise ApiError(ErrorKind[failure.kind], failure.message, failure.param)
        elif kind == DIED or not kind:
            raise self._explain(-int(content or 0))
        self._complete = kind == DONE
        return kind in (PAUSED, DONE)

    def _explain(self, died_of: int) -> ApiError:
        """Return the error for a process that ended without an answer.

        Args:
            died_of: signal that ended the process; 0 or less if none did.
        """
        log.warning("file worker died", signal=died_of, format=self._job.format)
        if died_of in (signal.SIGXCPU, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL):
            cpu_secs = self._job.cpu_limit(self._decoded_secs)
            problem = f"takes more than {cpu_secs} s of CPU time to decode" if died_of == signal.SIGXCPU else "is damaged"
            return ApiError(ErrorKind.UNDECODABLE_AUDIO, f"The {self._job.format} file {problem}.")
        return ApiError(ErrorKind.NO_CAPACITY, "Decoding the file was interrupted; please retry.")


class LiveReader(FileReader):
    """Reads the samples of a live stream from a decoding process, as they are decoded."""

    async def open(self, start: Callable[[], Awaitable[None]], theirs: socket.socket) -> None:
        """Start the process; it needs no place, since it decodes in real time."""
        await self._start(start, theirs)

    async def __aiter__(self) -> AsyncIterator[Pcm]:
        """Iterate."""
        loop = asyncio.get_running_loop()
        while not self._complete:
            message = await loop.sock_recv(self._answer, MAX_MESSAGE_BYTES)
            self._take(message[:1], message[1:])
            while self._blocks:
                yield self._blocks.popleft()
