"""From a request's body to 16 kHz mono samples: raw PCM, WAV, FLAC and Ogg (Vorbis, Opus)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import soundfile
import soxr

from gateway.errors import ApiError, ErrorKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

RATE = 16_000
BYTES_A_SAMPLE = 2
"""Samples per second of what comes out, and of raw PCM coming in."""

MIN_RATE, MAX_RATE = 8_000, 48_000
MAX_CHANNELS = 8
MAX_AMPLITUDE = 1e6
"""Full scale is 1. Float samples beyond this are no audio, and could overflow in the resampler."""

OCTETS = "application/octet-stream"
RAW_TYPES = frozenset({OCTETS, "audio/pcm", "audio/x-pcm", "audio/raw", "audio/x-raw"})
CONTAINER_TYPES = frozenset(f"audio/{name}" for name in ("wav", "x-wav", "wave", "vnd.wave", "flac", "x-flac", "ogg", "opus"))
ALLOWED = (
    f"Send 16 kHz mono s16le PCM as {OCTETS} or audio/pcm, a WAV, FLAC or Ogg (Vorbis, Opus) file as {OCTETS} or audio/*, "
    "one file as multipart/form-data, or an audio_buffer as application/json."
)
FOREIGN = (
    (0, b"ID3", "MP3"),
    (4, b"ftyp", "MP4"),
    (0, b"\x1a\x45\xdf\xa3", "WebM or Matroska"),
    (0, b"FORM", "AIFF"),
    (0, b"RIFF", "RIFF other than WAV"),
    (0, b"RF64", "RF64 other than WAV"),
    (0, b"#!AMR", "AMR"),
    (0, b"PK\x03\x04", "ZIP"),
    (0, b"\x1f\x8b\x08", "gzip"),
    (0, b"%PDF", "PDF"),
    (0, b"\x89PNG", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
)
TEXT = bytes(range(0x20, 0x7F)) + b"\t\n\v\f\r"
MIN_TEXT_BYTES = 16

WAV, FLAC, OGG = (b"RIFF", b"RF64"), b"fLaC", b"OggS"
"""How files begin."""

WAV_CODECS = frozenset({0x01, 0x02, 0x03, 0x06, 0x07, 0x11, 0x31, 0xFFFE})
"""PCM, MS ADPCM, float, A-law, µ-law, IMA ADPCM, GSM 6.10, and extensible, which says it elsewhere."""
WAV_STREAMED = 0x7FFF0000
"""Sizes from here on come from writers to a pipe that couldn't know the size."""

OGG_FIRST_PACKET = 28
OGG_FLAGS = 5
OGG_LAST = 4

UNKNOWN_FRAMES = 2**63 - 1
"""What libsndfile reports for a FLAC stream whose encoder didn't know the length."""


class _Reader(soundfile.SoundFile):  # type: ignore[misc]
    """A file read once from start to end, without the seek that soundfile adds to each read."""

    def seekable(self) -> bool:
        return False


def is_file(body: bytes) -> bool:
    """Whether a body begins like a file that must be decoded, which takes its time."""
    return body.startswith((*WAV, FLAC, OGG))


def decode_audio(body: bytes, content_type: str, max_secs: float) -> NDArray[np.int16]:
    """Turns a request's body into 16 kHz mono samples.

    The content decides: a WAV, FLAC or Ogg file is decoded whatever audio type it is sent as. Without a known header, the
    body must be declared as raw PCM. `audio/L16` isn't: it is big-endian by definition and little-endian in many clients.

    Args:
        body: the whole body.
        content_type: its media type; parameters are ignored, and nothing at all means `application/octet-stream`.
        max_secs: the longest audio allowed.

    Returns:
        At least one sample. Read-only for raw PCM, which shares the body's memory.

    Raises:
        ApiError: when the body isn't audio that can be decoded, or is longer than allowed.
    """
    media_type = content_type.partition(";")[0].strip().lower() or OCTETS
    if media_type != OCTETS and not media_type.startswith("audio/"):
        raise _unsupported(f"Content type {media_type[:80]!r} isn't supported.", "Content-Type")
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
    return _decode_raw(body, media_type, max_secs)


def pcm_from_json(body: bytes) -> tuple[bytes, dict[str, Any]]:
    """Unpacks the JSON form of a request, `{"audio_buffer": [bytes as integers], "opaque": anything}`.

    Args:
        body: the whole body; keys other than these two are ignored.

    Returns:
        The audio's bytes, and `{"opaque": …}` if the request has one, to be given back as it is.

    Raises:
        ApiError: when the body isn't such an object.
    """
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(ErrorKind.INVALID_BODY, f"The body isn't valid JSON: {error.msg} (at character {error.pos}).") from error
    if not isinstance(request, dict) or not isinstance(octets := request.get("audio_buffer"), list):
        message = "The body must be a JSON object whose audio_buffer is an array of integers from 0 to 255."
        raise ApiError(ErrorKind.INVALID_BODY, message, "audio_buffer")
    try:
        audio = bytes(octets) if {*map(type, octets)} <= {int} else None
    except ValueError:
        audio = None
    if audio is None:
        index, value = next((i, o) for i, o in enumerate(octets) if type(o) is not int or not 0 <= o <= 0xFF)  # noqa: PLR2004
        shown = f"a {type(value).__name__}" if isinstance(value, (list, dict)) else orjson.dumps(value).decode()[:40]
        message = f"audio_buffer[{index}] is {shown}; it must be an integer from 0 to 255."
        raise ApiError(ErrorKind.UNACCEPTABLE, message, "audio_buffer")
    opaque = {key: request[key] for key in ("opaque",) if key in request}
    try:
        orjson.dumps(opaque)
    except orjson.JSONEncodeError as error:  # it reads deeper than it writes
        raise ApiError(ErrorKind.INVALID_BODY, f"opaque can't be given back: {error}.", "opaque") from error
    return audio, opaque


