"""The buffer between a stream's reader and its pump."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from gateway.api import native_websocket
from gateway.api.native_websocket import AudioBuffer, End
from gateway.service import BufferUsage

WINDOW, MOST = 100, 400


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(native_websocket, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return lambda seconds: setattr(clock, "now", seconds)


async def test_it_tells_when_each_window_was_complete(at: Callable[[float], None]) -> None:
    buffer = AudioBuffer(10_000, BufferUsage(10_000))
    for second in range(12):  # a window is complete with every second frame
        at(second)
        await buffer.put(bytes(WINDOW // 2))
    arrivals = [(await buffer.take(WINDOW, most, 0))[1] for most in (WINDOW, WINDOW, MOST - WINDOW)]
    assert arrivals == [1, 3, 5], "however much came after it"
    at(20)
    await buffer.put(bytes(10))
    audio, arrived, _ = await buffer.take(WINDOW, MOST, 0)
    assert (len(audio), arrived) == (WINDOW + 10, 11)
    audio, arrived, _ = await buffer.take(WINDOW, MOST, 0)
    assert (audio, arrived) == (b"", 20), "what came last, where it is not enough"


async def test_many_small_frames_have_few_notes(at: Callable[[float], None]) -> None:
    buffer = AudioBuffer(10_000, BufferUsage(10_000))
    for frame in range(1000):
        at(frame / 1000)
        await buffer.put(bytes(2))
    assert (await buffer.take(1000, 1000, 0))[1] == pytest.approx(0.499, abs=native_websocket.ARRIVAL_SECS)
    assert len(buffer._arrivals) <= 1 / native_websocket.ARRIVAL_SECS


async def test_a_frame_that_has_no_room_does_not_wait_for_a_window() -> None:
    buffer = AudioBuffer(2 * WINDOW, BufferUsage(2 * WINDOW))
    await buffer.put(bytes(WINDOW - 2))
    waiting = asyncio.create_task(buffer.put(bytes(2 * WINDOW)))
    audio, _, _ = await asyncio.wait_for(buffer.take(WINDOW, MOST, 60), 1)
    assert len(audio) == WINDOW - 2
    audio, _, _ = await asyncio.wait_for(buffer.take(WINDOW, MOST, 60), 1)
    assert len(audio) == 2 * WINDOW
    await waiting


async def test_nothing_is_held_for_who_is_gone() -> None:
    usage = BufferUsage(WINDOW)
    buffer = AudioBuffer(WINDOW, usage)
    await buffer.put(bytes(WINDOW))
    waiting = asyncio.create_task(buffer.put(bytes(WINDOW)))
    await asyncio.sleep(0)
    buffer.close(End.ABANDONED)
    await waiting
    assert usage.used_bytes == 0


async def test_audio_arrives_before_there_is_room_for_it(at: Callable[[float], None]) -> None:
    buffer = AudioBuffer(WINDOW, BufferUsage(WINDOW))
    await buffer.put(bytes(WINDOW))
    at(1)
    waiting = asyncio.create_task(buffer.put(bytes(WINDOW)))
    await asyncio.sleep(0)
    at(2)
    await buffer.take(WINDOW, WINDOW, 0)
    await waiting
    assert (await buffer.take(WINDOW, WINDOW, 0))[1] == 1


async def test_nothing_is_taken_after_the_last_call() -> None:
    """Or a client that sends on would keep the final from coming."""
    usage = BufferUsage(10_000)
    buffer = AudioBuffer(10_000, usage)
    await buffer.put(bytes(WINDOW))
    buffer.close(End.DRAIN)
    await buffer.put(bytes(WINDOW))
    audio, _, end = await buffer.take(WINDOW, WINDOW, 60)
    assert (len(audio), end) == (WINDOW, End.DRAIN)
    assert usage.used_bytes == 0
