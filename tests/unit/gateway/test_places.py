"""Places for streams and recordings, and the queue of recordings; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.limits.places import MAX_QUEUE_SECS, CallerGoneError, Places
from tests.support.virtual import run_virtual


def places(**settings: int) -> Places:
    return Places(Settings.model_validate(settings))


async def stays() -> None:
    """A caller that never leaves."""
    await asyncio.Event().wait()


async def decode(held: Places, secs: float, caller_gone: Callable[[], Awaitable[object]] = stays) -> float:
    """Decode for some time; return when that began."""
    async with held.decoding(caller_gone):
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(secs)
        return began


def test_more_streams_than_places_are_refused() -> None:
    limited = places(max_concurrent_streams=1)
    with limited.stream():
        with pytest.raises(ApiError) as refused, limited.stream():
            pass
        assert refused.value.kind is ErrorKind.NO_CAPACITY
    with limited.stream():
        assert limited.streams == 1
    assert limited.streams == 0


def test_more_recordings_than_can_wait_are_refused() -> None:
    limited = places(max_concurrent_batches=1, inference_queue_size=1)
    with limited.batch(), limited.batch():
        with pytest.raises(ApiError) as refused, limited.batch():
            pass
        assert refused.value.kind is ErrorKind.NO_CAPACITY


def test_a_drain_refuses_everything_and_waits_until_idle() -> None:
    async def scenario() -> None:
        limited = places()
        with limited.stream():
            limited.drain()
            for place in (limited.stream, limited.batch):
                with pytest.raises(ApiError) as refused, place():
                    pass
                assert refused.value.kind is ErrorKind.DRAINING
            assert not await limited.wait_idle(5)
            assert asyncio.get_running_loop().time() == 5
        assert await limited.wait_idle(5)

    run_virtual(scenario())


def test_recordings_wait_for_a_place_in_order() -> None:
    async def scenario() -> list[float]:
        limited = places(max_concurrent_batches=1)
        return await asyncio.gather(*(decode(limited, 2) for _ in range(3)))

    assert run_virtual(scenario()) == [0, 2, 4]


def test_a_recording_does_not_wait_for_ever() -> None:
    async def scenario() -> None:
        limited = places(max_concurrent_batches=1)
        first = asyncio.create_task(decode(limited, 100))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="30 s") as late:
            await decode(limited, 1)
        assert late.value.kind is ErrorKind.NO_CAPACITY
        assert asyncio.get_running_loop().time() == MAX_QUEUE_SECS
        await first
        assert await decode(limited, 1) == 100

    run_virtual(scenario())


def test_a_caller_that_leaves_ends_its_wait() -> None:
    async def scenario() -> None:
        limited = places(max_concurrent_batches=1)
        first = asyncio.create_task(decode(limited, 10))
        await asyncio.sleep(0)
        with pytest.raises(CallerGoneError):
            await decode(limited, 1, lambda: asyncio.sleep(3))
        assert asyncio.get_running_loop().time() == 3
        assert await first == 0
        assert await decode(limited, 1) == 10

    run_virtual(scenario())


@pytest.mark.parametrize("place_comes_first", [False, True])
def test_a_cancelled_wait_loses_no_place(*, place_comes_first: bool) -> None:
    """Even if the place came free in the same turn of the event loop."""

    async def scenario() -> None:
        limited = places(max_concurrent_batches=1)
        waiting: asyncio.Task[float] | None = None

        async def first() -> None:
            async with limited.decoding(stays):
                await asyncio.sleep(1)
            if place_comes_first:
                assert waiting
                waiting.get_loop().call_soon(waiting.cancel)

        holder = asyncio.create_task(first())
        await asyncio.sleep(0)
        waiting = asyncio.create_task(decode(limited, 1))
        await asyncio.sleep(0.5)
        if not place_comes_first:
            waiting.cancel()
        await asyncio.gather(holder, waiting, return_exceptions=True)
        assert waiting.cancelled()
        assert await asyncio.wait_for(decode(limited, 1), 5) < 5

    run_virtual(scenario())
