"""Closed-loop load on recordings. Contenders alternate on the same work, so other load on the machine affects all alike."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from perf.processes import Meter
from perf.speech import Samples, audio_secs

Calls = Callable[[], Awaitable[float]]
"""Returns the number of decoder_joint calls so far."""


class Figure(NamedTuple):
    """Result of one contender under one load.

    Attributes:
        contender, load: their names.
        concurrency: recordings or streams in flight.
        audio_secs_per_sec: throughput, the median of the turns.
        p50_ms, p95_ms, p99_ms: latency of a request, over all turns.
        decoder_calls_per_audio_sec: calls of decoder_joint; a shared call counts once.
        cpu_secs_per_audio_sec: CPU time by process.
        peak_rss_mb: sum of the peak resident sets of all processes.
    """

    contender: str
    load: str
    concurrency: int
    audio_secs_per_sec: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    decoder_calls_per_audio_sec: float
    cpu_secs_per_audio_sec: Mapping[str, float]
    peak_rss_mb: float


async def _no_calls() -> float:
    return 0.0


@dataclass(frozen=True)
class Contender:
    """A system that transcribes recordings.

    Attributes:
        name: name in the tables.
        send: transcribes 16 kHz audio [n].
        roots: its processes; see ``Meter``.
        calls: returns the number of decoder_joint calls so far.
    """

    name: str
    send: Callable[[Samples], Awaitable[Any]]
    roots: Mapping[str, int]
    calls: Calls = _no_calls


@dataclass
class Tally:
    """Sums over the turns of one contender."""

    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    audio_secs: float = 0.0
    calls: float = 0.0
    cpu_secs: Counter[str] = field(default_factory=Counter)
    peak_rss_mb: float = 0.0

    def figure(self, contender: str, load: str, concurrency: int) -> Figure:
        """Return the figure of all turns."""
        p50, p95, p99 = percentiles_ms(self.latencies)
        cpu = {name: round(secs / self.audio_secs, 5) for name, secs in sorted(self.cpu_secs.items()) if secs}
        return Figure(
            contender,
            load,
            concurrency,
            audio_secs_per_sec=round(median(self.rates), 1),
            p50_ms=p50,
            p95_ms=p95,
            p99_ms=p99,
            decoder_calls_per_audio_sec=round(self.calls / self.audio_secs, 2),
            cpu_secs_per_audio_sec=cpu,
            peak_rss_mb=round(self.peak_rss_mb),
        )


class Turn(NamedTuple):
    """A contender, and its number of recordings in flight."""

    contender: Contender
    concurrency: int


async def alternate(turns: Sequence[Turn], recordings: Sequence[Samples], times: int, load: str) -> list[Figure]:
    """Run contenders in alternation on the same recordings, and return a figure for each.

    Args:
        turns: the contenders in order.
        recordings: work of one turn.
        times: number of turns of each contender.
        load: name of the work.
    """
    tallies = [Tally() for _ in turns]
    for _ in range(times):
        for (contender, concurrency), tally in zip(turns, tallies, strict=True):
            await _take_turn(contender, concurrency, recordings, tally)
    return [tally.figure(turn.contender.name, load, turn.concurrency) for turn, tally in zip(turns, tallies, strict=True)]


async def _take_turn(contender: Contender, concurrency: int, recordings: Sequence[Samples], tally: Tally) -> None:
    calls = await contender.calls()
    meter = Meter(contender.roots)
    meter.start()
    began = time.perf_counter()
    tally.latencies += await closed_loop(contender.send, recordings, concurrency)
    seconds = audio_secs(recordings)
    tally.rates.append(seconds / (time.perf_counter() - began))
    usage = meter.stop()
    tally.audio_secs += seconds
    tally.calls += await contender.calls() - calls
    tally.cpu_secs.update(usage.cpu_secs)
    tally.peak_rss_mb = max(tally.peak_rss_mb, sum(usage.peak_rss_mb.values()))


async def closed_loop(
    send: Callable[[Samples], Awaitable[Any]], recordings: Sequence[Samples], concurrency: int
) -> list[float]:
    """Send every recording, `concurrency` at a time, and return the latency of each in seconds."""
    waiting = iter(recordings)
    latencies = []

    async def work() -> None:
        for recording in waiting:
            began = time.perf_counter()
            await send(recording)
            latencies.append(time.perf_counter() - began)

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return latencies


def percentiles_ms(latencies: Sequence[float]) -> tuple[float, float, float]:
    """Return p50, p95 and p99 of latencies in seconds, in milliseconds."""
    p50, p95, p99 = (round(1000 * float(value), 1) for value in np.percentile(latencies, (50, 95, 99), method="higher"))
    return p50, p95, p99
