"""Augment speech with random rooms, telephone lines and noise, for each batch, on the training device.

Input and output are batches of rows [B, N] at 16 kHz with `lengths` [B] in samples; each row is zero after its length.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.speech import RATE

_IN_ROOMS, _OVER_LINES, _COLOURED, _IN_NOISE, _AMONG_PEOPLE = 0.4, 0.12, 0.7, 0.65, 0.3
"""Probabilities of each distortion per row; the last is the share of noises that are other speakers."""
_PLAYED_FASTER, _FASTEST = 0.6, 1.12
"""Probability and largest factor of a changed speed, which changes the pitch too."""
_TAPS = 12
_BANDS_HZ = (60.0, 150.0, 300.0, 600.0, 1200.0, 2400.0, 4800.0, 8000.0)
_NOISE_DB, _LEVEL_DB = (5.0, 35.0), (-18.0, 0.0)


class Distorter:
    """Draws distortions from its own random generator, so that a training is reproducible."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._random = torch.Generator(device).manual_seed(seed)
        self._speeds = np.random.default_rng(seed)  # on the host, which computes the lengths from the speeds

    def speeds(self, count: int) -> list[float]:
        """Draw a speed factor for each of `count` rows; 1 for a part of the rows."""
        octaves = self._speeds.uniform(-math.log(_FASTEST), math.log(_FASTEST), count)
        return np.where(self._speeds.random(count) < _PLAYED_FASTER, np.exp(octaves), 1.0).tolist()

    def __call__(self, speech: Tensor, lengths: Tensor) -> Tensor:
        """Apply a random room, line and noise to each row, and set a random level."""
        rows, count = speech.shape
        real = torch.arange(count, device=self._device) < lengths[:, None]
        speech = speech / _peak(speech)
        size = _fast_size(count + RATE // 2)
        spectrum = torch.fft.rfft(speech, size) * self._line(rows, size // 2 + 1)
        spectrum = torch.where(self._chance(rows, _IN_ROOMS)[:, None], spectrum * self._room(rows, size), spectrum)
        speech = torch.fft.irfft(spectrum, size)[:, :count] * real
        noise = torch.where(self._chance(rows, _AMONG_PEOPLE)[:, None], self._talk(speech), self._noise(rows, count))
        ratio = self._uniform(rows, *_NOISE_DB)
        gain = _loudness(speech, real) / _loudness(noise, real).clamp(min=1e-6) * 10 ** (-ratio / 20)
        gain = torch.where(self._chance(rows, _IN_NOISE), gain, torch.zeros_like(gain))
        speech = (speech + noise * gain[:, None]) * real
        return speech / _peak(speech) * 10 ** (self._uniform(rows, *_LEVEL_DB) / 20)[:, None]

    def _uniform(self, count: int, low: float, high: float) -> Tensor:
        return torch.rand(count, generator=self._random, device=self._device) * (high - low) + low

    def _chance(self, count: int, share: float) -> Tensor:
        return torch.rand(count, generator=self._random, device=self._device) < share

    def _normal(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self._random, device=self._device)

    def _line(self, rows: int, bins: int) -> Tensor:
        """Return gains [B, F] of a random smooth curve, for some rows limited to a telephone band."""
        frequency = torch.linspace(0, RATE / 2, bins, device=self._device)
        at = torch.tensor(_BANDS_HZ, device=self._device).log()
        place = frequency.clamp(min=_BANDS_HZ[0]).log()
        index = torch.searchsorted(at, place).clamp(1, len(at) - 1)
        part = (place - at[index - 1]) / (at[index] - at[index - 1])
        levels = self._normal(rows, len(at)) * 4 * self._chance(rows, _COLOURED)[:, None]
        curve = 10 ** ((levels[:, index - 1] * (1 - part) + levels[:, index] * part) / 20)
        low, high = self._uniform(rows, 150, 350)[:, None], self._uniform(rows, 3000, 3900)[:, None]
        narrow = torch.sigmoid((frequency - low) / 40) * torch.sigmoid((high - frequency) / 80)
        return torch.where(self._chance(rows, _OVER_LINES)[:, None], curve * narrow, curve)

    def _room(self, rows: int, size: int) -> Tensor:
        """Return spectra [B, F] of room impulse responses: noise that decays by 60 dB within 0.1 to 0.5 s."""
        time = torch.arange(RATE // 2, device=self._device)
        decay = torch.exp(-6.9 * time / (self._uniform(rows, 0.1, 0.5) * RATE)[:, None])
        response = self._normal(rows, len(time)) * decay * self._uniform(rows, 0.01, 0.2)[:, None]
        response[:, 0] = 1
        return torch.fft.rfft(response, size)

    def _noise(self, rows: int, count: int) -> Tensor:
        """Return white to brown noise [B, N]."""
        size = _fast_size(count)
        bins = size // 2 + 1
        slope = (torch.arange(bins, device=self._device) + 1.0) ** -self._uniform(rows, 0, 1.2)[:, None]
        return torch.fft.irfft(torch.complex(self._normal(rows, bins), self._normal(rows, bins)) * slope, size)[:, :count]

    def _talk(self, speech: Tensor) -> Tensor:
        """Return babble [B, N]: the sum of one to three other rows, shifted in time."""
        rows, count = speech.shape
        shift = int(torch.randint(count, (1,), generator=self._random, device=self._device))
        others = [speech[torch.randperm(rows, generator=self._random, device=self._device)].roll(shift, 1) for _ in range(3)]
        many = self._uniform(rows, 0, 3)[:, None]
        return others[0] + others[1] * (many > 1) + others[2] * (many > 2)  # noqa: PLR2004 - one, two or three


def resample(speech: Tensor, factors: Tensor, count: int) -> Tensor:
    """Resample each row [B, N] by its speed factor [B] to `count` samples, with a windowed sinc."""
    place = torch.arange(count, device=speech.device, dtype=torch.float64) * factors[:, None].double()
    first = place.floor()
    part = (place - first).float()
    half = _TAPS // 2
    padded = functional.pad(speech, (half, half))
    index = first.long()
    cutoff = (1 / factors).clamp(max=1.0)[:, None]
    result = torch.zeros(len(speech), count, device=speech.device)
    for tap in range(1 - half, half + 1):
        distance = part - tap
        weight = torch.sinc(distance * cutoff) * cutoff * (0.5 + 0.5 * torch.cos(math.pi * distance / half)).clamp(min=0)
        result += padded.gather(1, (index + tap + half).clamp(0, padded.shape[1] - 1)) * weight * (distance.abs() <= half)
    return result


def _fast_size(count: int) -> int:
    """Return the next size for which a Fourier transform is fast: 1,024 times a number with small prime factors."""
    units = -(-count // 1024)
    while _largest_factor(units) > 7:  # noqa: PLR2004 - the largest factor that FFT libraries handle fast
        units += 1
    return units * 1024


def _largest_factor(number: int) -> int:
    for factor in (2, 3, 5, 7):
        while number % factor == 0:
            number //= factor
    return max(number, 1)


def _peak(speech: Tensor) -> Tensor:
    return speech.abs().amax(1, keepdim=True) + 1e-6


def _loudness(speech: Tensor, real: Tensor) -> Tensor:
    """Return the root mean square of each row [B] without its padding."""
    return ((speech**2 * real).sum(1) / real.sum(1).clamp(min=1)).sqrt()
