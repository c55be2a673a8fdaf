"""Measure word error rate and encoder time by left context, chunk and right context of the windows.

    python -m perf.windows SPEECH_DIR [--quick] [--repository DIR] [--model NAME]

SPEECH_DIR has labelled recordings, as for ``perf.evaluate``. Each recording is a stream, cut and decoded in this process by the
decoder's own code, with ONNX Runtime sessions like Triton's. The results of the bundled model are written to
``perf/results/windows.md`` and ``windows.json``, the plot to ``docs/windows.png``; those of another model are only printed.
perf/README.md defines the columns.
"""

from __future__ import annotations

import argparse
import asyncio
import queue
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jiwer
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from amira.models.configs import ModelError
from amira.models.repository import Recogniser
from amira.paths import MODEL_REPOSITORY, ROOT
from gateway.audio import RATE
from perf.evaluate import Recording, normalise, read_speech
from perf.floor import FrontEnd, open_graph
from perf.output import circumstances, publish
from perf.plots import draw_windows
from perf.recogniser import choose, joint_step
from perf.speech import Samples

sys.path += [str(MODEL_REPOSITORY / model / "1") for model in ("rnnt_greedy_bls", "detokenizer")]
from batching import Decoder, Encoded, Encoder, recognise
from greedy import JointOutputs
from parameters import LATENCIES, Geometry, Parameters
from stream import Stream
from vocabulary import continuations, read_vocabulary
from windows import Window
from words import text_of, words_of

SESSIONS = 2
"""Number of encoder sessions with one thread each, as in ``instance_group`` of the encoder."""

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
    """Results of one geometry.

    Attributes:
        latencies: names of the model's latencies with this geometry.
        left_secs, chunk_secs, right_secs: the geometry.
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


class Networks:
    """The three graphs with the interfaces that the decoder calls."""

    def __init__(self, recogniser: Recogniser) -> None:
        self._idle: queue.SimpleQueue[FrontEnd] = queue.SimpleQueue()
        for _ in range(SESSIONS):
            self._idle.put(FrontEnd(recogniser.preprocessor, recogniser.encoder, threads=1))
        self.step = joint_step(open_graph(recogniser.decoder_joint, 1))
        self.pieces = read_vocabulary(recogniser.vocabulary)

    def encode(self, windows: Sequence[Window], exclusive: bool = False) -> list[Encoded]:  # noqa: ARG002 (an ``Encode``)
        """Encode windows of equal length in one call."""
        return self.encode_samples([window.samples for window in windows])

    def encode_samples(self, windows: Sequence[Samples]) -> list[Encoded]:
        """Encode audio of equal length in one call."""
        front_end = self._idle.get()
        try:
            waveforms = np.stack(windows).astype(np.float32) / np.float32(32768)
            features, lengths = front_end.preprocess(waveforms, np.full(len(windows), waveforms.shape[1], np.int64))
            frames, encoded = front_end.encode(features, lengths)
        finally:
            self._idle.put(front_end)
        return [Encoded(frames[b, :, : encoded[b]], int(lengths[b])) for b in range(len(windows))]


async def transcribe(
    networks: Networks, p: Parameters, geometry: Geometry, recordings: Sequence[Recording], done: Callable[[], None]
) -> list[str]:
    """Return the normalised texts of recordings that are decoded as streams with a geometry.

    Args:
        networks: the graphs.
        p: parameters of the decoder.
        geometry: geometry of the windows.
        recordings: the recordings.
        done: called after each recording.
    """
    pieces = networks.pieces
    p = replace(p, geometries={p.options.latency: geometry}, continuations=continuations(pieces[: p.blank]))
    encoder = Encoder(networks.encode, SESSIONS, p.windows_per_call)
    decoder = Decoder(networks.step, JointOutputs(p.blank, p.durations, p.blank_penalty), p.block_frames, encoder.is_busy)

    async def one(recording: Recording) -> str:
        stream = Stream(p, p.options)
        stream.push(recording.samples)
        answer = await recognise(stream, encoder, decoder, end=True)
        done()
        starts, ends = zip(*answer.spans, strict=True) if answer.spans else ((), ())
        words = words_of([pieces[token.id] for token in answer.tokens], starts, ends, [1.0] * len(starts))
        return normalise(text_of(words, segment=0))

    return list(await asyncio.gather(*map(one, recordings)))


def window_secs(networks: Networks, windows: Mapping[Geometry, Samples], done: Callable[[], None]) -> dict[Geometry, float]:
    """Return the CPU time of a window of each geometry while all sessions work; geometries alternate."""
    turns: dict[Geometry, list[float]] = {geometry: [] for geometry in windows}

    def work(window: Samples) -> float:
        began = time.thread_time()  # CPU time of this thread, without other load on the machine
        networks.encode_samples([window])
        return time.thread_time() - began

    with ThreadPoolExecutor(SESSIONS) as threads:
        for _ in range(TURNS):
            for geometry, window in windows.items():
                turns[geometry].append(statistics.fmean(threads.map(work, [window] * TURN_WINDOWS)))
                done()
    return {geometry: statistics.median(secs) for geometry, secs in turns.items()}


def errors(recordings: Sequence[Recording], texts: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of substitutions, deletions and insertions in each recording."""
    counts = [jiwer.process_words(recording.text, text) for recording, text in zip(recordings, texts, strict=True)]
    return np.array([count.substitutions + count.deletions + count.insertions for count in counts])


def geometries(p: Parameters, quick: bool) -> list[Geometry]:
    """Return the geometries to measure: ``balanced``, the model's others, then all others unless `quick`."""
    own = sorted(p.geometries.items(), key=lambda item: item[0] != p.options.latency)
    others = [] if quick else [Geometry(*(round(s * RATE / p.frame_samples) for s in secs)) for secs in GEOMETRIES_SECS]
    return list(dict.fromkeys([*(geometry for _, geometry in own), *others]))


def measure(directory: Path, quick: bool, recogniser: Recogniser) -> dict[str, Any]:
    """Measure every geometry, and return the report."""
    p = Parameters.from_config({"parameters": {name: {"string_value": value} for name, value in recogniser.parameters.items()}})
    networks, recordings, chosen = Networks(recogniser), read_speech(directory), geometries(p, quick)
    everything = np.concatenate([recording.samples for recording in recordings])
    windows = {geometry: np.resize(everything, sum(geometry) * p.frame_samples) for geometry in chosen}
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("time of windows", total=TURNS * len(chosen))
        secs = window_secs(networks, windows, lambda: progress.advance(task))
        task = progress.add_task("word error rates", total=len(recordings) * len(chosen))
        texts = [
            asyncio.run(transcribe(networks, p, geometry, recordings, lambda: progress.advance(task))) for geometry in chosen
        ]
    frame_secs = p.frame_samples / RATE
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
                ", ".join(latency for latency in LATENCIES if p.geometries[latency] == geometry),
                round(geometry.left_frames * frame_secs, 3),
                round(geometry.chunk_frames * frame_secs, 3),
                round(geometry.right_frames * frame_secs, 3),
                round(100 * float(counts.sum()) / words, 1),
                round(100 * float((counts - wrong[0]).sum()) / words, 1),
                round(100 * float(np.std(counts - wrong[0])) * len(recordings) ** 0.5 / words, 1),
                round(1000 * secs[geometry], 1),
                round(SESSIONS * geometry.chunk_frames * frame_secs / secs[geometry], 1),
            )._asdict()
            for geometry, counts in zip(chosen, wrong, strict=True)
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
        if recogniser.is_cached:
            raise ModelError(f"{recogniser.name} has a cached encoder, so it has no windows to choose from")
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
