"""Measure word error rate and encoder time of windows by their parts, or of a cached encoder by its latencies.

    python -m perf.windows SPEECH_DIR [--quick] [--repository DIR] [--model NAME]

SPEECH_DIR has labelled recordings, as for ``perf.evaluate``. Each recording is a stream, cut and decoded in this process by the
decoder's own code, with ONNX Runtime sessions like Triton's. The results of the bundled model are written to
``perf/results/windows.md`` and ``windows.json``, the plot to ``docs/windows.png``; those of another model are only printed.
perf/README.md defines the columns.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from amira.models.configs import ModelError
from amira.models.repository import Recogniser
from amira.paths import MODEL_REPOSITORY, ROOT
from gateway.audio import RATE
from gateway.triton.geometry import Windows, read_windows
from perf.labelled import Recording, errors, read_speech
from perf.networks import SESSIONS, Networks, decode, read_parameters
from perf.output import circumstances, publish
from perf.plots import draw_windows
from perf.recogniser import choose
from perf.server import PerfError
from perf.speech import Samples

sys.path += [str(MODEL_REPOSITORY / model / "1") for model in ("rnnt_greedy_bls", "detokenizer")]
from fusions import Fusions
from parameters import LATENCIES, Geometry, Parameters
from stream import Stream
from windows import Window

GEOMETRIES_SECS = (
    (3.0, 0.4, 0.5),
    (3.0, 0.6, 0.2),
    (3.0, 0.6, 0.5),
    (3.0, 1.0, 0.2),
    (1.9, 1.0, 0.5),
    (3.0, 1.0, 0.5),
    (4.0, 1.0, 0.5),
    (6.0, 1.0, 0.5),
    (3.0, 1.0, 1.0),
    (3.0, 1.4, 0.5),
    (1.9, 1.9, 0.5),
    (3.0, 1.9, 0.5),
    (1.9, 2.9, 0.5),
    (3.0, 2.9, 0.5),
)
"""Left context, chunk and right context; each is rounded to the model's frames. The model's own geometries come first."""

TURNS, TURN_WINDOWS = 5, 6


class Point(NamedTuple):
    """Results of one kind of windows.

    Attributes:
        latencies: names of the model's latencies with these windows.
        left_secs, chunk_secs, right_secs: parts of the windows; a cached encoder's hold what its features need.
        wer: word error rate in percent.
        wer_more: difference to ``balanced`` in percent of the words.
        wer_more_error: standard error of the difference, from the differences of single recordings.
        window_ms: CPU time of preprocessor and encoder for a full window on one thread while the other sessions work too.
        streams: number of streams that all sessions can carry: chunk length over window time, times the sessions.
    """

    latencies: str
    left_secs: float
    chunk_secs: float
    right_secs: float
    wer: float
    wer_more: float
    wer_more_error: float
    window_ms: float
    streams: float


class Variant(NamedTuple):
    """Windows to measure.

    Attributes:
        latencies: names of the model's latencies with these windows.
        latency: the latency that selects them.
        windows: their parts in samples.
        parameters: of a decoder that has them.
    """

    latencies: str
    latency: str
    windows: Windows
    parameters: Parameters

    def stream(self, fusions: Fusions) -> Stream:
        """Return a stream with these windows, which is decoded as the server would do it."""
        options = self.parameters.options.override({"latency": self.latency})
        return Stream(self.parameters, options, fusions.of(options))


async def transcribe(
    networks: Networks, variant: Variant, recordings: Sequence[Recording], done: Callable[[], None]
) -> list[str]:
    """Return the normalised texts of recordings that are decoded as streams.

    Args:
        networks: the graphs.
        variant: windows of the streams.
        recordings: the recordings.
        done: called after each recording.
    """
    return await decode(networks, variant.parameters, recordings, lambda _: variant.stream(networks.fusions), done)


def full_window(networks: Networks, variant: Variant, speech: Samples) -> Window:
    """Return a window of a stream with its whole left context, or with a cache that the windows before it filled."""
    windows, stream = variant.windows, variant.stream(networks.fusions)
    before = windows.left // windows.chunk + 1
    stream.push(np.resize(speech, windows.chunk_due(before)))
    for _ in range(before):
        window = _next(stream)
        stream.receive(window, *networks.encode([window])[0])
    return _next(stream)


def _next(stream: Stream) -> Window:
    window = stream.next_window(end=False)
    if window is None:
        raise PerfError("the decoder and the gateway disagree about when a window is complete")
    return window


def window_secs(networks: Networks, windows: Sequence[Window], done: Callable[[], None]) -> list[float]:
    """Return the CPU time of each window while all sessions work; windows alternate."""
    turns: list[list[float]] = [[] for _ in windows]

    def work(window: Window) -> float:
        began = time.thread_time()  # CPU time of this thread, without other load on the machine
        networks.encode([window])
        return time.thread_time() - began

    with ThreadPoolExecutor(SESSIONS) as threads:
        for _ in range(TURNS):
            for secs, window in zip(turns, windows, strict=True):
                secs.append(statistics.fmean(threads.map(work, [window] * TURN_WINDOWS)))
                done()
    return [statistics.median(secs) for secs in turns]


def variants(recogniser: Recogniser, p: Parameters, quick: bool) -> list[Variant]:
    """Return the windows to measure: ``balanced``, the model's others, then all others unless `quick`.

    The windows of a cached encoder are those that the model has, since a graph fixes them.
    """
    in_order = sorted(LATENCIES, key=lambda latency: latency != p.options.latency)
    own = read_windows(recogniser.parameters)
    kinds = p.cached.encoders if p.cached else p.geometries
    found = []
    for kind in dict.fromkeys(kinds[latency] for latency in in_order):
        names = [latency for latency in in_order if kinds[latency] == kind]
        found.append(Variant(", ".join(names), names[0], own[names[0]], p))
    if p.cached or quick:
        return found
    known = {variant.windows for variant in found}
    for secs in GEOMETRIES_SECS:
        geometry = Geometry(*(round(s * RATE / p.frame_samples) for s in secs))
        windows = Windows(*(frames * p.frame_samples for frames in geometry))
        if windows not in known:
            known.add(windows)
            others = replace(p, geometries=dict.fromkeys(LATENCIES, geometry))
            found.append(Variant("", p.options.latency, windows, others))
    return found


def measure(directory: Path, quick: bool, recogniser: Recogniser) -> dict[str, Any]:
    """Measure all windows, and return the report."""
    p = read_parameters(recogniser)
    networks, recordings, chosen = Networks(recogniser, p), read_speech(directory), variants(recogniser, p, quick)
    speech = np.concatenate([recording.samples for recording in recordings])
    windows = [full_window(networks, variant, speech) for variant in chosen]
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("time of windows", total=TURNS * len(chosen))
        secs = window_secs(networks, windows, lambda: progress.advance(task))
        task = progress.add_task("word error rates", total=len(recordings) * len(chosen))
        texts = [asyncio.run(transcribe(networks, variant, recordings, lambda: progress.advance(task))) for variant in chosen]
    words = sum(len(recording.text.split()) for recording in recordings)
    wrong = [errors(recordings, text) for text in texts]
    return {
        **circumstances(),
        "quick": quick,
        "sessions": SESSIONS,
        "recordings": len(recordings),
        "seconds": round(sum(len(recording.samples) for recording in recordings) / RATE),
        "words": words,
        "points": [
            Point(
                variant.latencies,
                round(variant.windows.left / RATE, 3),
                round(variant.windows.chunk / RATE, 3),
                round(variant.windows.right / RATE, 3),
                round(100 * float(counts.sum()) / words, 1),
                round(100 * float((counts - wrong[0]).sum()) / words, 1),
                round(100 * float(np.std(counts - wrong[0])) * len(recordings) ** 0.5 / words, 1),
                round(1000 * window_time, 1),
                round(SESSIONS * variant.windows.chunk / RATE / window_time, 1),
            )._asdict()
            for variant, counts, window_time in zip(chosen, wrong, secs, strict=True)
        ],
    }


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return the report as a Markdown page."""
    titles = ("", "left s", "chunk s", "right s", "latency s", "word error rate %", "above balanced", "window ms", "streams")
    lines = [
        f"| {point.latencies} | {point.left_secs:.2f} | {point.chunk_secs:.2f} | {point.right_secs:.2f} "
        f"| {point.chunk_secs + point.right_secs:.2f} | {point.wer:.1f} "
        f"| {point.wer_more:+.1f} ± {point.wer_more_error:.1f} | {point.window_ms:.1f} | {point.streams:.0f} |"
        for point in sorted(
            (Point(**point) for point in report["points"]), key=lambda point: point.chunk_secs + point.right_secs
        )
    ]
    about = (
        f"{report['date']}, {report['cpu']}, {report['cores']} cores; {report['recordings']} recordings of "
        f"{report['seconds']} s and {report['words']} words. perf/README.md defines the columns."
    )
    return "\n".join(
        [
            f"# Windows{' (quick)' if report['quick'] else ''}",
            "",
            about,
            "",
            f"| {' | '.join(titles)} |",
            f"|---{'|--:' * (len(titles) - 1)}|",
            *lines,
            "",
        ]
    )


def main() -> None:
    """Parse the command line, measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="SPEECH_DIR", help="directory of recordings with a manifest.tsv")
    parser.add_argument("--quick", action="store_true", help="only the model's own geometries")
    parser.add_argument("--repository", type=Path, default=MODEL_REPOSITORY, help="model repository; default: the bundled one")
    parser.add_argument("--model", help="ensemble of the repository; optional if there is only one")
    arguments = parser.parse_args()
    try:
        recogniser = choose(arguments.repository, arguments.model)
    except ModelError as error:
        parser.error(str(error))
    report = measure(arguments.directory, arguments.quick, recogniser)
    page = to_markdown(report)
    if arguments.repository.resolve() == MODEL_REPOSITORY:
        publish("windows", report, page)
        draw_windows(report, ROOT / "docs" / "windows.png")
    print(page)


if __name__ == "__main__":
    main()
