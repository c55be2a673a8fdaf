"""Raw audio that comes bit by bit, as 16 kHz samples."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gateway.audio import RATE
from gateway.audio.convert import Converter
from gateway.audio.raw import Encoding, RawFormat, read_samples

Samples = NDArray[np.int16]


class IncomingAudio:
    """Converts the raw audio of one stream. It may be cut anywhere, within samples too.

    Args:
        format_: of the audio.
    """

    def __init__(self, format_: RawFormat) -> None:
        self._format = format_
        self._rest = b""  # of an incomplete sample
        self._as_is = format_ == RawFormat(Encoding.LINEAR16, RATE, 1)
        self._converter = Converter(format_.channels, format_.rate)

    def convert(self, data: bytes) -> Samples:
        """Return what is complete [n]; the resampler keeps some milliseconds.

        Raises:
            ApiError: floating-point samples are infinite or not a number.
        """
        data = self._rest + data
        whole = len(data) - len(data) % self._format.frame_bytes
        data, self._rest = data[:whole], data[whole:]
        if self._as_is:
            return np.frombuffer(data, "<i2")
        samples: Samples = self._converter.convert(read_samples(data, self._format))[0]
        return samples

    def finish(self) -> Samples:
        """Return the rest [n]; what comes then begins anew."""
        self._rest = b""
        if self._as_is:
            return np.empty(0, np.int16)
        converter, self._converter = self._converter, Converter(self._format.channels, self._format.rate)
        samples: Samples = converter.finish()[0]
        return samples
