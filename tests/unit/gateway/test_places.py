"""Places for streams and recordings, and the queue of recordings; in virtual time."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.limits.places import MAX_QUEUE_SECS, Place, Places, Share
from tests.support.virtual import run_virtual


def places(**settings: int) -> Places:
    return Places(Settings.model_validate(settings))


async def decode(held: Places, secs: float, share: Share | None = None) -> float:
    """Decode a piece for some time; return the start time."""
    place = await held.decoding(share or Share())
    try:
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(secs)
    finally:
        place.release()
    return began


async def decode_all(held: Places, pieces: int, secs: float = 1.0) -> list[float]:
    """Decode the pieces of one recording in the places that it gets; return the start time of each."""
    share, began, work = Share(), [], []

    async def end(place: Place) -> None:
        await asyncio.sleep(secs)
        place.release()

    for _ in range(pieces):
        place = await held.decoding(share)
        began.append(asyncio.get_running_loop().time())
        work.append(asyncio.create_task(end(place)))
    await asyncio.wait(work)
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


def test_wait_for_a_place_has_a_timeout() -> None:
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


def test_a_recording_alone_has_all_places() -> None:
    assert run_virtual(decode_all(places(max_concurrent_batches=4), 8)) == [0] * 4 + [1] * 4


def test_a_short_recording_waits_for_one_piece_of_a_long_one() -> None:
    async def scenario() -> tuple[float, list[float]]:
        limited = places(max_concurrent_batches=2)
        long = asyncio.create_task(decode_all(limited, 50))
        await asyncio.sleep(10.5)
        return await decode(limited, 1), await long

    short, long = run_virtual(scenario())
    assert short == 11
    assert max(long) == 25, "the long one has lost a place for a second"


@pytest.mark.parametrize("number", [2, 4, 8])
def test_long_recordings_share_the_places_equally(number: int) -> None:
    async def scenario() -> list[list[float]]:
        limited = places(max_concurrent_batches=4)
        return await asyncio.gather(*(decode_all(limited, 40) for _ in range(number)))

    ends = [began[-1] for began in run_virtual(scenario())]
    assert min(ends) >= 0.85 * max(ends)
    assert max(ends) <= 10 * number


def test_recording_that_has_begun_waits_without_a_timeout() -> None:
    async def scenario() -> None:
        limited = places(max_concurrent_batches=1)
        share = Share()
        assert await decode(limited, 1, share) == 0
        other = asyncio.create_task(decode(limited, 100))
        await asyncio.sleep(0)
        assert await decode(limited, 1, share) == 101
        await other

    run_virtual(scenario())


def test_no_place_is_given_after_the_drain() -> None:
    async def scenario() -> None:
        limited = places(max_concurrent_batches=1)
        begun = Share(begun=True)
        first = asyncio.create_task(decode(limited, 10))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(decode(limited, 1, begun))
        await asyncio.sleep(1)
        limited.drain()
        limited.end_recordings()
        for refused in (waiting, decode(limited, 1, begun)):
            with pytest.raises(ApiError) as error:
                await refused
            assert error.value.kind is ErrorKind.DRAINING
        assert await first == 0

    run_virtual(scenario())


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 30), st.none() | st.integers(0, 40)), max_size=8),
)
def test_no_place_is_lost_when_recordings_leave(number: int, recordings: list[tuple[int, int, int, int | None]]) -> None:
    """Random recordings begin at random times, and some leave early."""

    async def scenario() -> None:
        limited = places(max_concurrent_batches=number)

        async def one(pieces: int, secs: int, start: int, leaves: int | None) -> None:
            await asyncio.sleep(start)
            work = asyncio.create_task(decode_all(limited, pieces, secs))
            await asyncio.wait({work}, timeout=leaves)
            work.cancel()
            await asyncio.wait({work})
            if not work.cancelled():
                assert not work.exception() or isinstance(work.exception(), ApiError)

        await asyncio.gather(*itertools.starmap(one, recordings))
        await asyncio.sleep(100)
        assert (
            await asyncio.gather(*(decode(limited, 1) for _ in range(number)))
            == [asyncio.get_running_loop().time() - 1] * number
        )

    run_virtual(scenario())


@pytest.mark.parametrize("place_comes_first", [False, True])
def test_a_cancelled_wait_loses_no_place(*, place_comes_first: bool) -> None:
    """Even if the place was released in the same turn of the event loop."""

    async def scenario() -> None:
        limited = places(max_concurrent_batches=1)
        waiting: asyncio.Task[float] | None = None

        async def first() -> None:
            place = await limited.decoding(Share())
            await asyncio.sleep(1)
            place.release()
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
