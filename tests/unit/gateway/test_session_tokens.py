"""Session tokens: acceptance, maximum age, and the use of their age."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from pydantic import SecretStr

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.live.resume import MAX_AGE_SECS, MAX_STREAMS, SessionToken, SessionTokens

SETTINGS = Settings(session_key=SecretStr("one for all gateways"))
TOKEN = SessionToken("amira", "balanced", samples=16_000, state="state", stream="one")


class Clocks:
    """Both clocks of a gateway; tokens are signed with the system's wall clock."""

    def __init__(self) -> None:
        self.ahead_secs = 0.0
        self.now = 1000.0

    def tokens(self) -> SessionTokens:
        return SessionTokens(SETTINGS, lambda: self.now, lambda: time.time() + self.ahead_secs)


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


def test_another_gateway_accepts_a_token() -> None:
    token, age_secs = SessionTokens(SETTINGS).redeem(SessionTokens(SETTINGS).issue(TOKEN), "amira")
    assert token == TOKEN
    assert age_secs < 2


@pytest.mark.parametrize("behind_secs", [0.6, 5.0, 300.0])
def test_clock_of_another_gateway_may_be_behind(clocks: Clocks, behind_secs: float) -> None:
    clocks.ahead_secs = -behind_secs
    token, age_secs = clocks.tokens().redeem(SessionTokens(SETTINGS).issue(TOKEN), "amira")
    assert token == TOKEN
    assert 0 <= age_secs < 1  # tokens have whole seconds


def test_old_tokens_are_refused(clocks: Clocks) -> None:
    text = SessionTokens(SETTINGS).issue(TOKEN)
    clocks.ahead_secs = MAX_AGE_SECS - 2
    assert clocks.tokens().redeem(text, "amira")[1] == pytest.approx(MAX_AGE_SECS, abs=3)
    clocks.ahead_secs = MAX_AGE_SECS + 2
    with pytest.raises(ApiError, match="s old, of at most 3600") as refused:
        clocks.tokens().redeem(text, "amira")
    assert refused.value.kind is ErrorKind.INVALID_SESSION


def test_forged_and_foreign_tokens_are_refused() -> None:
    text = SessionTokens(SETTINGS).issue(TOKEN)
    for given, model in ((text, "other"), (text[:-1], "amira"), ("", "amira")):
        with pytest.raises(ApiError) as refused:
            SessionTokens(SETTINGS).redeem(given, model)
        assert refused.value.kind is ErrorKind.INVALID_SESSION


def test_age_counts_for_one_resumption(clocks: Clocks) -> None:
    """Otherwise an old token would let its stream get ahead of real time repeatedly."""
    here = clocks.tokens()
    old, newer = here.issue(TOKEN), here.issue(replace(TOKEN, samples=32_000))
    clocks.ahead_secs = 60
    assert here.redeem(old, "amira")[1] == pytest.approx(60, abs=2)
    clocks.now += 3
    assert here.redeem(old, "amira")[1] == 3
    assert here.redeem(newer, "amira")[1] == 0
    assert here.redeem(here.issue(replace(TOKEN, stream="another")), "amira")[1] == pytest.approx(60, abs=2)


def test_resumed_streams_are_forgotten_eventually(clocks: Clocks) -> None:
    here = clocks.tokens()
    first = here.issue(TOKEN)
    clocks.ahead_secs = 60
    here.redeem(first, "amira")
    for number in range(MAX_STREAMS):
        here.redeem(here.issue(replace(TOKEN, stream=str(number))), "amira")
    assert here.redeem(first, "amira")[1] > 50


def test_signed_names_do_not_change() -> None:
    """Gateways of other versions read them."""
    names = ("model", "latency", "samples", "state", "chars", "tokens", "words", "stream", "segments")
    assert tuple(SessionToken.__dataclass_fields__) == names
