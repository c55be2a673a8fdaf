"""Search of the decoder's parameters, and the counts of boosted phrases."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perf.boosting import Outcome, choose_lists, judge, occurrences
from perf.labelled import Recording
from perf.sweep import Axis, Point, Sweep, neighbours, search

AXES = [Axis("weight", 0.1, 0.0, 1.0), Axis("bonus", 0.3, -2.0, 2.0)]


def bowl(x: float, y: float, skew: float) -> Callable[[Point], float]:
    return lambda point: (point[0] - x) ** 2 + (point[1] - y) ** 2 + skew * (point[0] - x) * (point[1] - y)


@given(st.floats(-0.5, 1.5), st.floats(-3, 3), st.floats(-1, 1), st.integers(0, 10), st.integers(-6, 6))
def test_search_ends_where_no_step_improves(x: float, y: float, skew: float, first: int, second: int) -> None:
    measure = bowl(x, y, skew)
    best = search((first / 10, round(0.3 * second, 6)), AXES, measure)
    around = [point for number in range(2) for point in neighbours(best, AXES, number)]
    assert best in around
    assert all(measure(best) <= measure(point) for point in around)
    assert all(axis.least <= value <= axis.most for point in around for axis, value in zip(AXES, point, strict=True))


def test_search_keeps_its_start_among_equals() -> None:
    assert search((0.5, 0.5), AXES, lambda _: 1.0) == (0.5, 0.5)


def test_configuration_has_the_best_values() -> None:
    result = Sweep(AXES, (0.1, 0.0), (0.2, 0.3), {}, 4)
    assert result.config_lines() == [
        'parameters { key: "beam" value: { string_value: "4" } }',
        'parameters { key: "weight" value: { string_value: "0.2" } }',
        'parameters { key: "bonus" value: { string_value: "0.3" } }',
    ]


def recording(name: str, text: str) -> Recording:
    return Recording(name, b"", np.zeros(0, np.int16), text, "")


@pytest.mark.parametrize(
    ("phrase", "text", "expected"),
    [("art", "the art of artists art", 2), ("a b", "a b a b", 2), ("a a", "a a a", 1), ("b", "", 0), ("no", "no no no", 3)],
)
def test_phrases_are_counted_as_whole_words(phrase: str, text: str, expected: int) -> None:
    assert occurrences(phrase, text) == expected


def test_lists_have_what_is_said_first() -> None:
    recordings = [recording("one", "so it goes"), recording("two", "it went")]
    phrases = ["it", "goes", *(f"word{i}" for i in range(30))]
    lists = choose_lists(recordings, phrases, 10, said=True)
    assert lists["one"][:2] == ["it", "goes"]
    assert lists["two"][0] == "it"
    assert {len(chosen) for chosen in lists.values()} == {10}
    assert lists == choose_lists(recordings, phrases, 10, said=True), "the same each time"
    others = choose_lists(recordings, phrases, 500, said=False)
    assert sorted(others["one"]) == sorted(phrases[2:])
    assert sorted(others["two"]) == sorted(phrases[1:])


def test_outcomes_are_counted() -> None:
    recordings = [recording("one", "so it goes so"), recording("two", "it went")]
    lists = {"one": ["so", "goes", "gone"], "two": ["went", "so"]}
    outcome = judge(recordings, lists, ["so it gone so", "it went so so"], ["so it goes", "it won"], 12.5)
    assert outcome == Outcome(listed=2.5, said=4, found=3, found_without=2, false_alarms=3, false_alarms_without=0, rate=12.5)
