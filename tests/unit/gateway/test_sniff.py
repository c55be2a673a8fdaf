"""What a body is taken for: nothing that is recognisably not PCM is taken for PCM, and no PCM for anything else."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from gateway.audio import media_types
from gateway.audio.media_types import OCTETS, identify_body
from gateway.audio.sniff import HEAD_BYTES, RAW, SIGNATURES, StreamStart, identify
from gateway.errors import ApiError, ErrorKind

RATE = 16_000
SPEECH = sorted((Path(__file__).parents[2] / "speech").glob("*.flac"))
NOISE = np.random.default_rng(0).integers(-0x8000, 0x8000, RATE, dtype=np.int16).tobytes()


def encode(container: str, subtype: str, rate: int = RATE, secs: float = 2) -> bytes:
    file = io.BytesIO()
    audio, _ = soundfile.read(SPEECH[0])
    soundfile.write(file, audio[: round(secs * RATE)], rate, subtype, format=container)
    return file.getvalue()


def frames(header: bytes, size: int, number: int = 40) -> bytes:
    """Frames of a fixed size with random contents."""
    random = np.random.default_rng(1)
    return b"".join(header + random.bytes(size - len(header)) for _ in range(number))


def adts(size: int) -> bytes:
    return bytes((0xFF, 0xF1, 0x50, 0x80 | size >> 11, size >> 3 & 0xFF, (size & 7) << 5 | 0x1F, 0xFC))


TEXT = "The quick brown fox jumps over the lazy dog. " * 40
GERMAN = "Über den Wölken muß die Freiheit wohl grenzenlos sein. " * 40
CHINESE = "语音识别服务器在真实的环境中运行。" * 40
SUBTITLES = "WEBVTT\n\n00:00.000 --> 00:02.000\nask not what your country can do for you\n" * 20

DECODED = {
    "WAV": encode("WAV", "PCM_16"),
    "W64": encode("W64", "PCM_16"),
    "AIFF": encode("AIFF", "PCM_16"),
    "AU": encode("AU", "PCM_16"),
    "CAF": encode("CAF", "PCM_16"),
    "FLAC": encode("FLAC", "PCM_16"),
    "Ogg": encode("OGG", "OPUS"),
    "MP3": encode("MP3", "MPEG_LAYER_III"),
}
CONTAINERS = {
    "MP4": b"\0\0\0\x20ftypM4A " + NOISE,
    "MP4 ": b"\0\0\0\x18stypmsdh" + NOISE,  # a segment of a live stream
    "QuickTime": b"\0\0\0\x08wide" + NOISE,
    "WebM or Matroska": b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81" + NOISE,
    "AMR": b"#!AMR-WB\n" + NOISE,
    "AAC (ADTS)": frames(adts(200), 200),
    "ASF or WMA": b"\x30\x26\xb2\x75\x8e\x66\xcf\x11" + NOISE,
}
"""Formats that need the extra."""

LIVE = ("WAV", "FLAC", "Ogg", "WebM or Matroska")
"""Formats that a stream may have."""

FOREIGN = {
    "WebM or Matroska without its beginning": b"\x1f\x43\xb6\x75\x01\xff" + NOISE,
    "AMR with several channels": b"#!AMR_MC1.0\n" + NOISE,
    "AVI": b"RIFF\0\0\0\0AVI LIST" + NOISE,
    "WebP": b"RIFF\0\0\0\0WEBP" + NOISE,
    "RIFF MIDI": b"RIFF\0\0\0\0RMID" + NOISE,
    "RIFF other than WAV": b"RIFF\0\0\0\0ACON" + NOISE,
    "RF64 other than WAV": b"RF64\xff\xff\xff\xffABCD" + NOISE,
    "IFF other than AIFF": b"FORM\0\0\0\08SVX" + NOISE,
    "AAC (ADIF)": b"ADIF" + NOISE,
    "AAC (LOAS)": frames(b"\x56\xe0\x60", 0x63),
    "AC-3": frames(b"\x0b\x77\x12\x34\x14\x40", 768),
    "FLV": b"FLV\x01\x04" + NOISE,
    "MIDI": b"MThd\0\0\0\x06" + NOISE,
    "RealMedia": b".RMF" + NOISE,
    "MPEG program stream": b"\0\0\x01\xba\x44" + NOISE,
    "MPEG transport stream": frames(b"\x47\x40\x00\x10", 188),
    "Monkey's Audio": b"MAC \x96\x0f" + NOISE,
    "WavPack": b"wvpk" + NOISE,
    "True Audio": b"TTA1" + NOISE,
    "Musepack": b"MPCK" + NOISE,
    "DSD": b"DSD " + NOISE,
    "DTS": b"\x7f\xfe\x80\x01" + NOISE,
    "SILK": b"\x02#!SILK_V3" + NOISE,
    "VOC": b"Creative Voice File\x1a" + NOISE,
    "NIST SPHERE": b"NIST_1A\n   1024\n" + NOISE,
    "ZIP": b"PK\3\4" + NOISE,
    "gzip": gzip.compress(NOISE),
    "bzip2": b"BZh91AY&SY" + NOISE,
    "xz": b"\xfd7zXZ\0" + NOISE,
    "7-Zip": b"7z\xbc\xaf\x27\x1c" + NOISE,
    "RAR": b"Rar!\x1a\x07\0" + NOISE,
    "tar": b"speech.wav".ljust(257, b"\0") + b"ustar\x0000" + NOISE,
    "PDF": b"%PDF-1.7" + NOISE,
    "PNG": b"\x89PNG\r\n\x1a\n" + NOISE,
    "JPEG": b"\xff\xd8\xff\xe0" + NOISE,
    "GIF": b"GIF89a" + NOISE,
    "NumPy array": b"\x93NUMPY\x01\0" + NOISE,
    "Python pickle": b"\x80\x04\x95" + NOISE,
    "ELF program": b"\x7fELF" + NOISE,
}
TEXTS = {
    "text": TEXT.encode(),
    "text ": GERMAN.encode(),
    "text  ": GERMAN.encode("latin-1"),
    "text   ": CHINESE.encode(),
    "text    ": TEXT.encode("utf-16"),
    "text     ": TEXT.encode("utf-16-le"),
    "text      ": TEXT.encode("utf-16-be"),
    "text       ": CHINESE.encode("utf-16"),
    "text        ": TEXT.encode("utf-32"),
    "text         ": b"\xef\xbb\xbf" + GERMAN.encode(),
    "text          ": b"@recording.wav\r\n\r\n",
    "text           ": b"\t0 1 2 3\n" * 1000,
    "JSON text": json.dumps({"audio_buffer": list(range(256)) * 10}).encode(),
    "JSON text ": json.dumps({"audio": "x"}, indent=2).encode("utf-16-le") * 4,
    "HTML text": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>",
    "XML text": b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>',
    "WebVTT text": SUBTITLES.encode(),
    "WebVTT text ": SUBTITLES.encode("utf-16"),
    "SubRip text": b"1\n00:00:00,000 --> 00:00:02,000\nask not\n\n" * 9,
    "Base64 text": base64.b64encode(NOISE),
    "Base64 text ": base64.encodebytes(NOISE),
    "data URL text": b"data:audio/wav;base64," + base64.b64encode(NOISE),
    "playlist text": b"#EXTM3U\n#EXTINF:10,\nhttp://example.com/1.ts\n",
}


def check(body: bytes, frame_bytes: int = 640) -> None:
    """Send the start of a stream."""
    start = StreamStart()
    for at in range(0, min(len(body), HEAD_BYTES), frame_bytes):
        start.check(body[at : at + frame_bytes])


@pytest.mark.parametrize("name", [*DECODED, *CONTAINERS])
def test_files_are_recognised(name: str) -> None:
    found = identify((DECODED | CONTAINERS)[name])
    assert (found.format.name, found.format.decodable, found.start) == (name.strip(), True, 0)


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_without_the_extra_are_refused_with_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert identify_body(CONTAINERS[name], "").format.name == name.strip()
    monkeypatch.setattr(media_types, "CONTAINERS", False)
    with pytest.raises(ApiError, match=r"pip install 'amira-asr\[containers\]'") as caught:
        identify_body(CONTAINERS[name], "")
    assert caught.value.kind is ErrorKind.UNSUPPORTED_MEDIA
    assert name.strip() in caught.value.message


@pytest.mark.parametrize("content_type", ["video/mp4", "video/webm", "application/ogg", "application/x-www-form-urlencoded"])
def test_other_types_are_taken_for_files_alone(content_type: str) -> None:
    assert identify_body(DECODED["Ogg"], content_type).format.name == "Ogg"
    with pytest.raises(ApiError, match=re.escape(content_type)) as caught:
        identify_body(NOISE, content_type)
    assert caught.value.kind is ErrorKind.UNSUPPORTED_MEDIA


@pytest.mark.parametrize("content_type", [OCTETS, "audio/wav", "audio/mpeg", "audio/pcm"])
@pytest.mark.parametrize("name", [*FOREIGN, *TEXTS])
def test_what_is_not_audio_for_us_is_refused_by_name(name: str, content_type: str) -> None:
    with pytest.raises(ApiError) as caught:
        identify_body((FOREIGN | TEXTS)[name], content_type)
    assert caught.value.kind is ErrorKind.UNSUPPORTED_MEDIA
    assert name.strip() in caught.value.message
    assert "Ogg (Vorbis, Opus)" in caught.value.message
    if name in TEXTS:
        assert "text, not audio" in caught.value.message


@pytest.mark.parametrize("frame_bytes", [2, 160, 640, 4096, 2**20])
@pytest.mark.parametrize("name", [name for name in (*DECODED, *CONTAINERS, *FOREIGN, *TEXTS) if name not in LIVE])
def test_streams_that_are_not_pcm_are_refused_within_their_first_bytes(name: str, frame_bytes: int) -> None:
    with pytest.raises(ApiError) as caught:
        check((DECODED | CONTAINERS | FOREIGN | TEXTS)[name] * 9, frame_bytes)
    assert caught.value.kind is ErrorKind.UNSUPPORTED_MEDIA
    assert name.strip().removesuffix("other than WAV").removesuffix("text")[:4] in caught.value.message


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("lost", [0, 1, 100, 500])
def test_mp3_from_anywhere_in_a_stream(rate: int, lost: int) -> None:
    file = encode("MP3", "MPEG_LAYER_III", rate)
    assert identify(file[300 + lost :]).format.name == "MP3"
    assert identify(bytes(lost) + file).format.name == "MP3"


def test_mp3_of_two_frames() -> None:
    frame = b"\xff\xfb\x90\x64" + bytes(413)
    assert identify(frame * 2).format.name == "MP3"
    assert identify(frame[:-1] * 2).format == RAW


def test_short_text_may_be_pcm() -> None:
    assert identify(b"short text here").format == RAW
    assert identify(b"short text here!").format.name == "text"


def test_text_that_goes_on_as_audio_is_audio() -> None:
    assert identify(TEXT.encode() + b"\0\1").format == RAW


# --- Raw PCM is raw PCM ---


def is_raw(body: bytes) -> bool:
    check(body)
    return identify(body).format == RAW


@pytest.mark.parametrize("path", SPEECH, ids=lambda path: path.stem)
@pytest.mark.parametrize("gain", [1.0, 0.3, 0.01, 0.001, 30.0])
def test_speech_is_pcm_from_any_sample_on(path: Path, gain: float) -> None:
    audio = soundfile.read(path, dtype="int16")[0]
    audio = np.clip(audio * gain, -0x8000, 0x7FFF).astype("<i2")
    for at in range(0, len(audio) - 1000, 1999):
        assert is_raw(audio[at : at + 8192].tobytes())


@pytest.mark.parametrize("offset", [0, 1, 20, 40, 60, 80, 100, 120, 256, 8000, -1, -1025, -3329, 0x4141 - 0x8000])
@pytest.mark.parametrize("level", [0, 1, 3, 10, 30, 100, 1000, 8000])
def test_noise_of_any_level_and_offset_is_pcm(level: int, offset: int) -> None:
    random = np.random.default_rng(level)
    for _ in range(20):
        audio = np.clip(random.normal(offset, level, 8192), -0x8000, 0x7FFF).astype("<i2")
        assert is_raw(audio.tobytes())


@pytest.mark.parametrize("period", [2, 4, 8, 16, 32, 36, 47, 64, 72, 80, 94, 100, 144, 160, 208])
def test_periodic_tones_are_pcm(period: int) -> None:
    for amplitude in (*range(1, 100, 7), *range(100, 32_000, 391)):
        for wave in (np.sin, lambda phase: np.sign(np.sin(phase + 0.1))):
            audio = np.rint(amplitude * wave(2 * np.pi * np.arange(4200) / period)).astype("<i2")
            assert identify(audio.tobytes()).format == RAW


@given(st.binary(min_size=2, max_size=64), st.integers(0, 2**32))
def test_random_bytes_are_pcm_unless_a_signature_is_there(head: bytes, seed: int) -> None:
    body = head + np.random.default_rng(seed).bytes(9000)
    signed = any(body.startswith(parts[0][1], parts[0][0]) for _, parts in SIGNATURES)
    assert signed or identify(body).format == RAW


class Counted(bytes):
    """Bytes that count how many of them are read."""

    read = 0

    def __getitem__(self, key: Any) -> Any:
        part = super().__getitem__(key)
        self.read += len(part) if isinstance(part, bytes) else 1
        return part


@pytest.mark.parametrize("text", ["чистый текст ", "".join(map(chr, range(0x4E00, 0x9000))), "<p>page</p>\n"])
def test_little_of_a_large_text_is_read(text: str) -> None:
    """It is read in the event loop, where a megabyte takes 40 ms."""
    body = Counted((text * (2**21 // len(text))).encode())
    assert identify(body).format.name.endswith("text")
    assert body.read < 100_000


def test_tags_that_lie_about_their_size() -> None:
    for size in (b"\0\0\0\0", b"\x7f\x7f\x7f\x7f"):
        assert identify(b"ID3\4\0\0" + size).format.name == "MP3"
    assert identify(struct.pack("<3sBBB4s", b"ID3", 4, 0, 0, b"\xff" * 4) + NOISE).format == RAW
