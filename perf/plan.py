"""Extent of a benchmark run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from perf.analyze import STREAM, WHOLE


class Plan(NamedTuple):
    """Repetitions, durations and levels of a run; 0 skips a measurement.

    Attributes:
        alternations: turns of each contender.
        recordings_secs: total length of the recordings; further recordings are not used.
        turn_secs: minimum audio of a turn.
        long_turns: turns with one recording of a minute.
        levels: further concurrencies of whole recordings.
        analyzed: concurrencies of perf_analyzer by load.
        interval_ms: measurement interval of perf_analyzer.
        hold_secs: duration of a trial of paced streams.
        proof_secs: duration of the final trial, with the largest number of streams that was held.
        precision: relative precision of the search for that number.
        crowds: numbers of streams for the gateway alone.
        long_secs: length of the long stream.
        idle_streams: number of open streams whose memory is measured.
        starts: number of starts of the server.
    """

    alternations: int
    recordings_secs: float
    turn_secs: float
    long_turns: int
    levels: tuple[int, ...]
    analyzed: Mapping[str, tuple[int, ...]]
    interval_ms: int
    hold_secs: float
    proof_secs: float
    precision: float
    crowds: tuple[int, ...]
    long_secs: float
    idle_streams: int
    starts: int


FULL = Plan(
    alternations=5,
    recordings_secs=390,
    turn_secs=780,
    long_turns=5,
    levels=(1, 2, 4, 16, 32, 64),
    analyzed={STREAM.name: (1, 2, 4, 8, 16, 32, 64), WHOLE.name: (1, 2, 4, 8, 16, 32, 64)},
    interval_ms=2000,
    hold_secs=20,
    proof_secs=60,
    precision=0.05,
    crowds=(300, 600),
    long_secs=3600,
    idle_streams=64,
    starts=3,
)
QUICK = Plan(
    alternations=2,
    recordings_secs=30,
    turn_secs=90,
    long_turns=0,
    levels=(),
    analyzed={STREAM.name: (8,), WHOLE.name: (8,)},
    interval_ms=1000,
    hold_secs=4,
    proof_secs=0,
    precision=0.34,
    crowds=(300,),
    long_secs=0,
    idle_streams=0,
    starts=1,
)
