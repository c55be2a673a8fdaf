"""Convert decoded samples of any rate and number of channels to 16 kHz samples of 16 bits."""

from __future__ import annotations

import numpy as np
import soxr
from numpy.typing import NDArray

from gateway.audio import RATE
from gateway.audio.mixing import Floats, Mixer
from gateway.errors import ApiError, ErrorKind

MIN_RATE, MAX_RATE = 6_000, 192_000
"""Sample rates of files, in Hz."""

MAX_CHANNELS = 8
"""Maximum number of channels of any audio."""

Pcm = NDArray[np.int16]
"""Samples at 16 kHz [channels, n]."""


class Converter:
    """Mixes, resamples and rounds audio, block by block. The result does not depend on the borders of blocks.

    Args:
        channels: number of channels of the input.
        rate: sample rate of the input in Hz.
        separate: whether to keep the channels instead of mixing them down to one.

    Attributes:
        channels: number of channels of the output.
    """

    def __init__(self, channels: int, rate: int, *, separate: bool = False) -> None:
        self.channels = channels if separate else 1
        self._mixer = None if separate else Mixer(channels, rate)
        self._resampler = (
            None if rate == RATE else soxr.ResampleStream(rate, RATE, self.channels, dtype="float32", quality="HQ")
        )

    def convert(self, block: Floats) -> Pcm:
        """Return the complete part of the output.

        Args:
            block: input [n, channels], full scale 1; about a second where channels are mixed.
        """
        if self._mixer:
            block = self._mixer.mix(block)[:, None]
        return _round(self._resampler.resample_chunk(block) if self._resampler else block)

    def finish(self) -> Pcm:
        """Return the rest of the output."""
        rest = np.empty((0, self.channels), np.float32)
        return _round(self._resampler.resample_chunk(rest, last=True) if self._resampler else rest)


def check_format(channels: int, rate: int) -> None:
    """Check the number of channels and the sample rate of a file.

    Raises:
        ApiError: ``UNACCEPTABLE``, one of them is not allowed.
    """
    if not MIN_RATE <= rate <= MAX_RATE:
        message = f"The sample rate is {rate} Hz; it must be from {MIN_RATE} to {MAX_RATE} Hz."
        raise ApiError(ErrorKind.UNACCEPTABLE, message)
    if not 1 <= channels <= MAX_CHANNELS:
        message = f"The audio has {channels} channels; it must have from 1 to {MAX_CHANNELS}."
        raise ApiError(ErrorKind.UNACCEPTABLE, message)


def _round(block: Floats) -> Pcm:
    scaled: Floats = np.rint(block.T * np.float32(0x8000))
    return np.clip(scaled, -0x8000, 0x7FFF).astype(np.int16)
