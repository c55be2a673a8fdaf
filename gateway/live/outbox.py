"""Events of a session between publication and delivery."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from prometheus_client import Histogram

from gateway.live.events import Event


class _Published(NamedTuple):
    """An event, and the histogram that observes the time from ``since`` to its delivery."""

    event: Event
    latency: Histogram | None
    since: float


class Outbox:
    """Queue with one consumer. An event is delivered when the consumer asks for the next one.

    Args:
        clock: returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._events: deque[_Published] = deque()
        self._delivering: _Published | None = None
        self._ended = False
        self._published = asyncio.Event()
        self._delivered = asyncio.Event()
        self._delivered.set()

    def put(self, event: Event, latency: Histogram | None = None, since: float = 0.0) -> None:
        """Append an event. After ``end`` it is dropped.

        Args:
            event: the event.
            latency: observes the time to the event's delivery; None for no observation.
            since: start of that time, on the clock.
        """
        if self._ended:
            return
        self._events.append(_Published(event, latency, since))
        self._delivered.clear()
        self._published.set()

    def clear(self) -> None:
        """Drop the events that the consumer has not got."""
        self._events.clear()

    def end(self) -> None:
        """End after the events that are queued, and wait for no delivery any more."""
        self._ended = True
        self._published.set()
        self._delivered.set()

    async def wait_delivered(self) -> None:
        """Wait until every event is delivered, or the outbox has ended."""
        await self._delivered.wait()

    async def take(self) -> Event:
        """Return the next event; the one before it is then delivered.

        Raises:
            StopAsyncIteration: the outbox has ended, and no event is left.
        """
        if self._delivering and self._delivering.latency:
            self._delivering.latency.observe(self._clock() - self._delivering.since)
        self._delivering = None
        while not self._events:
            self._delivered.set()
            if self._ended:
                raise StopAsyncIteration
            self._published.clear()
            await self._published.wait()
        self._delivering = self._events.popleft()
        return self._delivering.event
