"""The queue of a session's events."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from prometheus_client import Histogram

from gateway.live.events import Event, SpeechStarted, SpeechStopped
from gateway.live.outbox import Outbox


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def outbox(clock: Clock) -> Outbox:
    return Outbox(clock)


async def rest(outbox: Outbox) -> list[Event]:
    events = []
    with contextlib.suppress(StopAsyncIteration):
        while True:
            events.append(await outbox.take())
    return events


async def test_events_come_in_their_order_up_to_the_end(outbox: Outbox) -> None:
    outbox.put(SpeechStarted(1))
    outbox.put(SpeechStopped(2))
    outbox.end()
    assert await rest(outbox) == [SpeechStarted(1), SpeechStopped(2)]


async def test_event_after_the_end_is_dropped(outbox: Outbox) -> None:
    outbox.end()
    outbox.put(SpeechStarted(1))
    assert await rest(outbox) == []
    await asyncio.wait_for(outbox.wait_delivered(), 1)


async def test_cleared_events_do_not_come(outbox: Outbox) -> None:
    outbox.put(SpeechStarted(1))
    outbox.clear()
    outbox.put(SpeechStopped(2))
    outbox.end()
    assert await rest(outbox) == [SpeechStopped(2)]


async def test_event_is_delivered_when_the_next_one_is_asked_for(outbox: Outbox) -> None:
    outbox.put(SpeechStarted(1))
    assert await outbox.take() == SpeechStarted(1)
    waiting = asyncio.create_task(outbox.wait_delivered())
    await asyncio.sleep(0)
    assert not waiting.done()
    asking = asyncio.create_task(outbox.take())
    await asyncio.wait_for(waiting, 1)
    outbox.put(SpeechStopped(2))
    assert await asyncio.wait_for(asking, 1) == SpeechStopped(2)


async def test_end_wakes_the_consumer_and_whoever_waits_for_delivery(outbox: Outbox) -> None:
    outbox.put(SpeechStarted(1))
    waiting = asyncio.create_task(outbox.wait_delivered())
    await asyncio.sleep(0)
    outbox.end()
    await asyncio.wait_for(waiting, 1)
    assert await rest(outbox) == [SpeechStarted(1)]


async def test_latency_ends_with_the_delivery(outbox: Outbox, clock: Clock) -> None:
    latency = Histogram("latency", "", buckets=(1.0, 2.0, 4.0), registry=None)
    outbox.put(SpeechStarted(1), latency, since=1.0)
    clock.now = 2.0
    await outbox.take()
    clock.now = 4.0
    outbox.end()
    assert await rest(outbox) == []
    assert latency._sum.get() == pytest.approx(3.0)
