"""Find the decoder's parameters for recordings on labelled speech: ``python -m perf.evaluate DIR --sweep``.

Each recording is encoded once, and decoded in this process with each choice of parameters. The search moves one parameter at a
time while the word error rate falls (coordinate descent).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from amira.models.repository import Recogniser
from amira.paths import MODEL_REPOSITORY
from gateway.audio import RATE
from perf.labelled import Recording, errors
from perf.networks import EncodedOnce, Networks, decode, read_parameters
from perf.output import circumstances

sys.path += [str(MODEL_REPOSITORY / "rnnt_greedy_bls" / "1")]
from fusions import Fusions
from parameters import Parameters
from stream import Stream

DEFAULT_BEAM = 4
"""Width of the beam of a model that is decoded greedily so far; more changes next to nothing (docs/history)."""

TABLE_STEPS = (-2, -1, 0, 1, 2)
"""Values in the table, in steps from the optimum."""

Point = tuple[float, ...]
"""A value for each axis."""


class Axis(NamedTuple):
    """A parameter to search.

    Attributes:
        name: name in ``config.pbtxt``.
        step: difference of two values.
        least, most: range of its values.
    """

    name: str
    step: float
    least: float
    most: float

    def moved(self, value: float, steps: int) -> float | None:
        """Return a value that is some steps away; None outside the range."""
        moved = round(value + steps * self.step, 6)
        return moved if self.least <= moved <= self.most else None


WEIGHTS = Axis("language_model_weight", 0.1, 0.0, 2.0), Axis("internal_lm_weight", 0.1, 0.0, 1.0)
LANGUAGE_BONUS = Axis("language_model_bonus", 0.3, -5.0, 5.0)
INSERTION_BONUS = Axis("insertion_bonus", 0.3, -5.0, 5.0)
BLANK_PENALTY = Axis("blank_penalty", 0.5, -5.0, 5.0)
PHRASE_BONUS = Axis("phrase_bonus", 0.25, 0.0, 10.0)


def choose_axes(p: Parameters, *, phrases: bool) -> list[Axis]:
    """Return the parameters that matter for a decoder.

    Args:
        p: its parameters, with the beam of recordings.
        phrases: whether phrases are boosted.
    """
    if p.options.beam > 1:
        axes = [*WEIGHTS, LANGUAGE_BONUS] if p.language_model else [INSERTION_BONUS]
    else:
        axes = [*(WEIGHTS if p.language_model else ()), BLANK_PENALTY]
    return [*axes, *([PHRASE_BONUS] if phrases else [])]


def search(start: Point, axes: Sequence[Axis], measure: Callable[[Point], float]) -> Point:
    """Return a point that no step along one axis improves.

    Args:
        start: first point.
        axes: one for each value of a point.
        measure: returns what is to be small; called again for known points.
    """
    best, improved = start, True
    while improved:
        improved = False
        for number, axis in enumerate(axes):
            for direction in (1, -1):
                while (value := axis.moved(best[number], direction)) is not None:
                    other = (*best[:number], value, *best[number + 1 :])
                    if measure(other) >= measure(best):
                        break
                    best, improved = other, True
    return best


@dataclass(frozen=True)
class Sweep:
    """Result of a sweep.

    Attributes:
        axes: the parameters that were searched.
        start, best: their values in the configuration, and the best ones.
        rates: word error rate in per cent of each point that was decoded.
        beam: width of the beam.
    """

    axes: Sequence[Axis]
    start: Point
    best: Point
    rates: Mapping[Point, float]
    beam: int

    def around(self, number: int) -> list[tuple[float, float]]:
        """Return value and word error rate for the steps around the optimum of an axis."""
        points = neighbours(self.best, self.axes, number)
        return [(point[number], self.rates[point]) for point in points]

    def config_lines(self) -> list[str]:
        """Return the lines for ``config.pbtxt``."""
        values = {"beam": f"{self.beam}"} | {axis.name: f"{value:g}" for axis, value in zip(self.axes, self.best, strict=True)}
        return [f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}' for key, value in values.items()]


def neighbours(point: Point, axes: Sequence[Axis], number: int) -> list[Point]:
    """Return the points of the table along one axis."""
    values = (axes[number].moved(point[number], steps) for steps in TABLE_STEPS)
    return [(*point[:number], value, *point[number + 1 :]) for value in values if value is not None]


class Decoding:
    """Decodes recordings with any values of the parameters.

    Args:
        recogniser: the model.
        recordings: labelled recordings, each at most ``max_whole_secs`` long.
        beam: width of the beam; None: the model's, or ``DEFAULT_BEAM`` if the model is decoded greedily.
        phrases: whether the bonus of phrases is searched, too.

    Attributes:
        recordings: the recordings.
        p: parameters of the decoder, with the beam.
        axes: parameters that can be searched.
        start: their values in the configuration.
    """

    def __init__(
        self, recogniser: Recogniser, recordings: Sequence[Recording], beam: int | None = None, *, phrases: bool = False
    ) -> None:
        p = read_parameters(recogniser)
        width = beam or (p.options.beam if p.options.beam > 1 else DEFAULT_BEAM)
        self.recordings = recordings
        self.p = replace(p, options=replace(p.options, context="whole", beam=width))
        self.axes = choose_axes(self.p, phrases=phrases or bool(p.phrases_file))
        self.start: Point = tuple(getattr(p, axis.name) for axis in self.axes)
        self._networks = Networks(recogniser, p)
        self._encode = EncodedOnce(self._networks.encode)

    def texts(
        self, point: Point, phrases: Callable[[Recording], Sequence[str]], done: Callable[[], None] = lambda: None
    ) -> list[str]:
        """Return the transcript of each recording.

        Args:
            point: values of the axes.
            phrases: returns the phrases of a recording.
            done: called after each recording.
        """
        chosen: dict[str, Any] = {axis.name: value for axis, value in zip(self.axes, point, strict=True)}
        p = replace(self.p, **chosen)
        networks = self._networks
        fusions = Fusions(p, networks.pieces[: p.blank], networks.directory, networks.fusions.language_model)

        def make_stream(recording: Recording) -> Stream:
            options = replace(p.options, phrases="\n".join(phrases(recording)))
            return Stream(p, options, fusions.of(options))

        return asyncio.run(decode(networks, p, self.recordings, make_stream, done, self._encode))

    def rate(self, texts: Sequence[str]) -> float:
        """Return the word error rate of transcripts in per cent."""
        words = sum(len(recording.text.split()) for recording in self.recordings)
        return 100 * float(errors(self.recordings, texts).sum()) / words


def sweep(decoding: Decoding, phrases: Callable[[Recording], Sequence[str]], console: Console) -> Sweep:
    """Search the parameters, and show the progress.

    Args:
        decoding: decodes the recordings.
        phrases: returns the phrases of a recording.
        console: shows the progress.
    """
    rates: dict[Point, float] = {}
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("encoding")

        def measure(point: Point) -> float:
            if point not in rates:
                rates[point] = decoding.rate(decoding.texts(point, phrases, lambda: progress.advance(task)))
                progress.update(task, description=f"{len(rates)} choices decoded, best {min(rates.values()):.2f} %")
            return rates[point]

        best = search(decoding.start, decoding.axes, measure)
        for number in range(len(decoding.axes)):
            for point in neighbours(best, decoding.axes, number):
                measure(point)
    return Sweep(decoding.axes, decoding.start, best, rates, decoding.p.options.beam)


def to_markdown(result: Sweep, recordings: Sequence[Recording], directory: Path, model: str) -> str:
    """Return the table around the optimum, and the lines for the configuration."""
    about, words = circumstances(), sum(len(recording.text.split()) for recording in recordings)
    seconds = sum(len(recording.samples) for recording in recordings) / RATE
    description = (
        f"{about['date']}, {about['cpu']}; {len(recordings)} recordings of {seconds:.0f} s and {words} words of "
        f"{directory.name}; beam {result.beam}. Word error rate in per cent by the value of one parameter, the others at their "
        f"best values. The configuration's values give {result.rates[result.start]:.2f}, the best ones "
        f"{result.rates[result.best]:.2f}."
    )
    lines = [
        f"# Sweep of {model}",
        "",
        description,
        "",
        "| parameter | value: word error rate % |" + " |" * (len(TABLE_STEPS) - 1),
        "|---|" + "--:|" * len(TABLE_STEPS),
    ]
    for number, axis in enumerate(result.axes):
        cells = [
            f"**{value:g}: {rate:.2f}**" if value == result.best[number] else f"{value:g}: {rate:.2f}"
            for value, rate in result.around(number)
        ]
        cells += [""] * (len(TABLE_STEPS) - len(cells))
        lines.append(f"| `{axis.name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "For `config.pbtxt` of the decoder:", "", "```", *result.config_lines(), "```", ""])
