"""Results of a benchmark, and their Markdown report."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from perf.load import Figure


class Goal(NamedTuple):
    """A measured figure with its requirement and its target.

    Attributes:
        name: the figure, with its unit.
        measured: the result.
        must, aim: requirement and target; None: there is none.
        at_least: whether larger values are better.
    """

    name: str
    measured: float
    must: float | None = None
    aim: float | None = None
    at_least: bool = False

    def verdict(self) -> str:
        """Return ``aim``, ``pass``, ``**fail**`` or ``not yet``; empty without limits."""
        within = operator.ge if self.at_least else operator.le
        if self.aim is not None and within(self.measured, self.aim):
            return "aim"
        if self.must is not None:
            return "pass" if within(self.measured, self.must) else "**fail**"
        return "" if self.aim is None else "not yet"


class Trial(NamedTuple):
    """A trial of paced streams: their number, and p50 and p95 of the latency of partials."""

    streams: int
    p50_ms: float
    p95_ms: float


FIGURE_TITLES = (
    "contender",
    "load",
    "at once",
    "audio s/s",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "decoder calls per audio s",
    "CPU ms per audio s",
    "of which",
    "cores busy",
    "peak RSS MB",
)
GOAL_TITLES = ("figure", "measured", "must", "aim", "")


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return the report as a Markdown page."""
    goals = [Goal(**goal) for goal in report["goals"]]
    figures = [Figure(**figure) for figure in report["figures"]]
    name, count, seconds = report["recordings"].values()
    windows = report["windows_secs"]
    return "\n".join(
        [
            f"# Benchmark{' (quick)' if report['quick'] else ''}",
            "",
            f"{report['date']}, {report['cpu']}, {report['cores']} cores.",
            f"Recordings: {name}, {count}, {seconds} s in total. Windows of {' + '.join(f'{part:g}' for part in windows)} s.",
            f"Medians of {report['alternations']} alternations. perf/README.md defines each row.",
            "",
            *_table(GOAL_TITLES, map(_goal_cells, goals), left=1),
            "",
            *_table(FIGURE_TITLES, map(_figure_cells, figures), left=2),
            "",
            "Paced streams by number:",
            "",
            *_table(Trial._fields, (list(map(_number, trial.values())) for trial in report["trials"]), left=0),
            "",
        ]
    )


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> list[str]:
    """Return the lines of a Markdown table; the first `left` columns are aligned to the left."""
    rule = "".join("|---" if i < left else "|--:" for i in range(len(titles)))
    return [f"| {' | '.join(titles)} |", f"{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]


def _goal_cells(goal: Goal) -> list[str]:
    sign = "≥" if goal.at_least else "≤"
    limits = [f"{sign} {_number(limit)}" if limit is not None else "" for limit in (goal.must, goal.aim)]
    return [goal.name, _number(goal.measured), *limits, goal.verdict()]


def _figure_cells(figure: Figure) -> list[str]:
    cpu = figure.cpu_secs_per_audio_sec
    largest = sorted(cpu.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {1000 * secs:.1f}" for name, secs in largest if secs >= max(cpu.values()) / 50)
    return [
        figure.contender,
        figure.load,
        *map(_number, (figure.concurrency, figure.audio_secs_per_sec, figure.p50_ms, figure.p95_ms, figure.p99_ms)),
        _number(figure.decoder_calls_per_audio_sec),
        _number(1000 * sum(cpu.values())),
        parts,
        _number(sum(cpu.values()) * figure.audio_secs_per_sec),
        _number(figure.peak_rss_mb),
    ]


def _number(value: float) -> str:
    """Format a number with three significant digits, or as an integer from 100 on."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"  # noqa: PLR2004
