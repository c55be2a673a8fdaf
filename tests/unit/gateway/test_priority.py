"""Streams in real time before streams that are sent faster; in virtual time."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from gateway.limits.priority import MAX_BUSY_SHARE, Member, Priority
from tests.support.virtual import run_virtual

FAR_AHEAD_SECS = 60.0
REQUEST_SECS = 0.05


class Streams:
    """Streams that send one request each, with the times of their requests at Triton."""

    def __init__(self) -> None:
        self.now = asyncio.get_running_loop().time
        self.priority = Priority(self.now)
        self.busy: list[tuple[float, float]] = []

    async def request(self, member: Member, ahead_secs: float = FAR_AHEAD_SECS, secs: float = REQUEST_SECS) -> None:
        async with self.priority.turn(member, ahead_secs):
            began = self.now()
            await asyncio.sleep(secs)
            self.busy.append((began, self.now()))


def test_streams_ahead_take_turns_with_pauses() -> None:
    async def scenario() -> list[tuple[float, float]]:
        streams = Streams()
        streams.priority.join()  # in real time
        await asyncio.gather(*(streams.request(streams.priority.join()) for _ in range(4)))
        return streams.busy

    busy = run_virtual(scenario())
    assert len(busy) == 4
    for (began, ended), (following, _) in itertools.pairwise(busy):
        assert following - ended == pytest.approx(ended - began)


def test_streams_ahead_do_not_wait_for_each_other_alone() -> None:
    async def scenario() -> list[tuple[float, float]]:
        streams = Streams()
        members = [streams.priority.join() for _ in range(3)]
        for member in members:
            member_turn = streams.priority.turn(member, FAR_AHEAD_SECS)
            async with member_turn:
                pass
        assert not streams.priority.crowded
        await asyncio.gather(*(streams.request(member) for member in members))
        return streams.busy

    assert len({began for began, _ in run_virtual(scenario())}) == 1


def test_stream_ahead_waits_for_real_time_requests() -> None:
    async def scenario() -> None:
        streams = Streams()
        real_time, patient, impatient = (streams.priority.join() for _ in range(3))
        long = asyncio.create_task(streams.request(real_time, -1.0, secs=0.3))
        await asyncio.sleep(0)
        waiting = asyncio.create_task(streams.request(patient))
        await asyncio.sleep(0)
        await streams.request(impatient, 0.1)  # in real time again before its turn came
        assert streams.now() == pytest.approx(0.1 + REQUEST_SECS)
        await long
        assert not waiting.done()
        await waiting
        assert streams.busy[-1][0] >= 0.3

    run_virtual(scenario())


def test_busy_triton_stops_streams_ahead() -> None:
    async def scenario() -> None:
        streams = Streams()
        real_time, fast = streams.priority.join(), streams.priority.join()
        await streams.request(real_time, -1.0, secs=30)
        ended = streams.now()
        await streams.request(fast)
        waited = streams.busy[-1][0] - ended
        # The share falls from about 1 to its limit as exp(-t / 5 s) does.
        assert waited == pytest.approx(6.0, abs=0.3)

    assert MAX_BUSY_SHARE == 0.3
    run_virtual(scenario())


@pytest.mark.parametrize("where", ["first in line", "second in line"])
def test_leaving_the_queue_delays_no_stream(where: str) -> None:
    async def scenario() -> None:
        streams = Streams()
        real_time, first, second, third = (streams.priority.join() for _ in range(4))
        long = asyncio.create_task(streams.request(real_time, -1.0, secs=1))
        await asyncio.sleep(0)
        waiting = [asyncio.create_task(streams.request(member)) for member in (first, second)]
        await asyncio.sleep(0.5)
        leaver = waiting.pop(0 if where == "first in line" else 1)
        leaver.cancel()
        await asyncio.gather(leaver, return_exceptions=True)
        await asyncio.gather(long, *waiting, streams.request(third))
        assert len(streams.busy) == 3
        assert streams.now() < 3

    run_virtual(scenario())


def test_ended_stream_no_longer_counts() -> None:
    async def scenario() -> None:
        streams = Streams()
        fast, real_time = streams.priority.join(), streams.priority.join()
        await streams.request(fast)
        assert (fast.ahead, streams.priority.crowded) == (True, True)
        for _ in range(2):
            streams.priority.leave(real_time)
        assert not streams.priority.crowded
        streams.priority.leave(fast)
        newcomer = streams.priority.join()
        assert streams.priority.crowded
        assert not newcomer.ahead

    run_virtual(scenario())


def test_failed_request_gives_its_turn_back() -> None:
    async def scenario() -> None:
        streams = Streams()
        streams.priority.join()

        async def fail(ahead_secs: float) -> None:
            async with streams.priority.turn(streams.priority.join(), ahead_secs):
                raise ZeroDivisionError

        for ahead_secs in (FAR_AHEAD_SECS, -1.0):
            with pytest.raises(ZeroDivisionError):
                await fail(ahead_secs)
        await streams.request(streams.priority.join())
        assert streams.now() < 1

    run_virtual(scenario())
