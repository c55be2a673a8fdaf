"""Read labelled recordings, and synthesise speech."""

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

HIBARI_RATE = 24_000
_VOICED_HZ = 40.0
"""Lowest pitch of voiced frames; hibari's network marks unvoiced frames by a lower one."""
_REST_DB = -6.0
"""Gain of hibari's component with fixed phases per octave of pitch change: the component fits only the original pitch."""
_PROGRAMS = {"flite": "flite", "espeak": "espeak-ng"}
_FLITE = ("kal16", "awb", "rms", "slt")
_ESPEAK = ("en-us", "en-gb", "en-gb-scotland", "en-us+f3", "en-gb+m3", "en-us+m7", "en-gb+f2")


@dataclass(frozen=True)
class Recording:
    """A labelled recording.

    Attributes:
        path: the audio file.
        set: name of the set that the recording belongs to.
        text: normalised transcript.
    """

    path: Path
    set: str
    text: str

    def read(self) -> Audio:
        """Return the samples [n], 16 kHz mono."""
        samples, rate = soundfile.read(self.path, dtype="float32", always_2d=True)
        return np.asarray(soxr.resample(samples.mean(axis=1), rate, RATE), np.float32)


def recordings(directory: Path) -> list[Recording]:
    """Read a directory's manifest.tsv: columns `file` and `text`, and optionally `set` or `source`.

    Raises:
        FileNotFoundError: the manifest or a file that it names is missing.
    """
    with (directory / "manifest.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    found = [
        Recording(directory / row["file"], row.get("set") or row.get("source") or directory.name, normalise(row["text"]))
        for row in rows
    ]
    for recording in found:
        if not recording.path.is_file():
            raise FileNotFoundError(f"{directory}/manifest.tsv names {recording.path.name}, which is missing")
    return found


def check_installed(voices: Iterable[str]) -> None:
    """Check that the programs of the voices are installed.

    Raises:
        FileNotFoundError: a program is missing.
    """
    missing = [program for voice, program in _PROGRAMS.items() if voice in voices and not shutil.which(program)]
    if missing:
        raise FileNotFoundError(f"{' and '.join(missing)} not found: apt-get install {' '.join(missing)}")


@dataclass(frozen=True)
class Character:
    """Voice parameters of one item.

    Attributes:
        speed: factor of the speaking rate.
        pitch: factor of the fundamental frequency.
        melody: factor of the pitch range in octaves.
        formants: factor of the formant frequencies; above 1 for a shorter vocal tract.
        breath_db: gain of the noise component.
        variety: seed of all other random choices of a voice.
    """

    speed: float
    pitch: float
    melody: float
    formants: float
    breath_db: float
    variety: int


def character(random: np.random.Generator) -> Character:
    """Draw voice parameters. A low pitch usually comes with low formants, as with a long vocal tract."""
    octaves = random.uniform(-1.1, 0.35)
    return Character(
        speed=float(np.exp(random.normal(0.0, 0.15)).clip(0.75, 1.3)),
        pitch=float(2**octaves),
        melody=float(random.uniform(0.6, 1.5)),
        formants=float(2 ** (0.16 * octaves + random.normal(0.03, 0.05))),
        breath_db=float(random.uniform(-4, 8)),
        variety=int(random.integers(1 << 30)),
    )


