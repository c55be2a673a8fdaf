"""Canaries' rounds: what they call a failure, and when they are made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.triton.canary import CLEARING_ANSWERS, MAX_FAILURES, Canary, CanaryError, Health, Outcome, ask


def test_ensemble_is_well_only_once_a_canary_was_answered() -> None:
    health = Health()
    assert not health.well
    assert not health.after(Outcome.LATE, 1.0).well
    assert health.after(Outcome.ANSWERED, 1.0).well


def test_one_failure_is_no_outage_and_two_in_a_row_are() -> None:
    health = Health().after(Outcome.ANSWERED, 0.0)
    for failures in range(1, MAX_FAILURES + 1):
        health = health.after(Outcome.FAILED, float(failures))
        assert health.well is (failures < MAX_FAILURES)
    assert health.failing_secs(10.0) == 9.0


def test_answer_clears_late_rounds() -> None:
    health = Health().after(Outcome.ANSWERED, 0.0)
    for now in range(10):
        health = health.after(Outcome.LATE, float(now)).after(Outcome.ANSWERED, now + 0.5)
        assert health.well
    assert health.failing_secs(100.0) == 0.0


def test_one_broken_instance_of_two_is_an_outage() -> None:
    """Half of the rounds are answered."""
    health = Health().after(Outcome.ANSWERED, 0.0).after(Outcome.FAILED, 1.0).after(Outcome.ANSWERED, 2.0)
    assert health.well
    health = health.after(Outcome.FAILED, 3.0)
    for now in range(4, 3 + CLEARING_ANSWERS):
        health = health.after(Outcome.ANSWERED, float(now))
        assert not health.well
        assert health.failing_secs(float(now)) == now - 1.0
    assert health.after(Outcome.ANSWERED, 10.0) == Health(Outcome.ANSWERED, answered=True)


class Triton:
    """What answers the canaries: at once, with an error, or not until it is allowed to.

    Attributes:
        asked: number of canaries.
        lengths: their numbers of samples.
        fails: whether all fail.
        room: number of samples from which on there is too little shared memory.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.lengths: list[int] = []
        self.fails = False
        self.room = 10**9
        self.open = asyncio.Event()
        self.open.set()

    async def ask(self, samples: int) -> None:
        self.asked += 1
        self.lengths.append(samples)
        if samples >= self.room:
            raise CanaryError("Failed to increase the shared memory pool size for key 'a' to 1048576 bytes.")
        if self.fails:
            raise CanaryError("Stub process 'encoder_0_0' is not healthy.")
        await self.open.wait()


@pytest.fixture
def triton() -> Triton:
    return Triton()


def canary_of(triton: Triton, timeout_secs: float = 0.05, interval_secs: float = 0.6) -> Canary:
    return Canary(triton.ask, "test", timeout_secs, interval_secs)


@asynccontextmanager
async def running(canary: Canary, *, loaded: bool = True) -> AsyncIterator[None]:
    task = asyncio.create_task(canary.run(lambda: loaded, lambda: 2))
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_round_reaches_every_instance(triton: Triton) -> None:
    canary = canary_of(triton)
    await canary.make_round(3)
    assert triton.asked == 1 + 3
    assert canary.health.well


async def test_error_counts_despite_progress(triton: Triton) -> None:
    canary = canary_of(triton)
    await canary.make_round(1)
    triton.fails = True
    for _ in range(MAX_FAILURES):
        canary.see_progress()
        await canary.make_round(1)
    assert canary.health.last is Outcome.FAILED
    assert not canary.health.well


async def test_late_is_a_failure_only_while_nothing_else_is_decoded(triton: Triton) -> None:
    canary = canary_of(triton)
    await canary.make_round(1)
    triton.open.clear()
    for _ in range(MAX_FAILURES):
        rounds = asyncio.create_task(canary.make_round(1))
        await asyncio.sleep(0.02)
        canary.see_progress()
        await rounds
        assert canary.health.well
    for _ in range(MAX_FAILURES):
        await canary.make_round(1)
    assert canary.health.last is Outcome.LATE
    assert not canary.health.well
    triton.open.set()


