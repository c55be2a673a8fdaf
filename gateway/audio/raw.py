"""Read raw PCM."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gateway.audio import BYTES_PER_SAMPLE, RATE
from gateway.audio.errors import too_long
from gateway.errors import ApiError, ErrorKind

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_pcm(body: bytes, max_secs: float) -> NDArray[np.int16]:
    """Return s16le samples [n]. They are read-only and share the body's memory.

    Raises:
        ApiError: the body has an odd length, or is longer than ``max_secs`` at 16 kHz.
    """
    if len(body) % BYTES_PER_SAMPLE:
        message = f"The body has an odd length, {len(body)} bytes, but raw PCM has 2 bytes per sample."
        raise ApiError(ErrorKind.ODD_LENGTH, message)
    samples = np.frombuffer(body, "<i2")
    if len(samples) > round(max_secs * RATE):
        raise too_long(f"{len(samples) / RATE:.7g} s", max_secs)
    return samples
