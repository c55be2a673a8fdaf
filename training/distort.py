"""What rooms, lines and distance do to speech, so that a few voices stand for many recordings."""

from __future__ import annotations

import numpy as np
import soxr
from scipy.signal import fftconvolve

from training.speech import RATE, Audio

_IN_ROOMS, _OVER_LINES, _IN_NOISE, _AMONG_PEOPLE = 0.4, 0.2, 0.65, 0.3
"""How often; the last is a share of the noises."""


def distort(speech: Audio, others: list[Audio], random: np.random.Generator) -> Audio:
    """Pass speech through a random room, line and noise; `others` may talk in the background."""
    if random.random() < _IN_ROOMS:
        speech = _room(speech, random)
    if random.random() < _OVER_LINES:
        speech = _line(speech)
    if random.random() < _IN_NOISE:
        speech = _mix(speech, _noise(len(speech), others, random), snr_db=random.uniform(5, 30))
    return level(speech, random)


def level(speech: Audio, random: np.random.Generator) -> Audio:
    """Bring the peak to somewhere between -18 and 0 dB of full scale."""
    return np.asarray(speech * (10 ** random.uniform(-0.9, 0.0) / (np.abs(speech).max() + 1e-6)), np.float32)


def stretch(speech: Audio, factor: float) -> Audio:
    """Play slower (above 1) or faster, pitch and all."""
    return np.asarray(soxr.resample(speech, RATE, RATE * factor), np.float32)


def _room(speech: Audio, random: np.random.Generator) -> Audio:
    """Exponentially decaying noise as the room's response, 60 dB down after 0.1 to 0.5 s."""
    count = int(random.uniform(0.1, 0.5) * RATE)
    response = random.standard_normal(count) * np.exp(-6.9 * np.arange(count) / count) * random.uniform(0.02, 0.25)
    response[0] = 1
    return np.asarray(fftconvolve(speech, response)[: len(speech)], np.float32)


def _line(speech: Audio) -> Audio:
    """Leave what a telephone passes of the upper band."""
    narrow = soxr.resample(soxr.resample(speech, RATE, RATE // 2), RATE // 2, RATE)
    return np.asarray(np.resize(narrow, len(speech)), np.float32)


def _noise(count: int, others: list[Audio], random: np.random.Generator) -> Audio:
    """White to brown noise, or one to three people."""
    if others and random.random() < _AMONG_PEOPLE:
        talk = [
            np.roll(np.resize(others[i], count), random.integers(count))
            for i in random.integers(len(others), size=random.integers(1, 4))
        ]
        return np.asarray(sum(talk), np.float32)
    spectrum = np.fft.rfft(random.standard_normal(count))
    return np.asarray(np.fft.irfft(spectrum * (np.arange(len(spectrum)) + 1.0) ** -random.uniform(0, 1.2), count), np.float32)


def _mix(speech: Audio, noise: Audio, snr_db: float) -> Audio:
    gain = np.sqrt(np.mean(speech**2) / (10 ** (snr_db / 10) * np.mean(noise**2) + 1e-12))
    return np.asarray(speech + noise * gain, np.float32)
