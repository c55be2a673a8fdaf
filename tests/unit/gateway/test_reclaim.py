"""Which stream loses its place."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from gateway.limits.reclaim import longest_silent


@dataclass(frozen=True)
class Stream:
    silent_secs: float


@pytest.mark.parametrize(
    ("silences", "index"),
    [([], None), ([0.0, 59.9], None), ([60.0], 0), ([1.0, 70.0, 65.0], 1), ([100.0, 100.0], 0)],
)
def test_longest_silent_stream_loses_its_place(silences: list[float], index: int | None) -> None:
    streams = [Stream(secs) for secs in silences]
    assert longest_silent(streams, 60.0) is (None if index is None else streams[index])
