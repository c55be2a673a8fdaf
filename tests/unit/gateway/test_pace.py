"""The plan of a stream's next request."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.audio import RATE
from gateway.live.pace import LEAD_SECS, MAX_BACKLOG_SECS, MAX_LEAD_SECS, MAX_WINDOWS, Pace, plan

CHUNK = 15_360
DUE = CHUNK + 7_680

waiting = st.integers(0, 2**20)
due = st.integers(1, 100_000)
chunk = st.integers(1, 100_000)
spare_secs = st.floats(-MAX_LEAD_SECS, MAX_BACKLOG_SECS)


@given(waiting=waiting, due=due, chunk=chunk, spare_secs=spare_secs, crowded=st.booleans())
def test_request_is_bounded(waiting: int, due: int, chunk: int, spare_secs: float, *, crowded: bool) -> None:
    planned = plan(waiting, due, chunk, spare_secs, crowded=crowded)
    most = due + (MAX_WINDOWS - 1) * chunk
    assert min(waiting, due) <= planned.samples <= min(waiting, most)
    if planned.samples < waiting:
        assert (planned.samples - due) % chunk == 0, "audio that completes no window was left out"
    assert planned.cost_secs <= planned.samples / RATE
    assert planned.ahead_secs <= MAX_LEAD_SECS + 1e-9


@given(waiting=waiting, due=due, chunk=chunk, spare_secs=spare_secs)
def test_others_in_real_time_never_make_a_request_larger(waiting: int, due: int, chunk: int, spare_secs: float) -> None:
    alone = plan(waiting, due, chunk, spare_secs, crowded=False)
    crowded = plan(waiting, due, chunk, spare_secs, crowded=True)
    assert crowded.samples <= alone.samples
    further = max(0, crowded.samples - due)
    assert further / RATE <= max(0.0, spare_secs - due / RATE) + 1e-9, "more than a microphone can have filled"


@given(waiting=waiting, due=due, chunk=chunk, spare_secs=spare_secs, crowded=st.booleans())
def test_request_waits_if_and_only_if_it_is_ahead(
    waiting: int, due: int, chunk: int, spare_secs: float, *, crowded: bool
) -> None:
    planned = plan(waiting, due, chunk, spare_secs, crowded=crowded)
    if planned.samples / RATE < spare_secs:
        assert planned.ahead_secs <= 0
    if planned.samples / RATE > spare_secs + 1e-9 and spare_secs > -MAX_LEAD_SECS:
        assert planned.ahead_secs > 0


@given(pieces=st.lists(st.tuples(st.floats(0, 0.02), st.integers(0, 3 * CHUNK)), min_size=1, max_size=50))
def test_real_time_audio_never_waits(pieces: list[tuple[float, int]]) -> None:
    """For any frames and any jitter: no audio is sent before it can have been spoken."""
    now = [0.0]
    pace, sent = Pace(clock=lambda: now[0]), 0
    for jitter_secs, samples in pieces:
        spoken = sent + samples
        now[0] = max(now[0], spoken / RATE) + jitter_secs
        planned = plan(samples, samples or 1, CHUNK, pace.spare_secs, crowded=True)
        assert planned.ahead_secs <= 1e-9
        pace.spend(planned)
        sent = spoken


def test_fast_audio_gets_ahead_after_its_lead() -> None:
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    assert pace.spare_secs == LEAD_SECS
    first = plan(10 * CHUNK, DUE, CHUNK, pace.spare_secs, crowded=True)
    assert (first.samples, first.ahead_secs) == (DUE, DUE / RATE - LEAD_SECS)
    pace.spend(first)
    now[0] += first.ahead_secs
    assert pace.spare_secs == pytest.approx(0)


def test_lead_gained_alone_does_not_delay_a_stream_later() -> None:
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    for _ in range(100):
        pace.spend(plan(10**6, DUE, CHUNK, pace.spare_secs, crowded=False))
    assert pace.spare_secs == pytest.approx(-MAX_LEAD_SECS)


@pytest.mark.parametrize(("late_secs", "spare_secs"), [(0, LEAD_SECS), (10, 10 + LEAD_SECS), (3600, MAX_BACKLOG_SECS)])
def test_late_audio_is_in_real_time(late_secs: float, spare_secs: float) -> None:
    assert Pace(late_secs, lambda: 0.0).spare_secs == spare_secs
