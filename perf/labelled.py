"""Read labelled recordings, and count the errors of transcripts."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jiwer
import numpy as np
import numpy.typing as npt

from gateway.audio.files import decode_audio

MAX_SECS = 3600
"""Maximum length of a recording in seconds."""


class Recording(NamedTuple):
    """A labelled recording.

    Attributes:
        name: name of the file.
        body: bytes of the file.
        samples: 16 kHz audio [n].
        text: normalised transcript.
        set: its set or source.
    """

    name: str
    body: bytes
    samples: npt.NDArray[np.int16]
    text: str
    set: str


def read_speech(directory: Path) -> list[Recording]:
    """Read the labelled recordings of a directory.

    Its tab-separated ``manifest.tsv`` has the columns file and text, and set or source for rates by origin.
    """
    recordings = []
    with (directory / "manifest.tsv").open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines, delimiter="\t"):
            body = (directory / row["file"]).read_bytes()
            samples = decode_audio(body, "application/octet-stream", MAX_SECS)
            origin = row.get("set") or row.get("source") or directory.name
            recordings.append(Recording(row["file"], body, samples, normalise(row["text"]), origin))
    return recordings


def normalise(text: str) -> str:
    """Return a text in lower case, with words and apostrophes only."""
    return " ".join(re.sub(r"[^\w' ]", " ", text.lower()).split())


def errors(recordings: Sequence[Recording], texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return the number of substitutions, deletions and insertions in each recording."""
    counts = [jiwer.process_words(recording.text, text) for recording, text in zip(recordings, texts, strict=True)]
    return np.array([count.substitutions + count.deletions + count.insertions for count in counts])
