"""Mix channels to one, and find the scale of float samples."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

CANCELLED = 0.25
"""Level of the mean below which channels cancel each other, relative to the mean of channels with random phases."""

RAMP_SECS = 0.01
"""Length of the ramp from one mix to the next; without it the change would be a click."""

INTEGER_SCALES = (2.0**15, 2.0**23, 2.0**31)
"""Full scales of integer samples that are stored as float without scaling."""

OVERSHOOT = 2.0
"""Maximum peak relative to full scale, as from clipping and resampling."""


class Mixer:
    """Mixes blocks of samples down to one channel.

    The mix is the mean of the channels. Where the mean cancels, because a channel was wired with the opposite phase, the mix is
    the loudest channel.

    Args:
        channels: number of channels.
        rate: sample rate in Hz.
    """

    def __init__(self, channels: int, rate: int) -> None:
        self._mean = np.full(channels, 1 / channels, np.float32)
        self._weights: Floats | None = None
        self._ramp_samples = max(1, round(RAMP_SECS * rate))

    def mix(self, block: Floats) -> Floats:
        """Return one channel [n] of a block [n, channels], about a second long."""
        if block.shape[1] == 1:
            return block[:, 0]
        weights = self._choose(block)
        mixed = block @ weights
        if self._weights is not None and weights is not self._weights:
            length = min(self._ramp_samples, len(block))
            ramp = np.linspace(0, 1, length, endpoint=False, dtype=np.float32)
            mixed[:length] = ramp * mixed[:length] + (1 - ramp) * (block[:length] @ self._weights)
        self._weights = weights
        return mixed

    def _choose(self, block: Floats) -> Floats:
        """Return the weights of the channels [channels]."""
        powers = np.square(block).mean(axis=0)
        mean_power = np.square(block.mean(axis=1)).mean()
        if mean_power * block.shape[1] ** 2 >= CANCELLED**2 * powers.sum():
            return self._mean
        if self._weights is not None and self._weights is not self._mean:
            current = int(self._weights.argmax())
            if powers[current] >= powers.max() / 2:
                return self._weights  # another channel of the same speech may have the opposite phase
        weights = np.zeros_like(self._mean)
        weights[powers.argmax()] = 1
        return weights


def full_scale(blocks: Iterable[Floats]) -> float | None:
    """Return the full scale of float samples: 1, or that of integers if the samples are unscaled integers.

    Args:
        blocks: all samples.

    Returns:
        None if samples are infinite, not a number, or beyond every scale.
    """
    peak, total, count = 0.0, 0.0, 0
    for block in blocks:
        amplitudes = np.abs(block)
        highest = float(amplitudes.max())
        if not highest <= OVERSHOOT * INTEGER_SCALES[-1]:  # not "greater", which is false for NaN
            return None
        peak = max(peak, highest)
        total += float(amplitudes.sum(dtype=np.float64))
        count += amplitudes.size
    if total <= count:  # the mean of audio is far below full scale
        return 1.0
    return next(scale for scale in INTEGER_SCALES if peak <= OVERSHOOT * scale)
