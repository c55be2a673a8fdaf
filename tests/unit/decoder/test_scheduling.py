"""The decisions of ``scheduling.py``, without an event loop."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling import (
    EXCLUSIVE_AFTER_SECS,
    LIVE_SECS,
    RECORDING_PATIENCE_SECS,
    Occupancy,
    Queued,
    choose,
    is_exclusive,
    next_decoder_call,
)
from windows import Window

NOW = 1000.0
NEVER = -math.inf


def live(length: int = 10, waited_secs: float = 0.0) -> Queued:
    return Queued.at(NOW - waited_secs, Window(np.zeros(length, np.int16), 0, None, live=True))


def recording(length: int = 100, waited_secs: float = 0.0) -> Queued:
    return Queued.at(NOW - waited_secs, Window(np.zeros(length, np.int16), 0, None, live=False))


def occupancy(calls: int, running: int = 0, running_recordings: int = 0, last_live_at: float = NEVER) -> Occupancy:
    return Occupancy(calls, running, running_recordings, last_live_at)


def chosen(queue: Sequence[Queued], busy: Occupancy, windows_per_call: int = 8) -> list[int]:
    """Return the indices of the windows that the next call takes."""
    return [queue.index(queued) for queued in choose(queue, busy, NOW, lambda _samples: windows_per_call)]


def test_empty_queue_starts_no_call() -> None:
    assert chosen([], occupancy(2)) == []


def test_no_call_starts_beyond_the_limit() -> None:
    assert chosen([live()], occupancy(2, running=1)) == [0]
    assert chosen([live()], occupancy(2, running=2)) == []


def test_windows_are_spread_over_free_calls_before_they_share() -> None:
    queue = [live() for _ in range(5)]
    assert chosen(queue, occupancy(1)) == [0, 1, 2, 3, 4]
    assert chosen(queue, occupancy(2)) == [0, 1, 2]
    assert chosen(queue, occupancy(5)) == [0]
    assert chosen(queue, occupancy(5, running=3)) == [0, 1, 2]


def test_call_takes_no_more_windows_than_fit() -> None:
    queue = [live(10), live(10), live(10), live(30), live(30)]
    assert [len(q.window.samples) for q in choose(queue, occupancy(1), NOW, lambda samples: 60 // samples)] == [10, 10, 10]
    assert len(choose(queue[3:], occupancy(1), NOW, lambda samples: 60 // samples)) == 2
    assert len(choose(queue[3:], occupancy(1), NOW, lambda samples: 30 // samples)) == 1


def test_only_one_kind_and_length_share_a_call() -> None:
    assert chosen([live(10), live(20), live(10)], occupancy(1)) == [0, 2]
    assert chosen([live(10), recording(10), live(10)], occupancy(1)) == [0, 2]
    assert chosen([recording(100), recording(200), recording(100)], occupancy(1)) == [0, 2]


def test_live_windows_overtake_recordings_for_a_time() -> None:
    assert chosen([recording(waited_secs=RECORDING_PATIENCE_SECS - 0.1), live()], occupancy(1)) == [1]
    assert chosen([recording(waited_secs=RECORDING_PATIENCE_SECS + 0.1), live()], occupancy(1)) == [0]


@pytest.mark.parametrize(("last_live_at", "starts"), [(NEVER, True), (NOW - LIVE_SECS, True), (NOW - LIVE_SECS + 0.1, False)])
def test_recordings_leave_a_call_to_live_windows(last_live_at: float, starts: bool) -> None:
    busy = occupancy(2, running=1, running_recordings=1, last_live_at=last_live_at)
    assert bool(chosen([recording()], busy)) == starts
    assert chosen([recording(waited_secs=60), live()], busy) == ([0] if starts else [1])


def test_recordings_may_use_the_only_call() -> None:
    assert chosen([recording()], occupancy(1, last_live_at=NOW)) == [0]


queues = st.lists(
    st.builds(
        lambda kind, length, waited: kind(length, waited),
        st.sampled_from([live, recording]),
        st.integers(1, 3),
        st.floats(0, 9),
    ),
    max_size=12,
)


@given(queues, st.integers(1, 4), st.data())
def test_chosen_group_obeys_every_rule(queue: list[Queued], calls: int, data: st.DataObject) -> None:
    running = data.draw(st.integers(0, calls))
    recordings = data.draw(st.integers(0, running))
    busy = occupancy(calls, running, recordings, data.draw(st.sampled_from([NEVER, NOW])))
    limit = data.draw(st.integers(1, 5))
    group = choose(queue, busy, NOW, lambda _samples: limit)
    assert len({id(queued) for queued in group}) == len(group) <= limit
    assert all(queued in queue and queued.can_share(group[0]) for queued in group)
    if group:
        assert running < calls
        earlier = [queued for queued in queue if queued.due < group[0].due]
        assert group[0].window.live is False or not any(queued.window.live for queued in earlier)
        assert group[0].window.live or not earlier
    else:
        assert running == calls or not any(queued.window.live for queued in queue)


@given(queues, st.integers(1, 4))
def test_every_window_is_encoded_in_the_end(queue: list[Queued], calls: int) -> None:
    left = list(queue)
    while left:
        group = choose(left, occupancy(calls, last_live_at=NOW), NOW, lambda _samples: 3)
        assert group
        left = [queued for queued in left if queued not in group]


def test_window_is_exclusive_after_a_time_without_company() -> None:
    assert is_exclusive(NEVER, NOW)
    assert is_exclusive(NOW - EXCLUSIVE_AFTER_SECS, NOW)
    assert not is_exclusive(NOW - EXCLUSIVE_AFTER_SECS + 0.1, NOW)


def test_rows_wait_only_while_others_are_coming() -> None:
    assert next_decoder_call([3.0, 2.0, 5.0], 1.0, rows_are_coming=True) == 2.0
    assert next_decoder_call([3.0, 2.0, 5.0], 1.0, rows_are_coming=False) == 1.0


def test_row_that_may_not_wait_starts_a_call_at_once() -> None:
    assert next_decoder_call([3.0, 1.0], 1.0, rows_are_coming=True) == 1.0
    assert next_decoder_call([3.0, 0.5], 1.0, rows_are_coming=True) == 1.0


@given(st.lists(st.floats(0, 10), min_size=1), st.floats(0, 10), st.booleans())
def test_decoder_call_is_neither_in_the_past_nor_late(waits_until: list[float], now: float, coming: bool) -> None:
    at = next_decoder_call(waits_until, now, rows_are_coming=coming)
    assert now <= at <= max(now, min(waits_until))
