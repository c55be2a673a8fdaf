"""What one key may use, and whose turn it is."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.limits import access
from gateway.limits.access import ANYBODY, BURST_SECS, Admission, Quotas


def quotas(clock: list[float], **settings: float) -> Quotas:
    return Quotas(Settings.model_validate(settings), lambda: clock[0])


def test_streams_of_one_key_are_its_own() -> None:
    limited = quotas([0.0], max_streams_per_key=1)
    with limited.stream(0), limited.stream(1):
        with pytest.raises(ApiError) as refused, limited.stream(0):
            pass
        assert refused.value.kind is ErrorKind.QUOTA_EXCEEDED
        assert "Retry-After" in refused.value.headers()
    with limited.stream(0):
        pass


def test_without_keys_or_limits_nobody_is_held_back() -> None:
    for free, caller in ((quotas([0.0], max_streams_per_key=1, max_audio_rate_per_key=1), ANYBODY), (quotas([0.0]), 0)):
        with free.stream(caller), free.stream(caller):
            for _ in range(1000):
                free.spend(caller, 3600)


@given(
    rate=st.floats(0.1, 100),
    steps=st.lists(st.tuples(st.floats(0, 120), st.floats(0.1, 60)), max_size=60),
)
def test_no_key_sends_more_than_its_rate(rate: float, steps: list[tuple[float, float]]) -> None:
    clock, sent, largest = [0.0], 0.0, 0.0
    limited = quotas(clock, max_audio_rate_per_key=rate)
    for pause, audio_secs in steps:
        clock[0] += pause
        try:
            limited.spend(0, audio_secs)
        except ApiError as error:
            clock[0] += error.retry_after_secs or 0.0
            limited.spend(0, audio_secs)  # what the error promised
        sent += audio_secs
        largest = max(largest, audio_secs)
        assert sent <= rate * (BURST_SECS + clock[0]) + largest + 1e-6
    limited.spend(1, 1.0)  # another's use is no concern


async def test_streams_ahead_of_real_time_take_turns_while_there_are_others() -> None:
    admission = Admission(Settings())
    busy: list[tuple[float, float]] = []

    async def request(patience_secs: float = 60) -> None:
        async with admission.turn(patience_secs):
            began = time.monotonic()
            await asyncio.sleep(0.05)
            busy.append((began, time.monotonic()))

    with admission.stream(), admission.stream(), admission.stream():
        admission.ahead = 2
        await asyncio.gather(*(request() for _ in range(4)))
        for (began, ended), (following, _) in itertools.pairwise(busy):
            assert following - ended >= 0.9 * (ended - began)

        with admission.at_once():
            patient, impatient = asyncio.create_task(request()), asyncio.create_task(request(0.1))
            await asyncio.sleep(0.3)
            assert impatient.done(), "it is in real time again, and still waited"
            assert not patient.done(), "it did not wait for the one in real time"
        await patient

        admission.ahead = 3  # nobody is left to be given way to
        started = time.monotonic()
        await asyncio.gather(*(request() for _ in range(4)))
        assert time.monotonic() - started < 0.15


async def test_while_streams_in_real_time_keep_triton_busy_nobody_gets_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "BUSY_SECS", 0.1)
    admission = Admission(Settings())
    with admission.stream():
        with admission.at_once():
            await asyncio.sleep(0.3)
        began = time.monotonic()
        async with admission.turn(60):
            assert time.monotonic() - began > 0.08, "it went in a gap of a busy time"
        assert time.monotonic() - began < 1


async def test_who_leaves_the_line_holds_up_nobody() -> None:
    admission = Admission(Settings())
    with admission.stream(), admission.at_once():
        waiting = asyncio.create_task(admission.turn(60).__aenter__())
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    with admission.stream():
        async with admission.turn(60):
            pass