def _undecodable(message: str) -> ApiError:
    return ApiError(ErrorKind.UNDECODABLE_AUDIO, message)


def _unsupported(message: str, param: str | None = None) -> ApiError:
    return ApiError(ErrorKind.UNSUPPORTED_MEDIA, f"{message} {ALLOWED}", param)


def _too_long(length: str, max_secs: float) -> ApiError:
    return ApiError(ErrorKind.AUDIO_TOO_LONG, f"The audio lasts {length}; at most {max_secs:g} s are allowed.")


def _decode_raw(body: bytes, media_type: str, max_secs: float) -> NDArray[np.int16]:
    """Takes a body without a known header as raw PCM, if that is what its type says and nothing contradicts it."""
    for offset, magic, name in FOREIGN:
        if body.startswith(magic, offset):
            raise _unsupported(f"The body looks like {name}, which isn't supported.")
    if media_type in CONTAINER_TYPES:
        raise _undecodable(f"The body was sent as {media_type}, but doesn't begin like a WAV, FLAC or Ogg file.")
    if media_type not in RAW_TYPES:
        raise _unsupported(f"Content type {media_type[:80]!r} isn't supported.", "Content-Type")
    if len(body) >= MIN_TEXT_BYTES and not body[:1024].translate(None, TEXT) and not body.translate(None, TEXT):
        raise _undecodable(f"The body is text, not audio. {ALLOWED}")
    if len(body) % 2:
        message = f"The body has an odd length, {len(body)} bytes, but raw PCM has 2 bytes per sample."
        raise ApiError(ErrorKind.ODD_LENGTH, message)
    samples = np.frombuffer(body, "<i2")
    if len(samples) > round(max_secs * RATE):
        raise _too_long(f"{len(samples) / RATE:.7g} s", max_secs)
    return samples


def _check_format(rate: int, channels: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        message = f"The sample rate is {rate} Hz; it must be from {MIN_RATE} to {MAX_RATE} Hz."
        raise ApiError(ErrorKind.UNACCEPTABLE, message)
    if not 1 <= channels <= MAX_CHANNELS:
        message = f"The audio has {channels} channels; it must have from 1 to {MAX_CHANNELS}."
        raise ApiError(ErrorKind.UNACCEPTABLE, message)


def _decode_file(name: str, file: bytes, max_secs: float) -> NDArray[np.int16]:
    """Decodes, mixes down, resamples and rounds block by block, so that only the result takes memory."""
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
        raise _undecodable(f"The {name} file is damaged or cut short.") from error
    if not samples:
        raise _undecodable(f"The {name} file holds no audio.")
    return np.frombuffer(samples, np.int16)


def _mono_blocks(name: str, reader: _Reader, max_secs: float) -> Iterator[NDArray[np.float32]]:
    """Yields a file's audio by the second, until it turns out to be too long."""
    rate, expected, limit, frames = reader.samplerate, reader.frames, round(max_secs * reader.samplerate), 0
    if limit < expected != UNKNOWN_FRAMES:
        raise _too_long(f"{expected / rate:.7g} s", max_secs)
    while len(block := reader.read(rate, dtype="float32", always_2d=True)):
        frames += len(block)
        if frames > limit:
            raise _too_long(f"more than {max_secs:g} s", max_secs)
        if not np.abs(block).max() <= MAX_AMPLITUDE:  # not "greater", which is false for NaN
            raise _undecodable(f"The {name} file holds samples that are infinite, far beyond full scale, or not a number.")
        yield block.mean(axis=1)
    if name == "FLAC" and frames < expected != UNKNOWN_FRAMES:
        raise _undecodable(f"The FLAC file declares {expected} samples per channel, but holds {frames}.")


def _resampled(blocks: Iterable[NDArray[np.float32]], rate: int) -> Iterator[NDArray[np.float32]]:
    resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield resampler.resample_chunk(block)
    yield resampler.resample_chunk(np.empty(0, np.float32), last=True)


def _check_wav(body: bytes) -> None:
    """Refuses what libsndfile would decode without a word although its end is missing, and names a codec that it can't."""
    declared = int.from_bytes(body[4:8], "little")
    if len(body) < declared < WAV_STREAMED:  # tolerates the size of the whole file, which should be 8 less
        raise _undecodable(f"The WAV file is cut short: it declares {declared + 8} bytes, but has {len(body)}.")
    codec = int.from_bytes(body[20:22], "little")
    if body[12:16] == b"fmt " and codec not in WAV_CODECS:
        raise _unsupported(f"The WAV file's codec, 0x{codec:04x}, isn't supported.")


def _check_ogg(body: bytes) -> None:
    """Refuses other codecs, and a file without its last page (RFC 3533, section 6), which libsndfile would not miss."""
    if not body.startswith((b"\x01vorbis", b"OpusHead"), OGG_FIRST_PACKET):
        raise _unsupported("The Ogg file's codec isn't supported; it must be Vorbis or Opus.")
    flags = body.rfind(OGG) + OGG_FLAGS
    if flags >= len(body) or not body[flags] & OGG_LAST:
        raise _undecodable("The Ogg file is cut short: its last page is missing.")
