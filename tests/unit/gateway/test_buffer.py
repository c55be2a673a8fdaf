"""The buffer of a stream's audio, in virtual time."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.live.buffer import ARRIVAL_SECS, AudioBuffer, BufferUsage
from gateway.triton.connection import Samples
from tests.support.virtual import run_virtual

WINDOW, MOST = 50, 200


def audio(samples: int) -> Samples:
    return np.arange(samples, dtype=np.int16)


def make_buffer(capacity: int = 5000) -> tuple[AudioBuffer, BufferUsage]:
    usage = BufferUsage(capacity)
    return AudioBuffer(capacity, usage, asyncio.get_running_loop().time), usage


def test_window_has_the_arrival_time_of_its_last_audio() -> None:
    async def scenario() -> None:
        buffer, _ = make_buffer()
        for _ in range(12):  # every second piece completes a window
            await buffer.put(audio(WINDOW // 2))
            await asyncio.sleep(1)
        arrivals = [buffer.take(most, WINDOW).arrived for most in (WINDOW, WINDOW, MOST - WINDOW)]
        assert arrivals == [1, 3, 5], "whatever came after it"
        await asyncio.sleep(8)
        await buffer.put(audio(5))
        samples, arrived = buffer.take(MOST, WINDOW)
        assert (len(samples), arrived) == (WINDOW + 5, 11)
        samples, arrived = buffer.take(MOST, WINDOW)
        assert (len(samples), arrived) == (0, 20), "the last arrival, where the window is incomplete"

    run_virtual(scenario())


def test_small_pieces_need_few_arrival_records() -> None:
    async def scenario() -> None:
        buffer, _ = make_buffer()
        for _ in range(1000):
            await buffer.put(audio(1))
            await asyncio.sleep(0.001)
        assert buffer.take(500, 500).arrived == pytest.approx(0.499, abs=ARRIVAL_SECS)
        assert len(buffer._arrivals) <= 1 / ARRIVAL_SECS

    run_virtual(scenario())


def test_audio_without_room_does_not_wait_for_a_window() -> None:
    async def scenario() -> None:
        buffer, _ = make_buffer(2 * WINDOW)
        await buffer.put(audio(WINDOW - 1))
        waiting = asyncio.create_task(buffer.put(audio(2 * WINDOW)))
        await buffer.gather(WINDOW, 60)
        assert len(buffer.take(MOST, WINDOW).samples) == WINDOW - 1
        await waiting
        await buffer.gather(WINDOW, 60)
        assert len(buffer.take(MOST, WINDOW).samples) == 2 * WINDOW
        assert asyncio.get_running_loop().time() == 0

    run_virtual(scenario())


def test_audio_longer_than_the_buffer_passes() -> None:
    async def scenario() -> None:
        buffer, usage = make_buffer(2 * WINDOW)
        waiting = asyncio.create_task(buffer.put(audio(5 * WINDOW + 1)))
        parts: list[Samples] = []
        while sum(map(len, parts)) < 5 * WINDOW + 1:
            await buffer.gather(WINDOW, 1)
            assert usage.used <= usage.capacity
            parts.append(buffer.take(MOST, WINDOW).samples)
        await waiting
        assert np.array_equal(np.concatenate(parts), audio(5 * WINDOW + 1))

    run_virtual(scenario())


def test_clear_drops_audio_and_wakes_both_sides() -> None:
    async def scenario() -> None:
        buffer, usage = make_buffer(WINDOW)
        await buffer.put(audio(WINDOW))
        waiting = asyncio.create_task(buffer.put(audio(3 * WINDOW)))
        await asyncio.sleep(0)
        buffer.clear()
        await waiting
        await buffer.put(audio(3 * WINDOW))
        await buffer.gather(WINDOW, 60)
        assert (len(buffer), usage.used, usage.share()) == (0, 0, 0.0)
        assert asyncio.get_running_loop().time() == 0

    run_virtual(scenario())


def test_arrival_time_does_not_wait_for_room() -> None:
    async def scenario() -> None:
        buffer, _ = make_buffer(WINDOW)
        await buffer.put(audio(WINDOW))
        await asyncio.sleep(1)
        waiting = asyncio.create_task(buffer.put(audio(WINDOW)))
        await asyncio.sleep(1)
        buffer.take(WINDOW, WINDOW)
        await waiting
        assert buffer.take(WINDOW, WINDOW).arrived == 1

    run_virtual(scenario())


def test_closed_buffer_keeps_its_audio_and_accepts_no_more() -> None:
    """Otherwise a client that continues to send would delay the final."""

    async def scenario() -> None:
        buffer, usage = make_buffer()
        await buffer.put(audio(WINDOW))
        buffer.close()
        await buffer.put(audio(WINDOW))
        await buffer.gather(2 * WINDOW, 60)
        assert len(buffer.take(MOST, WINDOW).samples) == WINDOW
        assert usage.used == 0

    run_virtual(scenario())


@pytest.mark.parametrize("enough", [1, WINDOW])
def test_gather_ends_at_its_timeout(enough: int) -> None:
    async def scenario() -> None:
        buffer, _ = make_buffer()
        await buffer.gather(enough, 7)
        assert asyncio.get_running_loop().time() == 7

    run_virtual(scenario())


def test_reader_is_woken_only_when_there_is_enough() -> None:
    async def scenario() -> int:
        buffer, _ = make_buffer()
        loop, turns = asyncio.get_running_loop(), 0
        gathering = asyncio.create_task(buffer.gather(WINDOW, 60))
        await asyncio.sleep(0)
        wake = buffer._filled.set

        def count() -> None:
            nonlocal turns
            turns += 1
            wake()

        buffer._filled.set = count  # type: ignore[method-assign]
        for _ in range(WINDOW):
            await buffer.put(audio(1))
            await asyncio.sleep(0.01)
        await gathering
        assert loop.time() < 60
        return turns

    assert run_virtual(scenario()) == 1


@given(
    capacity=st.integers(1, 300),
    pieces=st.lists(st.tuples(st.integers(1, 700), st.floats(0, 0.2)), max_size=20),
    window=st.integers(1, 200),
    most=st.integers(1, 400),
)
def test_nothing_is_lost_or_reordered(capacity: int, pieces: list[tuple[int, float]], window: int, most: int) -> None:
    async def scenario() -> None:
        buffer, usage = make_buffer(capacity)
        loop = asyncio.get_running_loop()
        given_audio = audio(sum(size for size, _ in pieces))

        async def write() -> None:
            start = 0
            for size, pause in pieces:
                await buffer.put(given_audio[start : start + size])
                start += size
                await asyncio.sleep(pause)
            buffer.close()

        writing = asyncio.create_task(write())
        taken: list[Samples] = []
        arrivals: list[float] = []
        while not (buffer.closed and not len(buffer)):
            await buffer.gather(window, 0.05)
            assert usage.used == len(buffer) <= capacity
            samples, arrived = buffer.take(most, window)
            assert arrived <= loop.time()
            taken.append(samples)
            arrivals.append(arrived)
        await writing
        assert np.array_equal(np.concatenate([audio(0), *taken]), given_audio)
        assert arrivals == sorted(arrivals)
        assert usage.used == 0

    run_virtual(scenario())
