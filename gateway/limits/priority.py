"""Give live streams in real time priority over streams that are sent faster.

Requests of streams in real time are sent at once. Streams ahead of real time send one request at a time, followed by a pause of
the request's duration. They send only while no stream in real time has a request at Triton, and while such requests recently
took at most ``MAX_BUSY_SHARE`` of the time.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

MAX_BUSY_SHARE = 0.3
"""Share of time with a real-time request at Triton above which streams ahead of real time wait."""

BUSY_MEAN_SECS = 5.0
"""Time constant of the exponential mean of that share, in seconds."""

BUSY_POLL_SECS = 0.1
"""Interval at which a waiting stream checks that share, in seconds."""


@dataclass(eq=False)
class Member:
    """A stream.

    Attributes:
        ahead: whether its last request was ahead of real time.
    """

    ahead: bool = False


class Priority:
    """Orders the requests of all streams.

    Args:
        clock: returns monotonic seconds, as the event loop's clock.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._members: set[Member] = set()
        self._ahead = 0
        self._line = asyncio.Lock()  # held by the stream ahead of real time whose turn it is
        self._next_turn_at = 0.0
        self._real_time_requests = 0
        self._busy_share = 0.0
        self._busy_as_of = clock()
        self._calm = asyncio.Event()  # no stream in real time has a request at Triton
        self._calm.set()

    def join(self) -> Member:
        """Add a stream."""
        member = Member()
        self._members.add(member)
        return member

    def leave(self, member: Member) -> None:
        """Remove a stream."""
        self._set_ahead(member, False)
        self._members.discard(member)

    @property
    def crowded(self) -> bool:
        """Whether any stream is in real time."""
        return len(self._members) > self._ahead

    @asynccontextmanager
    async def turn(self, member: Member, ahead_secs: float) -> AsyncIterator[None]:
        """Wait until a stream may send a request, and hold its turn while the request is at Triton.

        Args:
            member: the stream.
            ahead_secs: lead of the stream over real time after the request, in seconds; at 0 or less it does not wait. A stream
                waits at most this long, because then it is in real time again.
        """
        self._set_ahead(member, ahead_secs > 0)
        if not member.ahead:
            async with self._at_once():
                yield
        elif not self.crowded:
            yield
        else:
            async with self._in_line(ahead_secs):
                yield

    @asynccontextmanager
    async def _at_once(self) -> AsyncIterator[None]:
        self._busy_now()
        self._real_time_requests += 1
        self._calm.clear()
        try:
            yield
        finally:
            self._busy_now()
            self._real_time_requests -= 1
            if not self._real_time_requests:
                self._calm.set()

    @asynccontextmanager
    async def _in_line(self, ahead_secs: float) -> AsyncIterator[None]:
        try:
            await asyncio.wait_for(self._take_turn(), ahead_secs)
        except asyncio.TimeoutError:  # the stream is in real time again
            async with self._at_once():
                yield
            return
        began = self._clock()
        try:
            yield
        finally:
            now = self._clock()
            self._next_turn_at = now + (now - began)
            self._line.release()

    async def _take_turn(self) -> None:
        await self._line.acquire()
        try:
            await asyncio.sleep(self._next_turn_at - self._clock())
            await self._calm.wait()
            while self._busy_now() > MAX_BUSY_SHARE:
                await asyncio.sleep(BUSY_POLL_SECS)
                await self._calm.wait()
        except asyncio.CancelledError:
            self._line.release()
            raise

    def _busy_now(self) -> float:
        """Return the recent share of time with a real-time request at Triton, 0 … 1."""
        now = self._clock()
        old = math.exp((self._busy_as_of - now) / BUSY_MEAN_SECS)
        self._busy_share = old * self._busy_share + (1 - old) * (self._real_time_requests > 0)
        self._busy_as_of = now
        return self._busy_share

    def _set_ahead(self, member: Member, ahead: bool) -> None:
        self._ahead += ahead - member.ahead
        member.ahead = ahead
