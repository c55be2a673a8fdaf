"""Buffer for the audio of a stream between arrival and decoding."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gateway.audio import BYTES_PER_SAMPLE
from gateway.triton.connection import Samples

ARRIVAL_SECS = 0.01
"""Resolution of arrival times, in seconds; a record for each small piece would be larger than the piece."""


@dataclass
class BufferUsage:
    """Total use of the buffers of all streams.

    Attributes:
        capacity: total capacity in samples.
        used: samples in the buffers.
    """

    capacity: int
    used: int = 0

    def share(self) -> float:
        """Return the share in use, 0 … 1."""
        return self.used / self.capacity


class Taken(NamedTuple):
    """Audio taken from the buffer.

    Attributes:
        samples: 16 kHz audio [n].
        arrived: arrival of the audio that completes the window, or of the last audio if the window is incomplete, on the clock.
    """

    samples: Samples
    arrived: float


class AudioBuffer:
    """A bounded buffer with one writer and one reader.

    Args:
        capacity: maximum number of samples.
        usage: total use, updated with this buffer's.
        clock: returns monotonic seconds.

    Attributes:
        closed: whether no more audio is accepted.
    """

    def __init__(self, capacity: int, usage: BufferUsage, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self._half = (capacity + 1) // 2  # enough for any reader, even with a larger window, so that the writer need not wait
        self._usage = usage
        self._clock = clock
        self._audio = bytearray()  # small pieces as separate arrays would be mostly overhead
        self._size = 0  # samples in it
        # Each event is cleared only by its one waiter, just before it checks the condition, so no change is missed.
        self._filled = asyncio.Event()
        self._wanted = 0  # samples for which the reader waits
        self._emptied = asyncio.Event()
        self._overflows = False  # audio waits for room
        self._taken = 0  # samples since the start
        self._arrivals: deque[tuple[int, float]] = deque()  # (first sample, arrival of the audio from there on)
        self._note_from = -math.inf  # time from which the next arrival is recorded
        self.closed = False

    def __len__(self) -> int:
        """Number of samples in the buffer."""
        return self._size

    def offer(self, samples: Samples) -> bool:
        """Append contiguous audio [n] if there is room; return whether there was. After ``close`` it is dropped."""
        if self._size + len(samples) > self._capacity:
            return False
        self._append(samples, self._clock())
        return True

    async def put(self, samples: Samples) -> None:
        """Append contiguous audio [n]; wait while there is no room. After ``close`` it is dropped."""
        arrived = self._clock()
        for start in range(0, len(samples), self._capacity):
            piece = samples[start : start + self._capacity]
            while self._size + len(piece) > self._capacity:
                self._emptied.clear()
                self._overflows = True
                self._filled.set()
                await self._emptied.wait()
            self._append(piece, arrived)

    def _append(self, samples: Samples, arrived: float) -> None:
        if self.closed:
            return
        if arrived >= self._note_from:
            self._arrivals.append((self._taken + self._size, arrived))
            self._note_from = arrived + ARRIVAL_SECS
        self._audio.extend(samples.data)
        self._usage.used += len(samples)
        self._size += len(samples)
        if self._size >= self._wanted:
            self._filled.set()

    def close(self) -> None:
        """Accept no more audio."""
        self.closed = True
        self._filled.set()

    def clear(self) -> None:
        """Drop all audio, and accept no more."""
        self._usage.used -= self._size
        self._size = 0
        self._audio.clear()
        self._emptied.set()
        self.close()

    async def gather(self, enough: int, timeout_secs: float) -> None:
        """Wait until there are ``enough`` samples, the buffer is full or closed, or the timeout has passed."""
        self._wanted = enough = min(enough, self._half)
        self._filled.clear()
        if self._has(enough):
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_secs
        timer = loop.call_at(deadline, self._filled.set)
        try:
            while not self._has(enough) and loop.time() < deadline:
                await self._filled.wait()
                self._filled.clear()
        finally:
            timer.cancel()

    def take(self, most: int, window: int) -> Taken:
        """Take audio from the front.

        Args:
            most: maximum number of samples to take.
            window: number of samples that complete the window.
        """
        while len(self._arrivals) > 1 and self._arrivals[1][0] < self._taken + min(window, self._half):
            self._arrivals.popleft()
        arrived = self._arrivals[0][1] if self._arrivals else self._clock()
        samples = np.frombuffer(self._audio[: most * BYTES_PER_SAMPLE], "<i2")
        del self._audio[: most * BYTES_PER_SAMPLE]
        self._taken += len(samples)
        self._size -= len(samples)
        self._usage.used -= len(samples)
        self._overflows = False
        self._emptied.set()
        return Taken(samples, arrived)

    def _has(self, enough: int) -> bool:
        return self._size >= enough or self._overflows or self.closed
