"""Quotas of API keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.limits.auth import ANONYMOUS
from gateway.limits.quotas import BURST_SECS, Quotas


def quotas(clock: list[float], **settings: float) -> Quotas:
    return Quotas(Settings.model_validate(settings), lambda: clock[0])


def test_each_key_has_its_own_streams() -> None:
    limited = quotas([0.0], max_streams_per_key=1)
    with limited.stream(0), limited.stream(1):
        with pytest.raises(ApiError) as refused, limited.stream(0):
            pass
        assert refused.value.kind is ErrorKind.QUOTA_EXCEEDED
        assert "Retry-After" in refused.value.headers()
    with limited.stream(0):
        pass


def test_no_keys_or_no_limits_mean_no_quota() -> None:
    for free, caller in ((quotas([0.0], max_streams_per_key=1, max_audio_rate_per_key=1), ANONYMOUS), (quotas([0.0]), 0)):
        with free.stream(caller), free.stream(caller):
            for _ in range(1000):
                free.spend(caller, 3600)


@given(
    rate=st.floats(0.1, 100),
    steps=st.lists(st.tuples(st.floats(0, 120), st.floats(0.1, 60)), max_size=60),
)
def test_no_key_exceeds_its_rate(rate: float, steps: list[tuple[float, float]]) -> None:
    clock, sent, largest = [0.0], 0.0, 0.0
    limited = quotas(clock, max_audio_rate_per_key=rate)
    for pause, audio_secs in steps:
        clock[0] += pause
        try:
            limited.spend(0, audio_secs)
        except ApiError as error:
            clock[0] += error.retry_after_secs or 0.0
            limited.spend(0, audio_secs)  # the error promised that it would be accepted
        sent += audio_secs
        largest = max(largest, audio_secs)
        assert sent <= rate * (BURST_SECS + clock[0]) + largest + 1e-6
    limited.spend(1, 1.0)  # the use of other keys does not count
