"""Where speech comes from: synthetic voices, and labelled recordings."""

from __future__ import annotations

import csv
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from training.text import normalise

RATE = 16_000
Audio = NDArray[np.float32]

_CHANGED_PITCH = 0.7
_PROGRAMS = {"flite": "flite", "espeak": "espeak-ng"}
_FLITE = ("kal16", "awb", "rms", "slt")
_ESPEAK = ("en-us", "en-gb", "en-gb-scotland", "en-us+f3", "en-gb+m3", "en-us+m7", "en-gb+f2")


@dataclass(frozen=True)
class Recording:
    """A labelled recording; `set` groups those of one origin, text is normalised."""

    path: Path
    set: str
    text: str

    def read(self) -> Audio:
        """Return the samples, one channel at 16 kHz."""
        samples, rate = soundfile.read(self.path, dtype="float32", always_2d=True)
        return np.asarray(soxr.resample(samples.mean(axis=1), rate, RATE), np.float32)


def recordings(directory: Path) -> list[Recording]:
    """Read a directory's manifest.tsv: columns `file` and `text`, and `set` or `source` where there are several.

    Raises:
        FileNotFoundError: There is no manifest, or no file that it names.
    """
    with (directory / "manifest.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    found = [
        Recording(directory / row["file"], row.get("set") or row.get("source") or directory.name, normalise(row["text"]))
        for row in rows
    ]
    for recording in found:
        if not recording.path.is_file():
            raise FileNotFoundError(f"{directory}/manifest.tsv names {recording.path.name}, which is not there")
    return found


def check_installed(voices: Iterable[str]) -> None:
    """Look for the programs that some voices are.

    Raises:
        FileNotFoundError: One is missing.
    """
    missing = [program for voice, program in _PROGRAMS.items() if voice in voices and not shutil.which(program)]
    if missing:
        raise FileNotFoundError(f"{' and '.join(missing)} not found: apt-get install {' '.join(missing)}")


class Voices:
    """Synthetic voices: hibari (one good neural voice), flite and espeak (programs of these names).

    Each sentence gets its own speed and pitch, and formants with it, by resampling what was spoken faster or slower.
    """

    def __init__(self, shares: Mapping[Any, float]) -> None:
        self._names = list(shares)
        self._shares = np.array(list(shares.values())) / sum(shares.values())
        if "hibari" in shares:
            from hibari import Hibari  # noqa: PLC0415 - takes a second, and only this voice needs it

            self._hibari = Hibari(threads=1)

    def speak(self, sentences: list[str], random: np.random.Generator) -> tuple[str, Audio]:
        """Say the sentences with one voice, a pause between them; return the voice's name and the samples."""
        name = str(random.choice(self._names, p=self._shares))
        pitch = float(random.uniform(0.8, 1.22)) if random.random() < _CHANGED_PITCH else 1.0
        speed = float(random.uniform(0.85, 1.25))
        variety = int(random.integers(1 << 30))
        parts = [_silence(random, 0.5)]
        for sentence in sentences:
            samples, rate = getattr(self, f"_speak_{name}")(sentence, speed / pitch, variety)
            parts += [np.asarray(soxr.resample(samples, rate * pitch, RATE), np.float32), _silence(random, 0.6)]
        spoken = np.concatenate(parts)
        return name, spoken / (np.abs(spoken).max() + 1e-6)

    def _speak_hibari(self, sentence: str, speed: float, variety: int) -> tuple[Audio, int]:
        return np.asarray(self._hibari(sentence, speed=speed, seed=variety), np.float32), 24_000

    @staticmethod
    def _speak_flite(sentence: str, speed: float, variety: int) -> tuple[Audio, int]:
        voice = _FLITE[variety % len(_FLITE)]
        return _run("flite", "-voice", voice, "--setf", f"duration_stretch={1 / speed:.2f}", "-t", sentence, "-o")

    @staticmethod
    def _speak_espeak(sentence: str, speed: float, variety: int) -> tuple[Audio, int]:
        voice, pitch = _ESPEAK[variety % len(_ESPEAK)], 25 + variety // 7 % 45
        return _run("espeak-ng", "-v", voice, "-s", f"{160 * speed:.0f}", "-p", f"{pitch}", sentence, "-w")


def _run(*command: str) -> tuple[Audio, int]:
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run([*command, file.name], check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own words
        samples, rate = soundfile.read(file.name, dtype="float32")
    return samples, rate


def _silence(random: np.random.Generator, most_secs: float) -> Audio:
    return np.zeros(int(random.uniform(0, most_secs) * RATE), np.float32)


def grouped(sentences: list[str], random: np.random.Generator) -> Iterator[list[str]]:
    """Join neighbouring sentences to items of one to three, since people don't stop after each."""
    at = 0
    while at < len(sentences):
        count = int(random.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))
        yield sentences[at : at + count]
        at += count