class Voices:
    """Synthetic voices: hibari (one neural voice), and the programs flite and espeak-ng.

    Each item has its own character. Hibari's network outputs pitch, formants and noise, which are changed separately. With
    flite, pitch and formants change together, by resampling speech that was synthesised faster or slower.

    Args:
        shares: relative frequency of each voice.
    """

    def __init__(self, shares: Mapping[Any, float]) -> None:
        self._names = list(shares)
        self._shares = np.array(list(shares.values())) / sum(shares.values())
        self._hibari = Hibari() if "hibari" in shares else None

    def speak(self, sentences: list[str], random: np.random.Generator) -> tuple[str, Audio]:
        """Synthesise sentences with one voice and pauses; return the voice's name and the samples at 16 kHz."""
        name = str(random.choice(self._names, p=self._shares))
        how = character(random)
        parts = [_silence(random, 0.5)]
        for sentence in sentences:
            samples, rate = getattr(self, f"_speak_{name}")(sentence, how)
            parts += [np.asarray(soxr.resample(samples, rate, RATE), np.float32), _silence(random, 0.6)]
        spoken = np.concatenate(parts)
        return name, spoken / (np.abs(spoken).max() + 1e-6)

    def _speak_hibari(self, sentence: str, how: Character) -> tuple[Audio, float]:
        if self._hibari is None:
            raise RuntimeError("hibari is not among the voices")
        return self._hibari(sentence, how), HIBARI_RATE

    @staticmethod
    def _speak_flite(sentence: str, how: Character) -> tuple[Audio, float]:
        voice, pitch = _FLITE[how.variety % len(_FLITE)], how.formants**1.5
        samples, rate = _run(
            "flite", "-voice", voice, "--setf", f"duration_stretch={pitch / how.speed:.2f}", "-t", sentence, "-o"
        )
        return samples, rate * pitch

    @staticmethod
    def _speak_espeak(sentence: str, how: Character) -> tuple[Audio, float]:
        voice, pitch = _ESPEAK[how.variety % len(_ESPEAK)], 25 + how.variety // 7 % 45
        return _run("espeak-ng", "-v", voice, "-s", f"{160 * how.speed:.0f}", "-p", f"{pitch}", sentence, "-w")


class Hibari:
    """The voice of the wheel `hibari-tts`. The network's outputs are changed before the waveform is synthesised."""

    def __init__(self) -> None:
        from hibari import Hibari as Model  # noqa: PLC0415 - the import takes a second, and only this voice needs it
        from hibari import dsp  # noqa: PLC0415

        self._model, self._dsp = Model(threads=1), dsp

    def __call__(self, sentence: str, how: Character) -> Audio:
        """Return the samples of a sentence at 24 kHz."""
        random = np.random.default_rng(how.variety)
        parts = [self._say(self._model.ids(sounds), how, random) for sounds in self._model.phonemize(sentence)]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _say(self, ids: list[int], how: Character, random: np.random.Generator) -> Audio:
        feed = {"ids": np.array([ids], np.int64), "speed": np.array([how.speed], np.float32)}
        harmonic, turn, noise, rest, phase, pitch = (o[0] for o in self._model.sess.run(None, feed))
        harmonic, turn, noise, rest = (_stretched(x, how.formants) for x in (harmonic, turn, noise, rest))
        noise += how.breath_db * np.log(10) / 20
        rest += _REST_DB * np.log(10) / 20 * min(1.0, abs(np.log2(how.pitch)))
        voiced = pitch > _VOICED_HZ
        if voiced.any():
            middle = np.exp(np.log(pitch[voiced]).mean())
            changed = middle * how.pitch * (pitch[voiced] / middle) ** how.melody
            pitch[voiced] = changed.clip(_VOICED_HZ + 5, 600)
        return np.asarray(self._dsp.synth(harmonic, turn, noise, rest, phase, pitch, random), np.float32)


def _stretched(spectra: NDArray[np.float32], factor: float) -> NDArray[np.float32]:
    """Stretch log spectra [bins, F] along the frequency axis; bins above the highest one repeat it."""
    place = (np.arange(len(spectra)) / factor).clip(0, len(spectra) - 1.001)
    first = place.astype(int)
    part = (place - first).astype(np.float32)[:, None]
    return np.asarray(spectra[first] * (1 - part) + spectra[first + 1] * part, np.float32)


def _run(*command: str) -> tuple[Audio, int]:
    with tempfile.NamedTemporaryFile(suffix=".wav") as file:
        subprocess.run([*command, file.name], check=True, stdout=subprocess.DEVNULL)  # noqa: S603 - our own words
        samples, rate = soundfile.read(file.name, dtype="float32")
    return samples, rate


def _silence(random: np.random.Generator, most_secs: float) -> Audio:
    return np.zeros(int(random.uniform(0, most_secs) * RATE), np.float32)


def grouped(sentences: list[str], random: np.random.Generator) -> Iterator[list[str]]:
    """Group neighbouring sentences into items of one to three: speech does not always pause after a sentence."""
    at = 0
    while at < len(sentences):
        count = int(random.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))
        yield sentences[at : at + count]
        at += count
