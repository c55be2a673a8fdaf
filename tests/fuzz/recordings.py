"""A short tone in every format and codec that is decoded."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import soundfile

from tests.support.media import RECORDER, encode_container

FORMS = [
    ("WAV", "PCM_16", 16_000), ("WAV", "PCM_24", 44_100), ("WAV", "FLOAT", 8_000), ("WAV", "ULAW", 8_000),
    ("WAV", "MS_ADPCM", 16_000), ("WAV", "GSM610", 8_000), ("RF64", "PCM_16", 16_000), ("WAVEX", "PCM_16", 48_000),
    ("AIFF", "PCM_16", 16_000), ("AU", "ULAW", 8_000), ("CAF", "PCM_16", 48_000), ("CAF", "ALAC_16", 16_000),
    ("W64", "PCM_24", 16_000), ("MP3", "MPEG_LAYER_III", 16_000), ("MP3", "MPEG_LAYER_III", 44_100),
    ("FLAC", "PCM_16", 16_000), ("FLAC", "PCM_24", 44_100), ("OGG", "VORBIS", 16_000), ("OGG", "OPUS", 48_000),
]  # fmt: skip
CONTAINERS: list[tuple[str, str, int, dict[str, str]]] = [
    ("ipod", "aac", 48_000, {}),
    ("mp4", "alac", 48_000, {}),
    ("mp4", "aac", 44_100, {"movflags": "empty_moov", "frag_duration": "50000"}),
    ("webm", "libopus", 48_000, {}),
    ("webm", "libopus", 48_000, RECORDER),
    ("matroska", "flac", 44_100, {}),
    ("adts", "aac", 16_000, {}),
    ("asf", "wmav2", 44_100, {}),
    ("amr", "libopencore_amrnb", 8_000, {}),
]
TONE = 0.3 * np.sin(np.arange(2400) / 8)


def files() -> Iterator[bytes]:
    """Yield each with one channel, and with two where the codec has them."""
    for container, subtype, rate in FORMS:
        for channels in (1,) if subtype == "GSM610" else (1, 2):
            file = io.BytesIO()
            soundfile.write(file, np.repeat(TONE[:, None], channels, axis=1), rate, subtype, format=container)
            yield file.getvalue()


def containers() -> Iterator[bytes]:
    """Yield a tone in each container that FFmpeg decodes."""
    samples = (TONE * 32767).astype(np.int16)
    for container, codec, rate, options in CONTAINERS:
        for channels in (1,) if rate == 8_000 else (1, 2):
            yield encode_container(samples, container, codec, rate, channels, options=options)


def pcm() -> bytes:
    """Return raw PCM."""
    return bytes((TONE * 32767).astype("<i2"))