async def test_late_answer_counts_as_slow(triton: Triton) -> None:
    canary = canary_of(triton)
    await canary.make_round(1)
    triton.open.clear()
    await canary.make_round(1)
    assert canary.health.failures == 1
    rounds = asyncio.create_task(canary.make_round(1))
    await asyncio.sleep(0.02)
    triton.open.set()  # both are answered now, the first one late
    await rounds
    assert canary.health.well
    assert canary.health.failures == 0


async def test_shortage_lasts_until_audio_of_the_length_is_decoded(triton: Triton) -> None:
    canary = canary_of(triton)
    await canary.make_round(2)
    triton.room = 10_000
    canary.see_shortage(20_000)
    canary.see_shortage(400)
    assert canary.short
    assert not canary.health.well
    for _ in range(2 * CLEARING_ANSWERS):
        await canary.make_round(2)
    assert set(triton.lengths[3:]) == {20_000}, "shorter ones would succeed"
    assert not canary.health.well
    triton.room = 10**9
    for _ in range(CLEARING_ANSWERS):
        await canary.make_round(2)
    assert triton.lengths[-3 * CLEARING_ANSWERS :] == [20_000] + [1] * (3 * CLEARING_ANSWERS - 1)
    assert not canary.short
    assert canary.health.well


async def test_new_triton_has_no_shortage(triton: Triton) -> None:
    canary = canary_of(triton)
    canary.see_shortage(20_000)
    canary.forget()
    await canary.make_round(1)
    assert triton.lengths == [1]
    assert canary.health.well


async def test_rounds_are_not_made_while_speech_is_decoded(triton: Triton) -> None:
    canary = canary_of(triton)
    async with running(canary):
        await canary.judged.wait()
        asked = triton.asked
        for _ in range(15):
            canary.see_progress()
            await asyncio.sleep(0.1)
        assert triton.asked == asked
        await asyncio.sleep(1.5)
        assert triton.asked > asked


async def test_failure_starts_a_round_at_once(triton: Triton) -> None:
    canary = canary_of(triton, interval_secs=100)
    async with running(canary):
        await canary.judged.wait()
        await asyncio.sleep(0.6)
        asked = triton.asked
        canary.hurry()
        await asyncio.sleep(0.1)
        assert triton.asked > asked


async def test_no_canary_before_models_are_loaded(triton: Triton) -> None:
    canary = canary_of(triton)
    async with running(canary, loaded=False):
        await asyncio.sleep(1.2)
    assert triton.asked == 0
    assert not canary.health.well


async def test_death_is_an_outage_at_once(triton: Triton) -> None:
    """A client's request found it; two rounds would take seconds, in which retries fail."""
    canary = canary_of(triton)
    await canary.make_round(1)
    assert canary.health.well
    canary.see_death()
    assert not canary.health.well
    for _ in range(CLEARING_ANSWERS):
        assert not canary.health.well
        await canary.make_round(1)
    assert canary.health.well


async def test_forgotten_rounds_do_not_count(triton: Triton) -> None:
    canary = canary_of(triton)
    triton.open.clear()
    rounds = asyncio.create_task(canary.make_round(1))
    await asyncio.sleep(0.01)
    canary.forget()
    triton.open.set()
    await rounds
    assert canary.health == Health(), "its answer came from a Triton that is gone"


async def test_canary_is_a_recording() -> None:
    """As a live stream it would keep one of the encoder's calls free of recordings for two seconds."""
    asked: dict[str, Any] = {}

    class Client:
        async def infer(self, *_: object, **options: object) -> None:
            asked.update(options)

    await ask(Client(), "asr_ensemble")
    assert asked["parameters"] == {"context": "whole"}
    assert asked["sequence_start"]
    assert asked["sequence_end"]
