"""Decode containers that libsndfile does not read, by FFmpeg (the extra ``containers``).

FFmpeg gets the file through read and seek only. Demuxers, protocols and decoders come from closed lists, so no content can make
it open a file or a connection.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import RawIOBase

import av
import av.container
import numpy as np

from gateway.audio.convert import Converter, Pcm, check_format
from gateway.audio.errors import too_long, undecodable, unsupported
from gateway.audio.mixing import OVERSHOOT, Floats

av.logging.set_level(av.logging.PANIC)

DECODERS = (
    "aac,aac_latm,ac3,adpcm_g722,adpcm_g726,adpcm_g726le,adpcm_ima_qt,adpcm_ima_wav,adpcm_ms,alac,amrnb,amrwb,eac3,flac,g723_1,"
    "g729,gsm,gsm_ms,libopus,libspeex,libvorbis,mp1float,mp2float,mp3float,opus,pcm_alaw,pcm_f32be,pcm_f32le,pcm_f64be,"
    "pcm_f64le,pcm_mulaw,pcm_s16be,pcm_s16le,pcm_s24be,pcm_s24le,pcm_s32be,pcm_s32le,pcm_s8,pcm_u8,speex,truespeech,vorbis,"
    "wmalossless,wmapro,wmav1,wmav2,wmavoice"
)
"""FFmpeg's decoders that may run; all others, and all video, are disabled."""

BLOCK_SECS, LIVE_BLOCK_SECS = 1.0, 0.1
"""Length of the audio that is converted at once, in seconds; in a live stream, of the audio that is mixed at once."""

MISSING_SECS, MISSING_SHARE = 1.0, 0.05
"""Maximum difference between the declared and the decoded length: encoders round up, and tracks are edited."""

SCALES = {"u1": 2.0**7, "i2": 2.0**15, "i4": 2.0**31}
"""Full scale of integer samples, by numpy's type."""


def decode_container(
    name: str, demuxer: str, file: RawIOBase, max_secs: float, *, separate: bool = False, live: bool = False
) -> Iterator[Pcm]:
    """Decode the first audio stream of a container.

    Args:
        name: name of the format in messages.
        demuxer: FFmpeg's name of the format.
        file: the file; need not be seekable.
        max_secs: maximum length of the audio in seconds.
        separate: whether to keep the channels instead of mixing them down to one.
        live: whether to decode each frame as it arrives.

    Yields:
        Blocks [channels, n].

    Raises:
        ApiError: the file is damaged, cut short, or not supported, or its audio is longer than allowed.
        MemoryError: the file asks for more memory than FFmpeg or the process may allocate.
    """
    converter: Converter | None = None
    form, decoded_secs = (0, 0), 0.0
    try:
        for block, rate in _blocks(name, demuxer, file, live=live):
            decoded_secs += len(block) / rate
            if decoded_secs > max_secs + 1 / rate:
                raise too_long(f"more than {max_secs:g} s", max_secs)
            if form != (block.shape[1], rate):
                if converter:
                    yield converter.finish()
                form = block.shape[1], rate
                converter = Converter(*form, separate=separate)
            assert converter  # noqa: S101 (made for the first block)
            yield converter.convert(block)
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError) as error:
        raise undecodable(f"The {name} file is damaged or cut short.") from error
    if converter:
        yield converter.finish()
    elif not live:
        raise undecodable(f"The {name} file holds no audio.")


def _blocks(name: str, demuxer: str, file: RawIOBase, *, live: bool) -> Iterator[tuple[Floats, int]]:
    """Yield samples [n, channels], full scale 1, and their rate."""
    options = {
        "format_whitelist": demuxer,
        "protocol_whitelist": "none",
        "codec_whitelist": DECODERS,
    }
    with av.open(file, format=demuxer, options=options) as container:
        if not container.streams.audio:
            raise unsupported(f"The {name} file has no audio.")
        stream = container.streams.audio[0]
        codec = stream.codec_context
        if codec is None or codec.name not in DECODERS.split(","):
            raise unsupported(f"The {name} file's codec{codec and f', {codec.name},'} isn't supported.")
        codec.thread_count = 1
        waiting: list[Floats] = []
        form, waiting_frames, decoded_secs = (0, 0), 0, 0.0
        for frame in _frames(container, stream):
            frame_form = len(frame.layout.channels), frame.sample_rate
            if form != frame_form:
                if waiting:
                    yield np.concatenate(waiting), form[1]
                    waiting, waiting_frames = [], 0
                check_format(*frame_form)
                form = frame_form
            samples = _floats(frame)
            waiting.append(samples)
            waiting_frames += len(samples)
            decoded_secs += len(samples) / frame.sample_rate
            needed_secs = BLOCK_SECS if not live else LIVE_BLOCK_SECS if form[0] > 1 else 0.0
            if waiting_frames >= needed_secs * frame.sample_rate:
                yield np.concatenate(waiting), form[1]
                waiting, waiting_frames = [], 0
        if waiting:
            yield np.concatenate(waiting), form[1]
        declared_secs = _declared_secs(container, stream)
        if declared_secs - decoded_secs > max(MISSING_SECS, MISSING_SHARE * declared_secs):
            raise undecodable(f"The {name} file is cut short: it declares {declared_secs:.7g} s, but has {decoded_secs:.7g} s.")


def _frames(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
    """Yield the decodable frames; damaged packets are skipped, and a damaged structure ends the file."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.error.MemoryError:
            raise
        except av.FFmpegError:
            packet = None
        if packet is None:
            return
        try:
            yield from packet.decode()
        except av.error.MemoryError:
            raise
        except av.FFmpegError:
            continue


def _floats(frame: av.AudioFrame) -> Floats:
    """Return a frame's samples [n, channels], full scale 1."""
    array = frame.to_ndarray()
    samples = array.T if frame.format.is_planar else array.reshape(-1, len(frame.layout.channels))
    if samples.dtype.kind == "f":
        return np.nan_to_num(samples).clip(-OVERSHOOT, OVERSHOOT).astype(np.float32)
    scale = SCALES[samples.dtype.str[1:]]
    offset = scale if samples.dtype.kind == "u" else 0.0
    scaled: Floats = ((samples - offset) / scale).astype(np.float32)
    return scaled


def _declared_secs(container: av.container.InputContainer, stream: av.AudioStream) -> float:
    """Return the length of a stream in an MP4 file's index, or 0. In other containers, the length may be that of a video."""
    if not container.format.name.startswith("mov") or not stream.duration or not stream.time_base:
        return 0.0
    return float(stream.duration * stream.time_base)
