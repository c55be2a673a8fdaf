"""Read raw audio: samples without a header, whose format the request states."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from gateway.audio import RATE
from gateway.audio.body import Slices
from gateway.audio.convert import MAX_CHANNELS, Converter, Pcm
from gateway.audio.errors import too_long, undecodable
from gateway.audio.mixing import OVERSHOOT, Floats
from gateway.errors import ApiError, ErrorKind

MIN_RAW_RATE, MAX_RAW_RATE = 8_000, 48_000
"""Sample rates of raw audio, in Hz."""


class Encoding(Enum):
    """Encoding of one sample; each value is the name in a request."""

    LINEAR16 = "linear16"
    """Signed 16-bit integers, little-endian."""
    MULAW = "mulaw"
    """µ-law of ITU-T G.711, 8 bits."""
    ALAW = "alaw"
    """A-law of ITU-T G.711, 8 bits."""
    FLOAT32 = "float32"
    """IEEE 754 single precision, little-endian, full scale 1."""


@dataclass(frozen=True)
class RawFormat:
    """Format of raw audio.

    Attributes:
        encoding: encoding of one sample.
        rate: sample rate in Hz.
        channels: number of interleaved channels.
    """

    encoding: Encoding = Encoding.LINEAR16
    rate: int = RATE
    channels: int = 1

    @property
    def sample_bytes(self) -> int:
        """Size of one sample of one channel."""
        return {Encoding.LINEAR16: 2, Encoding.FLOAT32: 4}.get(self.encoding, 1)

    @property
    def frame_bytes(self) -> int:
        """Size of one sample of all channels."""
        return self.sample_bytes * self.channels


MIXED_SECS = 0.1
"""Length of the audio of a live stream that is mixed at once, in seconds."""

DEFAULT = RawFormat()
"""Default format of raw audio: s16le, 16 kHz, mono."""


def parse_raw_format(query: Mapping[str, str]) -> RawFormat:
    """Return the format that a query states by ``encoding``, ``sample_rate`` and ``channels``.

    Raises:
        ApiError: ``UNACCEPTABLE``, a value is not allowed.
    """
    given = query.get("encoding", DEFAULT.encoding.value)
    try:
        encoding = Encoding(given)
    except ValueError:
        known = ", ".join(one.value for one in Encoding)
        message = f"The encoding {given[:40]!r} is not known; it must be one of {known}."
        raise ApiError(ErrorKind.UNACCEPTABLE, message, "encoding") from None
    rate = _parse_int(query, "sample_rate", DEFAULT.rate, MIN_RAW_RATE, MAX_RAW_RATE, " Hz")
    return RawFormat(encoding, rate, _parse_int(query, "channels", DEFAULT.channels, 1, MAX_CHANNELS))


def _parse_int(query: Mapping[str, str], name: str, default: int, least: int, most: int, unit: str = "") -> int:
    given = query.get(name)
    if given is None:
        return default
    if given.isascii() and given.isdecimal() and least <= (value := int(given[:9])) <= most:
        return value
    message = f"{name} is {given[:40]!r}; it must be a whole number from {least} to {most}{unit}."
    raise ApiError(ErrorKind.UNACCEPTABLE, message, name)


def _mulaw() -> Floats:
    """Return the values [256] of µ-law: 14-bit integers (ITU-T G.711, table 2), here with full scale 2^13."""
    code = ~np.arange(256, dtype=np.uint8)  # all bits are inverted for transmission
    sign, segment, interval = code >> 7, (code >> 4 & 7).astype(int), (code & 15).astype(int)
    magnitude = ((2 * interval + 33) << segment) - 33
    return (np.where(sign, -magnitude, magnitude) / 2**13).astype(np.float32)


def _alaw() -> Floats:
    """Return the values [256] of A-law: 13-bit integers (ITU-T G.711, table 1), here with full scale 2^12."""
    code = np.arange(256, dtype=np.uint8) ^ 0x55  # even bits are inverted for transmission
    positive, segment, interval = code >> 7, (code >> 4 & 7).astype(int), (code & 15).astype(int)
    magnitude = np.where(segment, (2 * interval + 33) << np.maximum(segment - 1, 0), 2 * interval + 1)
    return (np.where(positive, magnitude, -magnitude) / 2**12).astype(np.float32)


G711 = {Encoding.MULAW: _mulaw(), Encoding.ALAW: _alaw()}
"""Value of each code [256]; full scale 1."""


def read_samples(data: bytes, format_: RawFormat) -> Floats:
    """Return whole frames [n, channels], full scale 1.

    Raises:
        ApiError: ``UNDECODABLE_AUDIO``, floating-point samples are infinite or not a number.
    """
    samples: NDArray[np.float32]
    if format_.encoding is Encoding.LINEAR16:
        samples = np.frombuffer(data, "<i2") / np.float32(0x8000)
    elif format_.encoding is Encoding.FLOAT32:
        samples = np.frombuffer(data, "<f4").astype(np.float32)
        if not np.isfinite(samples).all():
            raise undecodable("The audio holds samples that are infinite or not a number.")
        samples = samples.clip(-OVERSHOOT, OVERSHOOT)
    else:
        samples = G711[format_.encoding][np.frombuffer(data, np.uint8)]
    return samples.reshape(-1, format_.channels)


def check_raw(size: int, format_: RawFormat, max_secs: float) -> None:
    """Check the size of raw audio, in bytes.

    Raises:
        ApiError: it is not made of whole frames, or is longer than ``max_secs``.
    """
    if size % format_.frame_bytes:
        odd, rule = "an odd length", "2 bytes per sample"
        if format_ != DEFAULT:
            odd, rule = "a wrong length", f"{format_.frame_bytes} bytes per sample of all channels"
        raise ApiError(ErrorKind.ODD_LENGTH, f"The body has {odd}, {size} bytes, but raw PCM has {rule}.")
    frames = size // format_.frame_bytes
    if frames > round(max_secs * format_.rate):
        raise too_long(f"{frames / format_.rate:.7g} s", max_secs)


def read_raw(body: Slices, format_: RawFormat, *, separate: bool = False) -> Iterator[Pcm]:
    """Yield raw audio as blocks [channels, n] of about a second.

    Args:
        body: whole frames, as checked by ``check_raw``.
        format_: format of the body.
        separate: whether to keep the channels instead of mixing them down to one.

    Raises:
        ApiError: as ``read_samples``.
    """
    block_bytes = format_.rate * format_.frame_bytes
    if format_.encoding is Encoding.LINEAR16 and format_.rate == RATE and (separate or format_.channels == 1):
        for at in range(0, len(body), block_bytes):
            yield np.frombuffer(body[at : at + block_bytes], "<i2").reshape(-1, format_.channels).T
        return
    converter = Converter(format_.channels, format_.rate, separate=separate)
    for at in range(0, len(body), block_bytes):
        yield converter.convert(read_samples(body[at : at + block_bytes], format_))
    yield converter.finish()


class RawStream:
    """Converts raw audio in pieces of any length. The result does not depend on the borders of pieces.

    Args:
        format_: the format of the audio.
    """

    def __init__(self, format_: RawFormat) -> None:
        self._format = format_
        self._converter = Converter(format_.channels, format_.rate)
        # Each block of the mix has its own weights, so that blocks must not depend on the pieces.
        self._block_bytes = format_.frame_bytes * (1 if format_.channels == 1 else max(1, round(MIXED_SECS * format_.rate)))
        self._rest = b""

    def convert(self, data: bytes) -> NDArray[np.int16]:
        """Return the complete part of the audio [n] at 16 kHz.

        Raises:
            ApiError: as ``read_samples``.
        """
        data = self._rest + data
        end = len(data) // self._block_bytes * self._block_bytes
        self._rest = data[end:]
        step = self._block_bytes if self._format.channels > 1 else max(end, 1)
        blocks = [self._convert(data[at : at + step]) for at in range(0, end, step)]
        return np.concatenate(blocks) if blocks else np.empty(0, np.int16)

    def finish(self, *, whole: bool = True) -> NDArray[np.int16]:
        """Return the rest of the audio [n].

        Args:
            whole: whether an incomplete last sample is an error; otherwise it is dropped.

        Raises:
            ApiError: ``ODD_LENGTH``, the last sample is incomplete.
        """
        excess = len(self._rest) % self._format.frame_bytes
        if excess and whole:
            message = f"The stream ends within a sample; one sample of all channels has {self._format.frame_bytes} bytes."
            raise ApiError(ErrorKind.ODD_LENGTH, message)
        rest = self._rest[: len(self._rest) - excess]
        return np.concatenate([self._convert(rest), self._converter.finish()[0]])

    def _convert(self, data: bytes) -> NDArray[np.int16]:
        return self._converter.convert(read_samples(data, self._format))[0] if data else np.empty(0, np.int16)
