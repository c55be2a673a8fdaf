"""Read recordings to measure with, and cut and join them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gateway.audio import RATE
from gateway.audio.files import decode_audio
from gateway.errors import ApiError
from perf.server import PerfError

Samples = NDArray[np.int16]
"""16 kHz audio [n]."""

AUDIO_SUFFIXES = frozenset((".flac", ".ogg", ".opus", ".wav"))


def read_speech(directory: Path, part: str | None = None) -> list[Samples]:
    """Read the recordings of a directory: those in its ``manifest.tsv``, or all audio files without a manifest.

    Args:
        directory: of the recordings.
        part: value of the manifest's column ``set`` that is read; None for all.

    Raises:
        PerfError: a recording cannot be decoded, or there is none.
    """
    manifest = directory / "manifest.tsv"
    if manifest.is_file():
        with manifest.open(encoding="utf-8") as lines:
            rows = csv.DictReader(lines, delimiter="\t")
            paths = [directory / row["file"] for row in rows if part is None or row.get("set") == part]
    else:
        paths = sorted(path for path in directory.iterdir() if path.suffix.lower() in AUDIO_SUFFIXES)
    recordings = []
    for path in paths:
        try:
            recordings.append(decode_audio(path.read_bytes(), "audio/wav", max_secs=3600))
        except ApiError as error:
            raise PerfError(f"{path}: {error}") from None
    if not recordings:
        raise PerfError(f"{directory} has no recordings ({', '.join(sorted(AUDIO_SUFFIXES))})")
    return recordings


def cut(samples: Samples, size: int) -> list[Samples]:
    """Cut audio into pieces of `size` samples; the last may be shorter."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def join(recordings: Sequence[Samples], secs: float) -> Samples:
    """Concatenate recordings to exactly `secs` seconds; repeat them if they are too short."""
    return np.concatenate(repeat(recordings, secs))[: round(secs * RATE)]


def repeat(recordings: Sequence[Samples], secs: float) -> list[Samples]:
    """Return the first recordings that last at least `secs` seconds; repeat them if they are too short."""
    chosen: list[Samples] = []
    samples = 0
    for recording in cycle(recordings):
        chosen.append(recording)
        samples += len(recording)
        if samples >= secs * RATE:
            return chosen
    raise ValueError("no recordings")


def audio_secs(recordings: Sequence[Samples]) -> float:
    """Return the total length of recordings in seconds."""
    return sum(map(len, recordings)) / RATE
