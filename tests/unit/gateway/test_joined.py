"""Files joined by ``cat``: the audio of each is decoded, or the error says what is wrong."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from gateway.audio import RATE
from gateway.audio.body import Body
from gateway.audio.files import decode_audio, decode_blocks
from gateway.audio.joined import BEGINNINGS, split
from gateway.audio.sniff import DECODABLE, identify
from gateway.errors import ApiError, ErrorKind
from tests.support.media import RECORDER, encode_container

SPEECH: NDArray[np.int16] = soundfile.read(Path(__file__).parents[2] / "speech" / "jfk.flac", dtype="int16", always_2d=True)[0][
    : 3 * RATE, 0
]
FRAGMENTS = {"movflags": "empty_moov", "frag_duration": "500000"}


def sound(samples: NDArray[np.int16], format_: str, subtype: str = "PCM_16", rate: int = RATE, channels: int = 1) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.repeat(samples[:, None] / 0x8000, channels, axis=1), rate, subtype, format=format_)
    return file.getvalue()


def write(kind: str, samples: NDArray[np.int16]) -> bytes:
    if kind in ("WAV", "W64", "AIFF", "AU", "CAF", "FLAC", "MP3"):
        return sound(samples, kind, "MPEG_LAYER_III" if kind == "MP3" else "PCM_16")
    container, codec, rate, options = {
        "Ogg": ("ogg", "libopus", 48_000, {}),
        "M4A": ("ipod", "aac", 48_000, {}),
        "index at the front": ("mp4", "aac", 48_000, {"movflags": "faststart"}),
        "fragments": ("mp4", "aac", 48_000, FRAGMENTS),
        "QuickTime": ("mov", "pcm_s16le", RATE, {}),
        "WebM": ("webm", "libopus", 48_000, {}),
        "MediaRecorder": ("webm", "libopus", 48_000, RECORDER),
        "Matroska": ("matroska", "flac", RATE, {}),
        "ADTS": ("adts", "aac", 48_000, {}),
        "WMA": ("asf", "wmav2", 44_100, {}),
        "AMR": ("amr", "libopencore_amrnb", 8000, {}),
    }[kind]
    return encode_container(samples, container, codec, rate, options=options)


SPLIT = ["WAV", "W64", "AIFF", "AU", "CAF", "FLAC", "M4A", "index at the front", "fragments", "QuickTime", "WebM"]
SPLIT += ["MediaRecorder", "Matroska", "WMA", "AMR"]


@pytest.mark.parametrize("kind", [*SPLIT, "Ogg"])
def test_joined_files_give_the_audio_of_each(kind: str) -> None:
    one, other = write(kind, SPEECH), write(kind, SPEECH[RATE:])
    expected = np.concatenate([decode_audio(file, "", 60) for file in (one, other, one)])
    np.testing.assert_array_equal(decode_audio(one + other + one, "", 60), expected)


@pytest.mark.parametrize("kind", ["MP3", "ADTS"])
def test_joined_frames_are_one_file(kind: str) -> None:
    """The frames at the joint depend on those before."""
    one, other = write(kind, SPEECH), write(kind, SPEECH[RATE:])
    first, second, both = (decode_audio(file, "", 60) for file in (one, other, one + other))
    assert abs(len(both) - len(first) - len(second)) < 0.2 * RATE, "with the padding of the first one's last frames"
    tail = second[RATE:].astype(float)
    ends = range(len(both) - 1000, len(both) + 1)
    assert max(float(np.corrcoef(both[end - len(tail) : end], tail)[0, 1]) for end in ends) > 0.95


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_joined_files_may_differ_in_rate_and_channels(kind: str) -> None:
    files = [sound(SPEECH, kind), sound(SPEECH, kind, rate=44_100, channels=2), sound(SPEECH, kind, rate=8000)]
    expected = np.concatenate([decode_audio(file, "", 60) for file in files])
    np.testing.assert_array_equal(decode_audio(b"".join(files), "", 60), expected)
    with pytest.raises(ApiError, match="channels changes from 1 to 2"):
        list(decode_blocks(b"".join(files), identify(files[0]), 60, separate=True))


@pytest.mark.parametrize("size", [b"\0\0\0\0", b"\xff\xff\xff\xff"])
def test_unfinished_wav_ends_where_the_next_one_begins(size: bytes) -> None:
    plain = write("WAV", SPEECH)
    at = plain.index(b"data") + 4
    unfinished = plain[:at] + size + plain[at + 4 :]
    np.testing.assert_array_equal(decode_audio(unfinished + plain, "", 60), np.concatenate([SPEECH, SPEECH]))


@pytest.mark.parametrize("between", [b"LIST\4\0\0\0INFO", b"ID3\4\0\0\0\0\0\4abcd", b"\0\0\0"])
def test_bytes_between_joined_files_are_no_audio(between: bytes) -> None:
    for kind in ("WAV", "FLAC"):
        one, other = write(kind, SPEECH), write(kind, SPEECH[RATE:])
        np.testing.assert_array_equal(decode_audio(one + between + other, "", 60), np.concatenate([SPEECH, SPEECH[RATE:]]))


def test_header_twice_is_no_audio() -> None:
    file = write("WAV", SPEECH)
    np.testing.assert_array_equal(decode_audio(file[: file.index(b"data") + 8] + file, "", 60), SPEECH)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "M4A"])
def test_damaged_second_file_is_named(kind: str) -> None:
    file = write(kind, SPEECH)
    with pytest.raises(ApiError, match="cut short") as raised:
        decode_audio(file + file[: len(file) // 2], "", 60)
    assert raised.value.kind is ErrorKind.UNDECODABLE_AUDIO


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "M4A"])
def test_limit_counts_all_files(kind: str) -> None:
    file = write(kind, SPEECH)
    assert len(decode_audio(file * 2, "", 6.2)) == 2 * len(decode_audio(file, "", 6.2))
    with pytest.raises(ApiError, match="more than 5 s") as raised:
        decode_audio(file * 2, "", 5)
    assert raised.value.kind is ErrorKind.AUDIO_TOO_LONG


def test_every_format_with_a_beginning_is_decodable() -> None:
    assert BEGINNINGS.keys() <= DECODABLE.keys()


@pytest.mark.parametrize("kind", SPLIT)
def test_one_file_is_not_split(kind: str) -> None:
    file = write(kind, SPEECH)
    assert [len(part) for part in split(identify(file).format, Body(file))] == [len(file)]
