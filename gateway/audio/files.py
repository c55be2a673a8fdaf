"""Decode audio files to 16 kHz mono samples: WAV, FLAC and Ogg (Vorbis, Opus)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import soundfile
import soxr

from gateway.audio import RATE
from gateway.audio.raw import read_pcm
from gateway.audio.sniff import FLAC, OGG, WAV, check_raw, parse_media_type, too_long, undecodable, unsupported
from gateway.errors import ApiError, ErrorKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

MIN_RATE, MAX_RATE = 8_000, 48_000
MAX_CHANNELS = 8
MAX_AMPLITUDE = 1e6
"""Largest float sample, where full scale is 1; larger ones are not audio and might overflow in the resampler."""

WAV_CODECS = frozenset({0x01, 0x02, 0x03, 0x06, 0x07, 0x11, 0x31, 0xFFFE})
"""PCM, MS ADPCM, float, A-law, µ-law, IMA ADPCM, GSM 6.10, and extensible, which names its codec elsewhere."""
WAV_STREAMED = 0x7FFF0000
"""Sizes from this on come from writers to a pipe, which do not know the size."""

OGG_FIRST_PACKET = 28
OGG_FLAGS = 5
OGG_LAST = 4

UNKNOWN_FRAMES = 2**63 - 1
"""Number of frames that libsndfile reports for a FLAC stream of unknown length."""


class _Reader(soundfile.SoundFile):  # type: ignore[misc]
    """A file that is read once from start to end, without the seek that soundfile adds to each read."""

    def seekable(self) -> bool:
        return False


def decode_audio(body: bytes, content_type: str, max_secs: float) -> NDArray[np.int16]:
    """Decode a body to 16 kHz mono samples.

    The content decides: a WAV, FLAC or Ogg file is decoded whatever audio type it is declared as. A body without a known
    header must be declared as raw PCM.

    Args:
        body: the whole body.
        content_type: its media type; parameters are ignored, and an empty one means `application/octet-stream`.
        max_secs: maximum length of the audio in seconds.

    Returns:
        Samples [n], at least one. Read-only for raw PCM, which shares the body's memory.

    Raises:
        ApiError: the body is not decodable audio, or is longer than allowed.
    """
    media_type = parse_media_type(content_type)
    if not body:
        raise ApiError(ErrorKind.EMPTY_BODY, "The body is empty; it must hold audio.")
    if body.startswith(WAV) and b"WAVE".startswith(body[8:12]):
        _check_wav(body)
        return _decode_file("WAV", body, max_secs)
    if body.startswith(FLAC):
        return _decode_file("FLAC", body, max_secs)
    if body.startswith(OGG):
        _check_ogg(body)
        return _decode_file("Ogg", body, max_secs)
    check_raw(body, media_type)
    return read_pcm(body, max_secs)


def _check_format(rate: int, channels: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        message = f"The sample rate is {rate} Hz; it must be from {MIN_RATE} to {MAX_RATE} Hz."
        raise ApiError(ErrorKind.UNACCEPTABLE, message)
    if not 1 <= channels <= MAX_CHANNELS:
        message = f"The audio has {channels} channels; it must have from 1 to {MAX_CHANNELS}."
        raise ApiError(ErrorKind.UNACCEPTABLE, message)


def _decode_file(name: str, file: bytes, max_secs: float) -> NDArray[np.int16]:
    """Decode, mix down, resample and round block by block, so that only the result takes memory."""
    samples = bytearray()
    try:
        with _Reader(io.BytesIO(file)) as reader:
            _check_format(reader.samplerate, reader.channels)
            blocks = _mono_blocks(name, reader, max_secs)
            if reader.samplerate != RATE:
                blocks = _resampled(blocks, reader.samplerate)
            for block in blocks:
                samples += np.clip(np.rint(block * 0x8000), -0x8000, 0x7FFF).astype(np.int16).tobytes()
    except soundfile.SoundFileError as error:
        raise undecodable(f"The {name} file is damaged or cut short.") from error
    if not samples:
        raise undecodable(f"The {name} file holds no audio.")
    return np.frombuffer(samples, np.int16)


def _mono_blocks(name: str, reader: _Reader, max_secs: float) -> Iterator[NDArray[np.float32]]:
    """Yield a file's audio in blocks of one second, until it exceeds the limit."""
    rate, expected, limit, frames = reader.samplerate, reader.frames, round(max_secs * reader.samplerate), 0
    if limit < expected != UNKNOWN_FRAMES:
        raise too_long(f"{expected / rate:.7g} s", max_secs)
    while len(block := reader.read(rate, dtype="float32", always_2d=True)):
        frames += len(block)
        if frames > limit:
            raise too_long(f"more than {max_secs:g} s", max_secs)
        if not np.abs(block).max() <= MAX_AMPLITUDE:  # not "greater", which is false for NaN
            raise undecodable(f"The {name} file holds samples that are infinite, far beyond full scale, or not a number.")
        yield block.mean(axis=1)
    if name == "FLAC" and frames < expected != UNKNOWN_FRAMES:
        raise undecodable(f"The FLAC file declares {expected} samples per channel, but holds {frames}.")


def _resampled(blocks: Iterable[NDArray[np.float32]], rate: int) -> Iterator[NDArray[np.float32]]:
    resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield resampler.resample_chunk(block)
    yield resampler.resample_chunk(np.empty(0, np.float32), last=True)


def _check_wav(body: bytes) -> None:
    """Refuse a file that lacks its end, which libsndfile accepts, and name a codec that is not supported."""
    declared = int.from_bytes(body[4:8], "little")
    if len(body) < declared < WAV_STREAMED:  # tolerates the size of the whole file, which should be 8 less
        raise undecodable(f"The WAV file is cut short: it declares {declared + 8} bytes, but has {len(body)}.")
    codec = int.from_bytes(body[20:22], "little")
    if body[12:16] == b"fmt " and codec not in WAV_CODECS:
        raise unsupported(f"The WAV file's codec, 0x{codec:04x}, isn't supported.")


def _check_ogg(body: bytes) -> None:
    """Refuse other codecs, and a file without its last page (RFC 3533, section 6), which libsndfile accepts."""
    if not body.startswith((b"\x01vorbis", b"OpusHead"), OGG_FIRST_PACKET):
        raise unsupported("The Ogg file's codec isn't supported; it must be Vorbis or Opus.")
    flags = body.rfind(OGG) + OGG_FLAGS
    if flags >= len(body) or not body[flags] & OGG_LAST:
        raise undecodable("The Ogg file is cut short: its last page is missing.")
