"""From a request's body to 16 kHz mono samples: raw PCM, WAV, FLAC and Ogg (Vorbis, Opus)."""

from __future__ import annotations

import io
import re
import struct
import zlib
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

WAV_FORMAT_BYTES = 16
WAV_CODECS = frozenset({0x01, 0x02, 0x03, 0x06, 0x07, 0x11, 0x31})
"""PCM, MS ADPCM, float, A-law, µ-law, IMA ADPCM, GSM 6.10."""
WAV_EXTENSIBLE = 0xFFFE
WAV_STREAMED = 0x7FFF0000
"""Sizes from here on, like 0, come from writers to a pipe that couldn't know the size."""

OGG_PAGE = struct.Struct("<4sBBqIIIB")
OGG_FIRST, OGG_LAST = 2, 4
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

UNKNOWN_FRAMES = 2**63 - 1
"""What libsndfile reports for a FLAC stream whose encoder didn't know the length."""


class _Reader(soundfile.SoundFile):  # type: ignore[misc]
    """A file read once from start to end, without the seek that soundfile adds to each read."""

    def seekable(self) -> bool:
        return False


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
    if body.startswith((b"RIFF", b"RF64")) and b"WAVE".startswith(body[8:12]):
        return _decode_file("WAV", _plain_wav(body), max_secs)
    if body.startswith(b"fLaC"):
        return _decode_file("FLAC", body, max_secs)
    if body.startswith(b"OggS"):
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
    return audio, {key: request[key] for key in ("opaque",) if key in request}


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


def _plain_wav(body: bytes) -> bytes:
    """Reduces a WAV or RF64 file to its format and samples, with their true sizes, after checking that all are there."""
    declared = int.from_bytes(body[4:8], "little")
    if len(body) < declared < WAV_STREAMED:  # tolerates the size of the whole file, which should be 8 less
        raise _undecodable(f"The WAV file is cut short: it declares {declared + 8} bytes, but has {len(body)}.")
    chunks = _wav_chunks(body)
    if b"data" not in chunks:
        raise _undecodable(f"The WAV file is cut short: its {len(body)} bytes hold no samples.")
    at, size = chunks[b"fmt "]
    form = body[at : at + size - size % 2]
    codec, channels, rate = struct.unpack_from("<HHI", form)
    if codec == WAV_EXTENSIBLE:
        codec = int.from_bytes(form[24:26], "little")
    if codec not in WAV_CODECS:
        raise _unsupported(f"The WAV file's codec, 0x{codec:04x}, isn't supported.")
    _check_format(rate, channels)
    at, size = chunks[b"data"]
    left = len(body) - at
    streamed = size >= WAV_STREAMED or (size == 0 and declared + 8 != len(body))
    if size == 2**32 - 1 and b"ds64" in chunks:
        at_size = chunks[b"ds64"][0] + 8
        size = int.from_bytes(body[at_size : at_size + 8], "little")
        streamed = size in (0, 2**64 - 1)
    if not streamed and size > left:
        raise _undecodable(f"The WAV file is cut short: it declares {size} bytes of samples, but has {left}.")
    size = left if streamed else size
    header = struct.pack("<4sI8sI", b"RIFF", 20 + len(form) + size, b"WAVEfmt ", len(form)) + form
    return b"".join((header, struct.pack("<4sI", b"data", size), memoryview(body)[at : at + size]))


def _wav_chunks(body: bytes) -> dict[bytes, tuple[int, int]]:
    """Finds where the samples and what is needed for them begin, and how long they claim to be."""
    chunks: dict[bytes, tuple[int, int]] = {}
    at = 12
    while at + 8 <= len(body) and b"data" not in chunks:
        name, size = struct.unpack_from("<4sI", body, at)
        at += 8
        if name in (b"fmt ", b"ds64", b"data"):
            chunks[name] = (at, size)
        at += size + size % 2
    if chunks.get(b"fmt ", (0, 0))[1] < WAV_FORMAT_BYTES:
        raise _undecodable(f"The WAV file is damaged: its {len(body)} bytes don't say the format of its samples.")
    return chunks


def _check_ogg(body: bytes) -> None:
    """Refuses what libsndfile would skip without a word: pages that are damaged or missing, and all streams but the first."""
    at, flags, stream, sequence = 0, 0, None, 0
    while at < len(body):
        damaged = f"The Ogg file is damaged or cut short: there is no whole page at byte {at} of {len(body)}."
        if len(body) - at < OGG_PAGE.size:
            raise _undecodable(damaged)
        magic, _, flags, _, serial, number, checksum, segments = OGG_PAGE.unpack_from(body, at)
        start = at + OGG_PAGE.size + segments
        end = start + sum(body[at + OGG_PAGE.size : start])
        if magic != b"OggS" or end > len(body) or checksum != _ogg_checksum(body[at:end]):
            raise _undecodable(damaged)
        if stream is None:
            if not body.startswith((b"\x01vorbis", b"OpusHead"), start):
                codec = re.search(rb"[A-Za-z]{3,}", body[start : min(start + 8, end)])
                named = f"codec, {codec[0].decode()}," if codec else "codec"
                raise _unsupported(f"The Ogg file's {named} isn't supported.")
        elif serial != stream or flags & OGG_FIRST:
            raise _unsupported("The Ogg file holds several streams; it must hold one.")
        elif number != sequence:
            raise _undecodable(f"The Ogg file is damaged: page {sequence} is missing.")
        at, stream, sequence = end, serial, (number + 1) % 2**32
    if not flags & OGG_LAST:
        raise _undecodable("The Ogg file is cut short: its last page is missing.")


def _ogg_checksum(page: bytes) -> int:
    """The CRC of a page without its checksum field: zlib's polynomial, but with bits in the other order and from 0."""
    reflected = zlib.crc32((page[:22] + bytes(4) + page[26:]).translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{reflected:032b}"[::-1], 2)
