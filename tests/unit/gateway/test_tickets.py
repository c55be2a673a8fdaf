"""Tickets: whose they are, how old they may be, and what they are good for."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from pydantic import SecretStr

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.live import resume
from gateway.live.resume import MAX_AGE_SECS, MAX_STREAMS, Ticket, Tickets

SETTINGS = Settings(session_key=SecretStr("one for all gateways"))
TICKET = Ticket("amira", "balanced", samples=16_000, state="state", stream="one")


class Clock:
    """Both clocks of the module, which can be set apart from the system's."""

    def __init__(self) -> None:
        self.ahead_secs = 0.0
        self.now = 1000.0

    def time(self) -> float:
        return time.time() + self.ahead_secs

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(resume, "time", clock)
    return clock


def test_another_gateway_takes_it() -> None:
    ticket, age_secs = Tickets(SETTINGS).redeem(Tickets(SETTINGS).issue(TICKET), "amira")
    assert ticket == TICKET
    assert age_secs < 2


@pytest.mark.parametrize("behind_secs", [0.6, 5.0, 300.0])
def test_the_clock_of_another_gateway_may_be_behind(clock: Clock, behind_secs: float) -> None:
    clock.ahead_secs = -behind_secs
    ticket, age_secs = Tickets(SETTINGS).redeem(Tickets(SETTINGS).issue(TICKET), "amira")
    assert ticket == TICKET
    assert 0 <= age_secs < 1  # a ticket has whole seconds


def test_it_grows_too_old(clock: Clock) -> None:
    text = Tickets(SETTINGS).issue(TICKET)
    clock.ahead_secs = MAX_AGE_SECS - 2
    assert Tickets(SETTINGS).redeem(text, "amira")[1] == pytest.approx(MAX_AGE_SECS, abs=3)
    clock.ahead_secs = MAX_AGE_SECS + 2
    with pytest.raises(ApiError, match="s old, of at most 3600") as refused:
        Tickets(SETTINGS).redeem(text, "amira")
    assert refused.value.kind is ErrorKind.INVALID_SESSION


def test_forged_and_foreign_ones_are_refused() -> None:
    text = Tickets(SETTINGS).issue(TICKET)
    for given, model in ((text, "other"), (text[:-1], "amira"), ("", "amira")):
        with pytest.raises(ApiError) as refused:
            Tickets(SETTINGS).redeem(given, model)
        assert refused.value.kind is ErrorKind.INVALID_SESSION


def test_time_is_good_for_one_resumption(clock: Clock) -> None:
    """Or an old ticket would let its stream get ahead of real time again and again."""
    here = Tickets(SETTINGS)
    old, newer = here.issue(TICKET), here.issue(replace(TICKET, samples=32_000))
    clock.ahead_secs = 60
    assert here.redeem(old, "amira")[1] == pytest.approx(60, abs=2)
    clock.now += 3
    assert here.redeem(old, "amira")[1] == 3
    assert here.redeem(newer, "amira")[1] == 0
    assert here.redeem(here.issue(replace(TICKET, stream="another")), "amira")[1] == pytest.approx(60, abs=2)


def test_streams_that_went_on_are_forgotten_in_the_end(clock: Clock) -> None:
    here = Tickets(SETTINGS)
    first = here.issue(TICKET)
    clock.ahead_secs = 60
    here.redeem(first, "amira")
    for number in range(MAX_STREAMS):
        here.redeem(here.issue(replace(TICKET, stream=str(number))), "amira")
    assert here.redeem(first, "amira")[1] > 50
