"""Detection of speech in noise: its delay, misses and false starts, and its cost.

    python -m perf.voice DIRECTORY [--set NAME] [--recordings N] [--constant NAME=VALUE]

Each recording is heard between 5 s of noise and 2 s of noise. The noise is white, or of 20 other recordings at once (babble).
The signal-to-noise ratio is that of the frames with speech. Speech begins where the recording without noise first stays within
20 dB of its loudest part for 100 ms: most of LibriSpeech begins with half a second of breath and clicks. A start in the first
second of noise counts as any other false one.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gateway.audio import RATE, vad
from gateway.audio.vad import FRAME_SAMPLES, Request, Voice, probabilities
from gateway.audio.vad_batch import VoiceBatch
from gateway.live import speech
from gateway.live.speech import Detection, SpeechDetector
from perf.speech import Samples, read_speech

BEFORE, AFTER = 5 * RATE, 2 * RATE
"""Noise alone around a recording, in samples."""

PIECE = RATE // 50
"""Audio that comes at once, 20 ms."""

EARLY_SECS = 0.3
"""How far before its measured start speech may be detected: breath and weak consonants."""

LASTING = 10
"""How long speech stays loud at its start and end, in steps of 10 ms."""

VOICES = 20
RATIOS_DB = (20, 10, 5)
TARGET_SECS = 0.3

Floats = NDArray[np.float64]


@dataclass
class Row:
    """What was measured with one kind of noise at one ratio."""

    name: str
    delays: list[float] = field(default_factory=list)
    missed: int = 0
    false_starts: int = 0
    noise_secs: float = 0.0

    def __str__(self) -> str:
        """A row of the table."""
        heard = np.array(self.delays or [np.nan])
        total = len(self.delays) + self.missed
        median, high = np.percentile(heard, (50, 95))
        within = np.sum(heard <= TARGET_SECS) / max(1, total)
        per_minute = self.false_starts / self.noise_secs * 60
        return f"| {self.name} | {median:.2f} | {high:.2f} | {within:.0%} | {self.missed} of {total} | {per_minute:.1f} |"


def level_of(samples: Floats, size: int = RATE // 100) -> Floats:
    """The power of each 10 ms."""
    whole = samples[: len(samples) // size * size].reshape(-1, size)
    powers: Floats = np.mean(whole**2, axis=1)
    return powers


def bounds_of(samples: Floats) -> tuple[int, int]:
    """Where speech begins and ends, in samples."""
    powers = level_of(samples)
    loud = powers > np.percentile(powers, 98) / 100
    found = np.flatnonzero(np.convolve(loud, np.ones(LASTING), "valid") == LASTING)
    return int(found[0]) * RATE // 100, int(found[-1] + LASTING) * RATE // 100


def noisy(speech: Floats, noise: Floats, ratio_db: float) -> Samples:
    """Speech with noise before, over and after it."""
    powers = level_of(speech)
    spoken = powers[powers > np.percentile(powers, 98) / 100].mean()
    scaled = noise * np.sqrt(spoken / 10 ** (ratio_db / 10) / np.mean(noise**2))
    scaled[BEFORE : BEFORE + len(speech)] += speech
    clipped: Samples = np.clip(np.rint(scaled), -0x8000, 0x7FFF).astype(np.int16)
    return clipped


def babble(recordings: Sequence[Samples], chosen: Sequence[int], length: int) -> Floats:
    """Several recordings at once, each as loud as the others."""
    mixed = np.zeros(length)
    for index in chosen:
        voice = recordings[index].astype(float)
        mixed += np.resize(voice, length) / max(1.0, float(voice.std()))
    return mixed


def noises(recordings: Sequence[Samples], index: int, length: int, chance: np.random.Generator) -> Iterator[tuple[str, Floats]]:
    """The kinds of noise for one recording."""
    others = [other for other in range(len(recordings)) if other != index]
    yield "white", chance.standard_normal(length)
    yield "babble", babble(recordings, chance.choice(others, VOICES, replace=False).tolist(), length)


async def starts_of(samples: Samples, detection: Detection) -> list[int]:
    """When starts of speech are detected, in samples that had come by then."""
    detector, starts = SpeechDetector(detection, VoiceBatch()), []
    for at in range(0, len(samples), PIECE):
        pieces = await detector.feed(samples[at : at + PIECE])
        starts += [min(at + PIECE, len(samples)) for piece in pieces if piece.change and piece.change.speaking]
    return starts


def measure(recordings: Sequence[Samples], count: int, detection: Detection) -> list[Row]:
    """Measure every noise at every ratio."""
    chance = np.random.default_rng(1)
    rows: dict[str, Row] = {}
    for index in range(count):
        spoken = recordings[index].astype(float)
        first, last = bounds_of(spoken)
        length = BEFORE + len(spoken) + AFTER
        cases = [(kind, noise, ratio) for kind, noise in noises(recordings, index, length, chance) for ratio in RATIOS_DB]
        for kind, noise, ratio in [("hardly any", chance.standard_normal(length), 60), *cases]:
            row = rows.setdefault(f"{kind}, {ratio} dB", Row(f"{kind} | {ratio}"))
            starts = asyncio.run(starts_of(noisy(spoken, noise.copy(), ratio), detection))
            _count(row, starts, BEFORE + first, BEFORE + last)
            row.noise_secs += (BEFORE + AFTER) / RATE
    return list(rows.values())


def _count(row: Row, starts: Sequence[int], first: int, last: int) -> None:
    early = first - round(EARLY_SECS * RATE)
    within = [start for start in starts if early <= start <= last]
    before = [start for start in starts if start < early]
    row.false_starts += len(before) + len([start for start in starts if start > last + RATE // 10])
    if within:
        row.delays.append((within[0] - first) / RATE)
    else:  # or taken for speech before it began
        row.missed += 1


def cost_us(samples: Samples, streams: int, frames: int) -> float:
    """CPU time per frame in microseconds, for calls with this number of frames of each of several streams."""
    voices, size = [Voice() for _ in range(streams)], frames * FRAME_SAMPLES
    pieces = [samples[at : at + size] for at in range(0, len(samples) // size * size, size)]
    began = time.process_time()
    for piece in pieces:
        probabilities([Request(voice, piece, np.ones(frames, bool), np.zeros(frames, bool)) for voice in voices])
    return (time.process_time() - began) / (len(pieces) * streams * frames) * 1e6


def override(constants: Sequence[str]) -> None:
    """Give constants of the detector other values, each as NAME=VALUE."""
    for constant in constants:
        name, _, value = constant.partition("=")
        module = next(module for module in (speech, vad) if hasattr(module, name))
        setattr(module, name, type(getattr(module, name))(float(value)))


def main() -> None:
    """Read the command line, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="recordings")
    parser.add_argument("--set", help="part of them, by the column of this name in their manifest")
    parser.add_argument("--recordings", type=int, default=50, help="how many are measured")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability that counts as speech")
    parser.add_argument("--constant", action="append", default=[], help="of gateway/live/speech.py or gateway/audio/vad.py")
    arguments = parser.parse_args()
    override(arguments.constant)
    recordings = read_speech(arguments.directory, arguments.set)[: max(arguments.recordings, VOICES + 1)]
    print("| noise | SNR, dB | delay p50, s | p95, s | within 0.3 s | missed | false starts per minute of noise |")
    print("|---|---|---|---|---|---|---|")
    for row in measure(recordings, min(arguments.recordings, len(recordings)), Detection(arguments.threshold)):
        print(row)
    joined = np.concatenate(recordings)[: 20 * RATE]
    for streams, frames in ((1, 1), (1, 3), (1, 16), (10, 3), (20, 3)):
        cost = cost_us(joined, streams, frames)
        print(f"{frames} frames of {streams} streams at once: {cost:.0f} µs of CPU per frame of 32 ms")


if __name__ == "__main__":
    main()
