"""Decode audio files to 16 kHz mono samples."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from io import RawIOBase

import numpy as np
import soundfile
from numpy.typing import NDArray

from gateway.audio import RATE, codecs, headers, joined, mp3, ogg, wav
from gateway.audio.body import Body, Parts, Pieces
from gateway.audio.convert import Converter, Pcm, check_format
from gateway.audio.errors import too_long, undecodable, unsupported
from gateway.audio.media_types import CONTAINERS, identify_body
from gateway.audio.mixing import Floats, full_scale
from gateway.audio.raw import DEFAULT, check_raw
from gateway.audio.sniff import AIFF, AU, CAF, FLAC, LIVE_DEMUXERS, MP3, OGG, RAW, WAV, Content, Format
from gateway.errors import ApiError, ErrorKind

UNKNOWN_FRAMES = 2**63 - 1
"""Number of frames that libsndfile reports for a FLAC stream of unknown length."""

ROUNDING_SECS = 0.01
"""Maximum length that resampling adds to a file's audio, in seconds."""

FLOATS = ("FLOAT", "DOUBLE")
"""libsndfile's names of float samples."""

REPAIRS: dict[str, Callable[[Body], Parts]] = {AU.name: headers.repair_au, CAF.name: headers.repair_caf, MP3.name: mp3.repair}
"""Repairs after which libsndfile reads a file to its end, by the format's name."""

RARE_CODECS = {AIFF: "aiff", AU: "au", CAF: "caf", OGG: "ogg"}
"""FFmpeg's names of formats with codecs that libsndfile does not decode."""

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
        check_raw(len(body), DEFAULT, max_secs)
        return np.frombuffer(body, "<i2")
    samples = bytearray()
    for block in decode_blocks(body, content, max_secs):
        samples += block.tobytes()
    return np.frombuffer(samples, np.int16)


def decode_blocks(data: bytes | mmap.mmap, content: Content, max_secs: float, *, separate: bool = False) -> Iterator[Pcm]:
    """Decode a file, block by block.

    Args:
        data: the whole file.
        content: its format, which is decodable.
        max_secs: maximum length of the audio in seconds.
        separate: whether to keep the channels instead of mixing them down to one.

    Yields:
        Blocks [channels, n] of about a second; at least one sample in all, and always the same number of channels.

    Raises:
        ApiError: the file is damaged, cut short, or not supported, or its audio is longer than allowed.
    """
    name, decoded, channels = content.format.name, 0, 0
    for part in joined.split(content.format, Body(data, content.start)):
        for block in _blocks(content.format, part, max_secs, separate=separate):
            channels = channels or len(block)
            if len(block) != channels:
                message = f"The number of channels changes from {channels} to {len(block)}; such channels can't be separated."
                raise ApiError(ErrorKind.UNACCEPTABLE, message, "channels")
            decoded += block.shape[1]
            if decoded > (max_secs + ROUNDING_SECS) * RATE:
                raise too_long(f"more than {max_secs:g} s", max_secs)
            if block.size:
                yield block
    if not decoded:
        raise undecodable(f"The {name} file holds no audio.")


def decode_stream(format_: Format, pipe: RawIOBase, max_secs: float) -> Iterator[Pcm]:
    """Decode a container as it arrives.

    Args:
        format_: its format, one of ``LIVE_DEMUXERS``.
        pipe: its bytes; a read returns the available bytes, and does not wait for all that were requested.
        max_secs: maximum length of the audio in seconds.

    Yields:
        Blocks [1, n].

    Raises:
        ApiError: as ``decode_blocks``.
    """
    from gateway.audio.containers import decode_container  # noqa: PLC0415 (an extra)

    yield from decode_container(format_.name, LIVE_DEMUXERS[format_], pipe, max_secs, live=True)


def _blocks(format_: Format, file: Body, max_secs: float, *, separate: bool) -> Iterator[Pcm]:
    """Yield blocks [channels, n] from the library that decodes the format."""
    if format_.demuxer:
        yield from _decode_container(format_.name, format_.demuxer, file, max_secs, separate=separate)
        return
    begun = False
    try:
        for block in _links(format_, file, max_secs, separate=separate):
            begun = True
            yield block
    except ApiError as error:
        if error.kind is not ErrorKind.UNSUPPORTED_MEDIA or begun or format_ not in RARE_CODECS or not CONTAINERS:
            raise
        try:
            yield from _decode_container(format_.name, RARE_CODECS[format_], file, max_secs, separate=separate)
        except ApiError as other:
            raise error if other.kind in (ErrorKind.UNSUPPORTED_MEDIA, ErrorKind.UNDECODABLE_AUDIO) else other from other


def _decode_container(name: str, demuxer: str, file: Body, max_secs: float, *, separate: bool) -> Iterator[Pcm]:
    from gateway.audio.containers import decode_container  # noqa: PLC0415 (an extra)

    yield from decode_container(name, demuxer, Pieces([file.view()]), max_secs, separate=separate)


def _links(format_: Format, file: Body, max_secs: float, *, separate: bool) -> Iterator[Pcm]:
    """Yield the blocks [channels, n] of a file that libsndfile decodes."""
    name, decoded = format_.name, 0
    links: Iterable[Parts]
    if format_ == WAV:
        payload, repaired = wav.repair(file)
        name, links = payload.value, [repaired]
    elif format_ == OGG:
        links = ogg.split(file)
    else:
        links = [REPAIRS[name](file) if name in REPAIRS else [file.view()]]
    for link in links:
        for block in _decode(name, link, max_secs - decoded / RATE, max_secs, separate=separate):
            yield block
            decoded += block.shape[1]


def _decode(name: str, parts: Parts, left_secs: float, max_secs: float, *, separate: bool) -> Iterator[Pcm]:
    """Yield the blocks [channels, n] of a file for libsndfile."""
    try:
        with _Reader(Pieces(parts)) as reader:
            check_format(reader.channels, reader.samplerate)
            scale = 1.0
            if reader.subtype in FLOATS:
                with _Reader(Pieces(parts)) as first:
                    scale = full_scale(_limited(name, first, left_secs, max_secs)) or 0.0
            if not scale:
                raise undecodable(f"The {name} file holds samples that are infinite, far beyond full scale, or not a number.")
            converter = Converter(reader.channels, reader.samplerate, separate=separate)
            for block in _limited(name, reader, left_secs, max_secs):
                yield converter.convert(block / np.float32(scale))
            yield converter.finish()
    except soundfile.LibsndfileError as error:
        codec = codecs.unsupported_codec(parts)
        if codec or error.code == UNSUPPORTED_ENCODING:
            raise unsupported(f"The {name} file's codec{codec and f', {codec},'} isn't supported.") from error
        raise undecodable(f"The {name} file is damaged or cut short.") from error


def _limited(name: str, reader: _Reader, left_secs: float, max_secs: float) -> Iterator[Floats]:
    """Yield a file's blocks [n, channels] until they exceed the limit.

    Args:
        name: name of the format in messages.
        reader: the file.
        left_secs: maximum length of this file's audio.
        max_secs: limit in messages.
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
