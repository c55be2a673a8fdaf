"""Decode audio files to 16 kHz mono samples."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from gateway.audio import RATE, codecs, headers, mp3, ogg, wav
from gateway.audio.errors import too_long, undecodable, unsupported
from gateway.audio.media_types import identify_body
from gateway.audio.mixing import Floats, Mixer, full_scale
from gateway.audio.raw import read_pcm
from gateway.audio.sniff import AU, CAF, FLAC, MP3, OGG, RAW, WAV, Content
from gateway.errors import ApiError, ErrorKind

MIN_RATE, MAX_RATE = 8_000, 48_000
"""Sample rates of files, in Hz."""

MAX_CHANNELS = 8

UNKNOWN_FRAMES = 2**63 - 1
"""Number of frames that libsndfile reports for a FLAC stream of unknown length."""

FLOATS = ("FLOAT", "DOUBLE")
"""libsndfile's names of float samples."""

REPAIRS = {AU.name: headers.repair_au, CAF.name: headers.repair_caf, MP3.name: mp3.repair}
"""What makes libsndfile read a file whole, by the format's name."""

UNSUPPORTED_ENCODING = 4
"""libsndfile's error (SF_ERR_UNSUPPORTED_ENCODING)."""


class _Reader(soundfile.SoundFile):  # type: ignore[misc]
    """A file that is read from start to end, without the seek that soundfile adds to each read."""

    def seekable(self) -> bool:
        return False

    def blocks_of_a_second(self) -> Iterator[Floats]:
        """Yield blocks [n, channels]. Nothing is read beyond the declared length, where tags may follow."""
        left = self.frames
        while len(block := self.read(min(left, self.samplerate), dtype="float32", always_2d=True)):
            left -= len(block)
            yield block


def decode_audio(body: bytes, content_type: str, max_secs: float) -> NDArray[np.int16]:
    """Decode a body to 16 kHz mono samples in this process. A server decodes files in ``pool.FilePool`` instead.

    Args:
        body: the whole body.
        content_type: its media type, as in ``media_types.identify_body``.
        max_secs: maximum length of the audio in seconds.

    Returns:
        Samples [n], at least one. Read-only for raw PCM, which shares the body's memory.

    Raises:
        ApiError: the body is not decodable audio, or is longer than allowed.
    """
    content = identify_body(body, content_type)
    if content.format == RAW:
        return read_pcm(body, max_secs)
    samples = bytearray()
    for block in decode_blocks(body, content, max_secs):
        samples += block.tobytes()
    return np.frombuffer(samples, np.int16)


def decode_blocks(body: bytes, content: Content, max_secs: float) -> Iterator[NDArray[np.int16]]:
    """Decode a file, block by block.

    Args:
        body: the whole body.
        content: what it is, a decodable format.
        max_secs: maximum length of the audio in seconds.

    Yields:
        Blocks of 16 kHz samples [n] of about a second; at least one sample in all.

    Raises:
        ApiError: the file is damaged, cut short, or not supported, or its audio is longer than allowed.
    """
    name, file = content.format.name, body[content.start :] if content.start else body
    if content.format == WAV:
        payload, file = wav.repair(file)
        name = payload.value
    repair = REPAIRS.get(name)
    links = ogg.split(file) if content.format == OGG else [repair(file) if repair else file]
    decoded, left_secs = 0, max_secs
    for link in links:
        for block in _decode(name, link, left_secs, max_secs):
            decoded += len(block)
            if len(block):
                yield np.clip(np.rint(block * 0x8000), -0x8000, 0x7FFF).astype(np.int16)
        left_secs = max_secs - decoded / RATE
    if not decoded:
        raise undecodable(f"The {content.format.name} file holds no audio.")


def _decode(name: str, file: bytes, left_secs: float, max_secs: float) -> Iterator[Floats]:
    """Yield 16 kHz mono blocks [n] of a file for libsndfile, full scale 1."""
    try:
        with _Reader(io.BytesIO(file)) as reader:
            _check_format(reader)
            scale = 1.0
            if reader.subtype in FLOATS:
                with _Reader(io.BytesIO(file)) as first:
                    scale = full_scale(_limited(name, first, left_secs, max_secs)) or 0.0
            if not scale:
                raise undecodable(f"The {name} file holds samples that are infinite, far beyond full scale, or not a number.")
            mix = Mixer(reader.channels, reader.samplerate).mix
            mono = (mix(block / np.float32(scale)) for block in _limited(name, reader, left_secs, max_secs))
            yield from mono if reader.samplerate == RATE else _resample(mono, reader.samplerate)
    except soundfile.LibsndfileError as error:
        codec = codecs.unsupported_codec(file)
        if codec or error.code == UNSUPPORTED_ENCODING:
            raise unsupported(f"The {name} file's codec{codec and f', {codec},'} isn't supported.") from error
        raise undecodable(f"The {name} file is damaged or cut short.") from error


def _check_format(reader: _Reader) -> None:
    rate, channels = reader.samplerate, reader.channels
    if not MIN_RATE <= rate <= MAX_RATE:
        message = f"The sample rate is {rate} Hz; it must be from {MIN_RATE} to {MAX_RATE} Hz."
        raise ApiError(ErrorKind.UNACCEPTABLE, message)
    if not 1 <= channels <= MAX_CHANNELS:
        message = f"The audio has {channels} channels; it must have from 1 to {MAX_CHANNELS}."
        raise ApiError(ErrorKind.UNACCEPTABLE, message)


def _limited(name: str, reader: _Reader, left_secs: float, max_secs: float) -> Iterator[Floats]:
    """Yield a file's blocks [n, channels] until they exceed the limit.

    Args:
        name: the format's, for messages.
        reader: the file.
        left_secs: maximum length of this file's audio.
        max_secs: the limit, for messages.
    """
    rate, expected, limit, frames = reader.samplerate, reader.frames, round(left_secs * reader.samplerate), 0
    if limit < expected != UNKNOWN_FRAMES:
        raise too_long(f"{expected / rate + max_secs - left_secs:.7g} s", max_secs)
    for block in reader.blocks_of_a_second():
        frames += len(block)
        if frames > limit:
            raise too_long(f"more than {max_secs:g} s", max_secs)
        yield block
    if name == FLAC.name and frames < expected != UNKNOWN_FRAMES:
        raise undecodable(f"The FLAC file declares {expected} samples per channel, but holds {frames}.")


def _resample(blocks: Iterable[Floats], rate: int) -> Iterator[Floats]:
    resampler = soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")
    for block in blocks:
        yield resampler.resample_chunk(block)
    yield resampler.resample_chunk(np.empty(0, np.float32), last=True)
