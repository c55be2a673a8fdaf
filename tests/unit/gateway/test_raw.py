"""Raw audio: formats, limits, and streams that are cut anywhere."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import pytest
import soxr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway.audio import RATE
from gateway.audio.raw import DEFAULT, G711, Encoding, RawFormat, RawStream, check_raw, parse_raw_format, read_raw
from gateway.errors import ApiError, ErrorKind

NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 48_000).astype(np.float32)


def encode(samples: NDArray[np.float32], encoding: Encoding) -> bytes:
    """Encode by the nearest value of the encoding."""
    if encoding is Encoding.LINEAR16:
        return bytes(np.rint(samples * 0x7FFF).astype("<i2"))
    if encoding is Encoding.FLOAT32:
        return samples.astype("<f4").tobytes()
    codes = np.argsort(G711[encoding], kind="stable")
    values = G711[encoding][codes]
    nearest: NDArray[np.uint8] = codes[np.searchsorted((values[1:] + values[:-1]) / 2, samples.ravel())].astype(np.uint8)
    return nearest.tobytes()


# --- Formats ---


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ({}, DEFAULT),
        ({"encoding": "linear16", "sample_rate": "16000", "channels": "1", "other": "x"}, DEFAULT),
        ({"encoding": "mulaw", "sample_rate": "8000"}, RawFormat(Encoding.MULAW, 8000)),
        ({"encoding": "alaw"}, RawFormat(Encoding.ALAW)),
        ({"encoding": "float32", "sample_rate": "48000", "channels": "8"}, RawFormat(Encoding.FLOAT32, 48_000, 8)),
    ],
)
def test_format_of_a_query(query: Mapping[str, str], expected: RawFormat) -> None:
    assert parse_raw_format(query) == expected


@pytest.mark.parametrize(
    ("query", "param", "parts"),
    [
        ({"encoding": "opus"}, "encoding", ["'opus'", "linear16, mulaw, alaw, float32"]),
        ({"encoding": "MULAW"}, "encoding", ["'MULAW'"]),
        ({"encoding": ""}, "encoding", ["''"]),
        ({"sample_rate": "7999"}, "sample_rate", ["'7999'", "8000 to 48000 Hz"]),
        ({"sample_rate": "48001"}, "sample_rate", ["'48001'"]),
        ({"sample_rate": "16e3"}, "sample_rate", ["'16e3'"]),
        ({"sample_rate": "9" * 5000}, "sample_rate", ["'9999"]),
        ({"sample_rate": "-16000"}, "sample_rate", ["'-16000'"]),
        ({"sample_rate": "١٦٠٠٠"}, "sample_rate", ["8000 to 48000"]),
        ({"channels": "0"}, "channels", ["'0'", "1 to 8"]),
        ({"channels": "9"}, "channels", ["'9'", "1 to 8"]),
        ({"channels": ""}, "channels", ["''"]),
    ],
)
def test_values_that_are_not_allowed(query: Mapping[str, str], param: str, parts: list[str]) -> None:
    with pytest.raises(ApiError) as caught:
        parse_raw_format(query)
    assert (caught.value.kind, caught.value.param) == (ErrorKind.UNACCEPTABLE, param)
    assert all(part in caught.value.message for part in parts)
    assert len(caught.value.message) < 200


# ITU-T G.711, tables 1a and 2a: decoder output values at the ends of the segments. The codes are written as in the tables, with
# the sign first; A-law's even bits are inverted afterwards.
MULAW_VALUES = {
    0x80: 8031, 0x8F: 4191, 0x90: 3999, 0x9F: 2079, 0xA0: 1983, 0xAF: 1023, 0xC0: 471, 0xCF: 231, 0xE0: 93, 0xEF: 33,
    0xF0: 30, 0xFE: 2, 0xFF: 0,
}  # fmt: skip
ALAW_VALUES = {
    0xFF: 4032, 0xF0: 2112, 0xEF: 2016, 0xE0: 1056, 0xDF: 1008, 0xD0: 528, 0xCF: 504, 0xC0: 264, 0xBF: 252, 0xB0: 132,
    0xAF: 126, 0xA0: 66, 0x9F: 63, 0x90: 33, 0x8F: 31, 0x80: 1,
}  # fmt: skip


def test_mulaw_equals_the_itu_tables() -> None:
    table = G711[Encoding.MULAW] * 2**13
    for code, value in MULAW_VALUES.items():
        assert (table[code], table[code & 0x7F]) == (value, -value)


def test_alaw_is_that_of_the_itu() -> None:
    table = G711[Encoding.ALAW] * 2**12
    for code, value in ALAW_VALUES.items():
        assert (table[code ^ 0x55], table[(code ^ 0x55) & 0x7F]) == (value, -value)


# --- Recordings ---


@pytest.mark.parametrize("encoding", Encoding)
@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
def test_raw_recordings(encoding: Encoding, rate: int, channels: int) -> None:
    wave = (0.4 * np.sin(2 * np.pi * 440 * np.arange(3 * rate) / rate)).astype(np.float32)
    format_ = RawFormat(encoding, rate, channels)
    body = encode(np.repeat(wave[:, None], channels, axis=1), encoding)
    check_raw(len(body), format_, 3)
    for separate in (False, True):
        samples = np.concatenate(list(read_raw(body, format_, separate=separate)), axis=1)
        assert samples.shape[0] == (channels if separate else 1)
        assert abs(samples.shape[1] - 3 * RATE) <= 1
        expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(samples.shape[1]) / RATE)
        for channel in samples:
            assert np.abs(channel[RATE:-RATE] / 0x8000 - expected[RATE:-RATE]).max() < 0.02


def test_separate_channels_are_independent() -> None:
    audio = np.random.default_rng(1).integers(-0x8000, 0x8000, (5 * RATE + 7, 3), dtype=np.int16)
    blocks = list(read_raw(audio.tobytes(), RawFormat(channels=3), separate=True))
    assert all(block.shape[1] <= RATE for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), audio.T)


@pytest.mark.parametrize(
    ("size", "format_", "message"),
    [
        (3, DEFAULT, "odd length, 3 bytes"),
        (6, RawFormat(channels=2), "6 bytes, but raw PCM has 4 bytes"),
        (6, RawFormat(Encoding.FLOAT32), "6 bytes, but raw PCM has 4 bytes"),
        (7, RawFormat(Encoding.MULAW, 8000, 2), "7 bytes, but raw PCM has 2 bytes"),
    ],
)
def test_recordings_that_end_within_a_sample(size: int, format_: RawFormat, message: str) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        check_raw(size, format_, 60)
    assert caught.value.kind is ErrorKind.ODD_LENGTH


def test_maximum_length_depends_on_the_format() -> None:
    check_raw(8000 * 2 * 10, RawFormat(Encoding.MULAW, 8000, 2), 10)
    with pytest.raises(ApiError, match=r"lasts 10\.5 s; at most 10 s") as caught:
        check_raw(8000 * 2 * 21 // 2, RawFormat(Encoding.MULAW, 8000, 2), 10)
    assert caught.value.kind is ErrorKind.AUDIO_TOO_LONG


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_float_that_is_not_finite(value: float) -> None:
    body = np.array([0.0, value], "<f4").tobytes()
    with pytest.raises(ApiError, match="infinite or not a number"):
        list(read_raw(body, RawFormat(Encoding.FLOAT32)))


def test_float_beyond_full_scale_is_clipped() -> None:
    body = np.array([1.5, -1.5, 3e38], "<f4").tobytes()
    assert next(read_raw(body, RawFormat(Encoding.FLOAT32)))[0].tolist() == [0x7FFF, -0x8000, 0x7FFF]


# --- Streams ---


def cut(body: bytes, lengths: list[int], format_: RawFormat) -> NDArray[np.int16]:
    """Convert a stream in pieces of these lengths, repeated."""
    stream, at, parts, turn = RawStream(format_), 0, [], 0
    while at < len(body):
        length = lengths[turn % len(lengths)]
        parts.append(stream.convert(body[at : at + length]))
        at, turn = at + length, turn + 1
    return np.concatenate([*parts, stream.finish()])


FORMATS = [
    RawFormat(encoding, rate, channels)
    for encoding in Encoding
    for rate, channels in ((8000, 1), (16_000, 2), (44_100, 2), (48_000, 1))
]


@given(st.sampled_from(FORMATS), st.lists(st.integers(1, 9000), min_size=1, max_size=20))
def test_no_cut_changes_a_sample(format_: RawFormat, lengths: list[int]) -> None:
    body = encode(NOISE[: 20_000 * format_.channels], format_.encoding)
    np.testing.assert_array_equal(cut(body, lengths, format_), cut(body, [len(body)], format_))


@pytest.mark.parametrize("rate", [8_000, 11_025, 24_000, 44_100, 48_000])
def test_streams_are_resampled_without_a_seam(rate: int) -> None:
    body = encode(NOISE, Encoding.FLOAT32)
    expected = soxr.resample(NOISE, rate, RATE, "HQ") * 0x8000
    samples = cut(body, [4 * rate // 50], RawFormat(Encoding.FLOAT32, rate))
    assert len(samples) == len(expected)
    assert np.abs(samples - expected).max() <= 0.51


@pytest.mark.parametrize("rate", [8_000, 11_025, 24_000, 44_100, 48_000])
def test_a_resampled_stream_is_late_by_less_than_an_eighth_of_a_second(rate: int) -> None:
    stream, given_samples, taken = RawStream(RawFormat(rate=rate)), 0, 0
    for _ in range(200):
        given_samples += rate // 50
        taken += len(stream.convert(bytes(2 * (rate // 50))))
        assert given_samples / rate - taken / RATE < 0.125


def test_a_stream_of_opposite_channels_is_not_silent() -> None:
    wave = np.sin(np.arange(2 * RATE) / 9).astype(np.float32) / 2
    samples = cut(encode(np.stack([wave, -wave], axis=1), Encoding.LINEAR16), [640], RawFormat(channels=2))
    assert np.abs(samples).max() == pytest.approx(0x4000, rel=0.01)


def test_a_stream_that_ends_within_a_sample() -> None:
    stream = RawStream(RawFormat(channels=2))
    stream.convert(os.urandom(6))
    with pytest.raises(ApiError, match="ends within a sample") as caught:
        stream.finish()
    assert caught.value.kind is ErrorKind.ODD_LENGTH
