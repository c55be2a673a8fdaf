from __future__ import annotations

import io
import struct
import time
import tracemalloc
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import pytest
import soundfile
import soxr
from hypothesis import given
from hypothesis import strategies as st

from gateway.audio.files import decode_audio
from gateway.audio.json_form import unpack_json
from gateway.errors import ApiError, ErrorKind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

RATE = 16_000
SPEECH = sorted((Path(__file__).parents[2] / "speech").glob("*.flac"))
OCTETS = "application/octet-stream"


def encode(audio: NDArray[Any], container: str, subtype: str, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    channels = 1 if audio.ndim == 1 else audio.shape[1]
    with soundfile.SoundFile(file, "w", rate, channels, subtype, format=container) as writer:
        for start in range(0, len(audio), 4096):  # libsndfile's Vorbis encoder overflows its stack with long writes
            writer.write(audio[start : start + 4096])
    return file.getvalue()


def decode(body: bytes, content_type: str = OCTETS, max_secs: float = 60) -> NDArray[np.int16]:
    samples = decode_audio(body, content_type, max_secs)
    assert samples.dtype == np.int16
    assert samples.ndim == 1
    return samples


def tone(rate: int, secs: float = 1.5, hz: float = 440, channels: int = 1) -> NDArray[np.float64]:
    wave = 0.5 * np.sin(2 * np.pi * hz * np.arange(round(secs * rate)) / rate)
    return wave if channels == 1 else np.stack([wave] * channels, axis=1)


def noise(samples: int = RATE, variant: int = 0) -> NDArray[np.int16]:
    audio = np.random.default_rng(variant).integers(-0x8000, 0x8000, samples, dtype=np.int16)
    audio[:2] = -0x8000, 0x7FFF
    return audio


def correlation(one: NDArray[Any], other: NDArray[Any]) -> float:
    return float(np.corrcoef(one.astype(float), other.astype(float))[0, 1])


@contextmanager
def refused(kind: ErrorKind, *parts: object) -> Iterator[pytest.ExceptionInfo[ApiError]]:
    """Expects an error of exactly this kind, whose message has these parts and nothing internal."""
    with pytest.raises(ApiError) as caught:
        yield caught
    assert caught.value.kind is kind
    for part in parts:
        assert str(part) in caught.value.message
    for internal in ("BytesIO", "sndfile", "Errno", "Traceback", ".py", "psf"):
        assert internal not in caught.value.message


# --- Ogg, by hand ---


def crc(data: bytes) -> int:
    """The checksum of RFC 3533, bit by bit."""
    register = 0
    for byte in data:
        register ^= byte << 24
        for _ in range(8):
            register = (register << 1 ^ (0x04C11DB7 if register >> 31 else 0)) & 0xFFFFFFFF
    return register


def ogg_page(packets: list[bytes], number: int, position: int = 0, flags: int = 0, serial: int = 7) -> bytes:
    lacing = b"".join(b"\xff" * (len(packet) // 255) + bytes([len(packet) % 255]) for packet in packets)
    start = b"OggS\0" + bytes([flags]) + struct.pack("<qII", position, serial, number)
    rest = bytes([len(lacing)]) + lacing + b"".join(packets)
    return start + struct.pack("<I", crc(start + bytes(4) + rest)) + rest


def split_ogg(file: bytes) -> list[bytes]:
    pages = []
    while len(file) > 27:
        header = 27 + file[26]
        size = header + sum(file[27:header])
        pages.append(file[:size])
        file = file[size:]
    return pages


def silent_opus(secs: int) -> bytes:
    """Ogg Opus with nothing but the shortest packets, which hold 20 ms of silence."""
    head = struct.pack("<8sBBHIHB", b"OpusHead", 1, 1, 0, 48_000, 0, 0)
    tags = struct.pack("<8sI4sI", b"OpusTags", 4, b"none", 0)
    pages = [ogg_page([head], 0, flags=2), ogg_page([tags], 1)]
    for second in range(1, secs + 1):
        flags = 4 if second == secs else 0
        pages.append(ogg_page([b"\xf8\xff\xfe"] * 50, second + 1, second * 48_000, flags))
    return b"".join(pages)


# --- WAV, by hand ---


def wav(
    samples: bytes,
    riff_size: int | None = None,
    data_size: int | None = None,
    form: bytes | None = None,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    form = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16) if form is None else form
    data = struct.pack("<4sI", b"data", len(samples) if data_size is None else data_size) + samples
    chunks = b"WAVE" + struct.pack("<4sI", b"fmt ", len(form)) + form + before + data + after
    return struct.pack("<4sI", b"RIFF", len(chunks) if riff_size is None else riff_size) + chunks


def rf64(samples: bytes, data_size: int) -> bytes:
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    sizes = struct.pack("<4sIQQQI", b"ds64", 28, 2**64 - 1, data_size, 0, 0)
    return b"RF64\xff\xff\xff\xffWAVE" + sizes + form + b"data\xff\xff\xff\xff" + samples


def flac_with_total(file: bytes, total: int) -> bytes:
    """Replaces the number of samples in a FLAC header; 0 means unknown."""
    return file[:21] + bytes([file[21] & 0xF0]) + struct.pack(">I", total) + file[26:]


# --- What comes out is what went in ---


LOSSLESS = [
    ("AIFF", "PCM_16"), ("AIFF", "PCM_24"), ("AIFF", "FLOAT"), ("AU", "PCM_16"), ("AU", "PCM_24"), ("AU", "FLOAT"),
    ("CAF", "PCM_16"), ("CAF", "PCM_24"), ("CAF", "DOUBLE"), ("CAF", "ALAC_16"), ("W64", "PCM_16"), ("W64", "FLOAT"),
    ("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_32"), ("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("WAVEX", "PCM_16"),
    ("WAVEX", "FLOAT"), ("RF64", "PCM_16"), ("RF64", "PCM_24"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"),
]  # fmt: skip
LOSSY = [("WAV", "PCM_U8"), ("WAV", "ULAW"), ("WAV", "ALAW"), ("OGG", "VORBIS"), ("AIFF", "ULAW"), ("AU", "ALAW")]
BLOCKWISE = [("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"), ("WAV", "GSM610"), ("WAV", "NMS_ADPCM_32"), ("WAV", "G721_32"),
             ("W64", "MS_ADPCM"), ("AIFF", "IMA_ADPCM")]  # fmt: skip


@pytest.mark.parametrize(("container", "subtype"), LOSSLESS)
@pytest.mark.parametrize("content_type", [OCTETS, "audio/wav", "Audio/X-Whatever; rate=1"])
def test_lossless_16_khz_mono_is_bit_exact(container: str, subtype: str, content_type: str) -> None:
    audio = noise(2 * RATE + 12_345)
    body = encode(audio / 0x8000 if subtype in ("FLOAT", "DOUBLE") else audio, container, subtype)
    np.testing.assert_array_equal(decode(body, content_type), audio)


@pytest.mark.parametrize("path", SPEECH, ids=lambda path: path.stem)
def test_speech_in_flac(path: Path) -> None:
    audio, rate = soundfile.read(path, always_2d=True)
    samples = decode(path.read_bytes(), "audio/flac")
    assert len(samples) == round(len(audio) * RATE / rate)
    expected = soxr.resample(audio.mean(axis=1), rate, RATE) * 0x8000
    assert np.abs(samples - expected).max() <= 1


@pytest.mark.parametrize(("container", "subtype"), LOSSLESS + LOSSY)
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
def test_tones_of_all_rates(rate: int, channels: int, container: str, subtype: str) -> None:
    samples = decode(encode(tone(rate, channels=channels), container, subtype, rate))
    assert abs(len(samples) - 1.5 * RATE) <= 1
    spectrum = np.abs(np.fft.rfft(samples[:RATE]))
    assert spectrum.argmax() == 440
    assert spectrum[440] == pytest.approx(0.25 * 0x8000 * RATE, rel=0.02)
    assert correlation(samples, tone(RATE, 2)[: len(samples)]) > 0.99


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8_000, 12_000, 16_000, 24_000, 48_000])
def test_tones_in_opus(rate: int, channels: int) -> None:
    samples = decode(encode(tone(rate, channels=channels), "OGG", "OPUS", rate), "audio/opus")
    assert abs(len(samples) - 1.5 * RATE) <= 2
    assert np.abs(np.fft.rfft(samples[:RATE])).argmax() == 440
    assert correlation(samples, tone(RATE, 2)[: len(samples)]) > 0.98


@pytest.mark.parametrize(("subtype", "similarity"), [("VORBIS", 0.98), ("OPUS", 0.94)])
@pytest.mark.parametrize("path", SPEECH, ids=lambda path: path.stem)
def test_speech_in_ogg(path: Path, subtype: str, similarity: float) -> None:
    audio, rate = soundfile.read(path, always_2d=True)
    audio = soxr.resample(audio, rate, 48_000)
    samples = decode(encode(audio, "OGG", subtype, 48_000), "audio/ogg; codecs=opus")
    expected = decode(path.read_bytes())
    assert abs(len(samples) - len(expected)) <= 1
    length = min(len(samples), len(expected))
    assert correlation(samples[:length], expected[:length]) > similarity


@pytest.mark.parametrize(("container", "subtype"), BLOCKWISE)
def test_codecs_in_blocks_are_padded_at_most(container: str, subtype: str) -> None:
    samples = decode(encode(tone(RATE), container, subtype), "audio/wav")
    assert 1.5 * RATE <= len(samples) < 1.5 * RATE + 2048
    assert correlation(samples[: RATE * 3 // 2], tone(RATE)) > 0.98


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_in_blocks_has_no_seams(rate: int) -> None:
    audio = np.random.default_rng(1).uniform(-0.4, 0.4, round(3.7 * rate)).astype(np.float32)
    expected = soxr.resample(audio, rate, RATE, "HQ") * 0x8000
    samples = decode(encode(audio, "WAV", "FLOAT", rate))
    assert len(samples) == len(expected)
    assert np.abs(samples - expected).max() <= 0.51


def test_channels_are_averaged() -> None:
    one, other = noise(variant=1), noise(variant=2)
    mixed = np.rint((one.astype(float) + other) / 2)
    np.testing.assert_array_equal(decode(encode(np.stack([one, other], axis=1), "WAV", "PCM_16")), mixed)


@pytest.mark.parametrize("value", [0x7FFF, -0x8000])
def test_full_scale_on_all_channels_stays_full_scale(value: int) -> None:
    assert set(decode(encode(np.full((RATE, 8), value, np.int16), "WAV", "PCM_16")).tolist()) == {value}


@pytest.mark.parametrize("gain", [1.0, 0.9, 0.75])
def test_opposite_channels_give_the_loudest(gain: float) -> None:
    audio = tone(RATE, secs=3.5)
    samples = decode(encode(np.stack([audio, -gain * audio], axis=1), "WAV", "FLOAT"))
    np.testing.assert_array_equal(samples, np.rint(audio * 0x8000))


def test_opposite_channels_among_silent_ones_do_not_cancel() -> None:
    audio, silence = tone(RATE), np.zeros(RATE * 3 // 2)
    samples = decode(encode(np.stack([silence, audio, -audio, silence], axis=1), "WAV", "PCM_16"))
    assert correlation(samples, audio) > 0.999
    assert np.abs(samples).max() == pytest.approx(0x4000, rel=0.01)


def test_channels_that_cancel_for_a_while_are_mixed_without_a_click() -> None:
    audio = 0.5 * np.sin(2 * np.pi * 100 * np.arange(6 * RATE) / RATE)
    other = audio.copy()
    other[2 * RATE : 4 * RATE] *= -1  # where the sine is zero
    samples = decode(encode(np.stack([audio, other], axis=1), "WAV", "FLOAT")).astype(float) / 0x8000
    assert np.abs(np.diff(samples)).max() < 1.5 * np.abs(np.diff(audio)).max()
    levels = np.sqrt(np.square(samples.reshape(-1, RATE // 2)).mean(axis=1))
    assert levels.min() > 0.9 * np.sqrt(np.square(audio).mean())


@pytest.mark.parametrize("rate", [RATE, 44_100])
@pytest.mark.parametrize("inverted", [0, 1])
def test_speech_with_one_inverted_channel_stays_speech(inverted: int, rate: int) -> None:
    audio, _ = soundfile.read(SPEECH[0])
    audio = soxr.resample(audio, RATE, rate)
    both = np.stack([audio, audio], axis=1)
    both[:, inverted] *= -0.999
    assert abs(correlation(decode(encode(both, "FLAC", "PCM_16", rate)), decode(encode(audio, "FLAC", "PCM_16", rate)))) > 0.99


@pytest.mark.parametrize("channels", [2, 3, 8])
def test_one_active_channel_is_averaged(channels: int) -> None:
    audio = noise().astype(float)
    mixed = np.zeros((len(audio), channels), np.int16)
    mixed[:, -1] = audio
    assert np.abs(decode(encode(mixed, "WAV", "PCM_16")) - audio / channels).max() <= 1


def test_float_beyond_full_scale_is_clipped_not_wrapped() -> None:
    audio = 3 * tone(RATE)
    audio[:6] = [1.0, 1.5, -1.0, -1.5, 100.0, 0.0]
    samples = decode(encode(audio, "WAV", "FLOAT"))
    assert samples[:6].tolist() == [0x7FFF, 0x7FFF, -0x8000, -0x8000, 0x7FFF, 0]
    np.testing.assert_array_equal(samples, np.clip(np.rint(audio.astype(np.float32) * 0x8000), -0x8000, 0x7FFF))


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("WAV", "FLOAT"), ("WAV", "DOUBLE"), ("AIFF", "FLOAT"), ("AU", "FLOAT"), ("CAF", "DOUBLE"), ("W64", "FLOAT")],
)
@pytest.mark.parametrize("bits", [16, 24, 32])
def test_float_with_integer_scale_is_scaled(bits: int, container: str, subtype: str) -> None:
    audio = soundfile.read(SPEECH[0], dtype="int16")[0].astype(float)
    audio *= 0x7FFF / np.abs(audio).max()
    samples = decode(encode(audio * 2.0 ** (bits - 16), container, subtype))
    assert np.abs(samples - audio).max() <= 1


def test_float_with_integer_scale_is_scaled_after_silence() -> None:
    audio = np.concatenate([np.zeros(5 * RATE), 300 * tone(RATE, secs=0.5), np.zeros(5 * RATE)])
    assert np.abs(decode(encode(audio, "WAV", "FLOAT")) - audio).max() <= 1


def test_overshoot_of_the_resampler_is_clipped_not_wrapped() -> None:
    square = np.where(tone(48_000, hz=100) >= 0, 0x7FFF, -0x8000).astype(np.int16)
    samples = decode(encode(square, "WAV", "PCM_16", 48_000))
    assert samples.max() == 0x7FFF
    assert correlation(samples, np.sign(tone(RATE, hz=100))) > 0.98


@pytest.mark.parametrize(
    "content_type", ["", "  ", OCTETS, f"{OCTETS.upper()}; x=y", "audio/pcm", "AUDIO/X-RAW", "audio/raw;rate=1"]
)
def test_raw_pcm(content_type: str) -> None:
    audio = noise()
    np.testing.assert_array_equal(decode(audio.tobytes(), content_type), audio)


def test_raw_pcm_is_not_copied() -> None:
    body = noise(5 * RATE).tobytes()
    tracemalloc.start()
    decode(body)
    assert tracemalloc.get_traced_memory()[1] < 50_000
    tracemalloc.stop()


@pytest.mark.parametrize("body", [b"\0\0", b"RI", b"text", b"short text here", b"fLa\0", b"\xff\xfb\x90\x64"])
def test_short_raw_pcm_is_not_recognised_as_a_file(body: bytes) -> None:
    body = body[: len(body) // 2 * 2]
    assert decode(body).tobytes() == body


# --- Types and foreign formats ---


@pytest.mark.parametrize(
    "content_type", ["text/plain", "video/mp4", "application/x-www-form-urlencoded", "audio", "Image/PNG; a=b"]
)
def test_other_types_are_refused(content_type: str) -> None:
    name = content_type.partition(";")[0].lower()
    with refused(ErrorKind.UNSUPPORTED_MEDIA, name, OCTETS, "audio/*", "multipart/form-data", "application/json"):
        decode(noise().tobytes(), content_type)
    with refused(ErrorKind.UNSUPPORTED_MEDIA, name):
        decode(b"", content_type)


@pytest.mark.parametrize("subtype", ["mpeg", "mp4", "webm", "aac", "basic", "L16; rate=16000", "amr", "x-unknown", ""])
def test_types_of_other_encodings_are_refused(subtype: str) -> None:
    name = f"audio/{subtype}".partition(";")[0].lower()
    with refused(ErrorKind.UNSUPPORTED_MEDIA, name, "Ogg (Vorbis, Opus)"):
        decode(noise().tobytes(), f"audio/{subtype}")


@pytest.mark.parametrize("subtype", ["wav", "x-wav", "wave", "flac", "x-flac", "ogg", "Opus; codecs=x"])
def test_file_types_need_a_file(subtype: str) -> None:
    with refused(ErrorKind.UNDECODABLE_AUDIO, f"audio/{subtype}".partition(";")[0].lower()):
        decode(noise().tobytes(), f"audio/{subtype}")


@pytest.mark.parametrize("content_type", ["", OCTETS, "audio/wav", "audio/mpeg"])
def test_empty_body(content_type: str) -> None:
    with refused(ErrorKind.EMPTY_BODY, "empty"):
        decode(b"", content_type)


@pytest.mark.parametrize("length", [1, 3, 31_999])
def test_odd_length(length: int) -> None:
    with refused(ErrorKind.ODD_LENGTH, length):
        decode(noise().tobytes()[:length])


# --- Limits ---


@pytest.mark.parametrize("rate", [5_999, 192_001, 1, 384_000])
def test_sample_rate_out_of_range(rate: int) -> None:
    with refused(ErrorKind.UNACCEPTABLE, f" {rate} Hz", 6000, 192000):
        decode(wav(noise().tobytes(), form=struct.pack("<HHIIHH", 1, 1, rate, 0, 2, 16)))


def test_sample_rate_of_flac_out_of_range() -> None:
    with refused(ErrorKind.UNACCEPTABLE, 384000, 6000, 192000):
        decode(encode(noise(), "FLAC", "PCM_16", 384_000))


@pytest.mark.parametrize("channels", [9, 100])
def test_number_of_channels(channels: int) -> None:
    with refused(ErrorKind.UNACCEPTABLE, f" {channels} channels", 8):
        decode(wav(noise().tobytes(), form=struct.pack("<HHIIHH", 1, channels, RATE, 0, 2 * channels % 65_536, 16)))


@pytest.mark.parametrize("max_secs", [0.1, 1, 1.1, 2.5])
@pytest.mark.parametrize(
    ("container", "subtype", "rate"),
    [
        ("raw", "", RATE),
        ("WAV", "PCM_16", 44_100),
        ("FLAC", "PCM_16", 8_000),
        ("FLAC", "unknown", RATE),
        ("OGG", "VORBIS", 48_000),
    ],
)
def test_longest_audio(container: str, subtype: str, rate: int, max_secs: float) -> None:
    def make(frames: int) -> bytes:
        if container == "raw":
            return noise(frames).tobytes()
        file = encode(noise(frames), container, subtype.replace("unknown", "PCM_16"), rate)
        return flac_with_total(file, 0) if subtype == "unknown" else file

    frames = round(max_secs * rate)
    assert abs(len(decode(make(frames), max_secs=max_secs)) - max_secs * RATE) <= 1
    with refused(ErrorKind.AUDIO_TOO_LONG, f"at most {max_secs} s"):
        decode(make(frames + 1), max_secs=max_secs)


@pytest.fixture(scope="module")
def hour_of_silence() -> bytes:
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", RATE, 1, "PCM_16", format="FLAC") as writer:
        for _ in range(3600):
            writer.write(np.zeros(RATE, np.int16))
    return file.getvalue()


@pytest.mark.parametrize("name", ["flac", "flac of unknown length", "opus"])
def test_an_hour_in_a_small_file_takes_little_memory(name: str, hour_of_silence: bytes) -> None:
    body = silent_opus(3600) if name == "opus" else hour_of_silence
    body = flac_with_total(body, 0) if "unknown" in name else body
    assert len(body) < 1_000_000
    tracemalloc.start()
    with refused(ErrorKind.AUDIO_TOO_LONG, "more than 30 s" if "unknown" in name else "3600 s", "at most 30 s"):
        decode(body, max_secs=30)
    assert tracemalloc.get_traced_memory()[1] < len(body) + 3_000_000  # 30 s of result, and a second of work
    tracemalloc.stop()


def test_memory_of_a_long_file() -> None:
    body = encode(np.zeros((48_000 * 60, 2), np.int16), "WAV", "PCM_16", 48_000)
    tracemalloc.start()
    decode(body)
    assert tracemalloc.get_traced_memory()[1] < 1.6 * len(body)  # one copy, a sixth as result, a few seconds of work
    tracemalloc.stop()


# --- Damaged and odd files ---


@pytest.mark.parametrize("riff_size", [0, 36, 0x7FFF0024, 0x80000000, 0xFFFFFFFF])
@pytest.mark.parametrize("data_size", [0x7FFF0000, 0x7FFFF000, 0x80000000, 0xFFFFFFFF])
def test_wav_from_a_pipe(riff_size: int, data_size: int) -> None:
    audio = noise()
    np.testing.assert_array_equal(decode(wav(audio.tobytes(), riff_size, data_size), "audio/wav"), audio)


def test_rf64() -> None:
    audio = noise()
    np.testing.assert_array_equal(decode(rf64(audio.tobytes(), 2 * len(audio))), audio)


def test_other_chunks_are_not_audio() -> None:
    audio = noise()
    chunks = b"LIST\5\0\0\0INFOx\0" + b"junk\0\0\0\0" + b"fact" + struct.pack("<II", 4, 99)
    np.testing.assert_array_equal(decode(wav(audio.tobytes(), before=chunks, after=chunks)), audio)
    with refused(ErrorKind.UNDECODABLE_AUDIO, "no audio"):
        decode(wav(b"", before=chunks, after=chunks))


def test_chunks_before_the_audio_are_limited() -> None:
    audio = noise()
    np.testing.assert_array_equal(decode(wav(audio.tobytes(), before=b"junk\0\0\0\0" * 100)), audio)
    caf = encode(audio, "CAF", "PCM_16")
    at = caf.index(b"data")
    np.testing.assert_array_equal(decode(caf[:at] + b"free" + bytes(8) + caf[at:]), audio)
    for file in (
        wav(audio.tobytes(), before=b"junk\0\0\0\0" * 10**6),
        wav(audio.tobytes(), data_size=0, after=b"junk\0\0\0\0" * 10**6),
        caf[:at] + (b"free" + bytes(8)) * 10**6 + caf[at:],
    ):
        began = time.thread_time()
        with suppress(ApiError):  # the second may be audio
            decode(file)
        assert time.thread_time() - began < 1
    with refused(ErrorKind.UNDECODABLE_AUDIO, "more than 128 chunks"):
        decode(wav(audio.tobytes(), before=b"junk\0\0\0\0" * 200))


@pytest.mark.parametrize("riff_size", [0, 1, 36, 36 + 2 * RATE, 44 + 2 * RATE, 45 + 2 * RATE, 1000 + 2 * RATE, 10**6, 10**9])
def test_only_the_audio_decides_whether_a_wav_is_whole(riff_size: int) -> None:
    audio = noise()
    np.testing.assert_array_equal(decode(wav(audio.tobytes(), riff_size)), audio)


@pytest.mark.parametrize("excess", [1, 2, 8, 36, 44])
def test_wav_whose_sizes_count_its_header_in(excess: int) -> None:
    audio = noise()
    np.testing.assert_array_equal(decode(wav(audio.tobytes(), 44 + 2 * RATE, 2 * RATE + excess)), audio)


@pytest.mark.parametrize("riff_size", [0, 36, 36 + 2 * RATE])
def test_wav_whose_audio_alone_is_declared_too_long(riff_size: int) -> None:
    audio = noise()
    np.testing.assert_array_equal(decode(wav(audio.tobytes(), riff_size, 10**6)), audio)


@pytest.mark.parametrize("cut", [45, 46, 1000, 31_998])
def test_wav_cut_short(cut: int) -> None:
    with refused(ErrorKind.UNDECODABLE_AUDIO, "cut short", 44 + 2 * RATE, 44 + 2 * RATE - cut):
        decode(wav(noise().tobytes())[:-cut], "audio/wav")


@pytest.mark.parametrize("riff_size", [0, 4, 36, 0xFFFFFFFF, 36 + 2 * RATE])
@pytest.mark.parametrize("before", [b"", b"LIST\4\0\0\0INFO", b"fact\4\0\0\0\0\0\0\0"])
@pytest.mark.parametrize("lead", [b"", bytes(1000), b"LIST"])
def test_wav_of_an_unfinished_recording(lead: bytes, before: bytes, riff_size: int) -> None:
    audio = lead + noise().tobytes()
    assert decode(wav(audio, riff_size, 0, before=before)).tobytes() == audio


@pytest.mark.parametrize(
    ("container", "mark", "offset", "size"),
    [
        ("AIFF", b"SSND", 4, bytes(4)),
        ("AU", b".snd", 8, b"\xff" * 4),
        ("AU", b".snd", 8, bytes(4)),
        ("CAF", b"data", 4, b"\xff" * 8),
        ("CAF", b"data", 4, bytes(8)),
        ("W64", b"data", 16, bytes(8)),
    ],
)
def test_other_files_of_unfinished_recordings(container: str, mark: bytes, offset: int, size: bytes) -> None:
    audio = noise()
    file = bytearray(encode(audio, container, "PCM_16"))
    at = file.index(mark) + offset
    file[at : at + len(size)] = size
    np.testing.assert_array_equal(decode(bytes(file)), audio)


def test_format_of_odd_size_in_wav() -> None:
    audio = noise()
    form = struct.pack("<HHIIHHB", 1, 1, RATE, 2 * RATE, 2, 16, 0)
    file = wav(audio.tobytes(), form=form, before=b"\0")
    np.testing.assert_array_equal(decode(file), audio)


@pytest.mark.parametrize("length", [4, 8, 11, 12, 30, 36, 43, 44])
@pytest.mark.parametrize("riff_size", [None, 0xFFFFFFFF])
def test_wav_cut_within_its_header(length: int, riff_size: int | None) -> None:
    with refused(ErrorKind.UNDECODABLE_AUDIO):
        decode(wav(noise().tobytes(), riff_size, riff_size)[:length], "audio/wav")


GUID_TAIL = bytes.fromhex("00001000800000aa00389b71")


def extensible(codec: int, tail: bytes = GUID_TAIL, bits: int = 16) -> bytes:
    """The format chunk of WAVE_FORMAT_EXTENSIBLE."""
    size = bits // 8
    return struct.pack("<HHIIHHHHII", 0xFFFE, 1, RATE, size * RATE, size, bits, 22, bits, 4, codec) + tail


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (struct.pack("<HHIIHH", 0x1234, 1, RATE, 2 * RATE, 2, 16), "0x1234"),
        (struct.pack("<HHIIHH", 0x0161, 1, RATE, 2000, 1, 0), "0x0161 (WMA 2)"),
        (struct.pack("<HHIIHH", 0x0000, 1, RATE, 2 * RATE, 2, 16), "0x0000"),
        (extensible(0x00FF), "0x00ff (AAC)"),
        (extensible(0x0092), "0x0092 (AC-3)"),
        (extensible(0x4321), "0x4321"),
        (extensible(1, bytes(range(12))), "000102030405060708090a0b"),
    ],
)
def test_unknown_codec_in_wav(form: bytes, name: str) -> None:
    with refused(ErrorKind.UNSUPPORTED_MEDIA, name, "Ogg (Vorbis, Opus)"):
        decode(wav(noise().tobytes(), form=form))


@pytest.mark.parametrize("tail", [GUID_TAIL, bytes.fromhex("2107d3118644c8c1ca000000")])
def test_extensible_pcm(tail: bytes) -> None:
    audio = noise()
    np.testing.assert_array_equal(decode(wav(audio.tobytes(), form=extensible(1, tail))), audio)


def test_extensible_codecs_that_plain_wav_has() -> None:
    for subtype, codec in (("ULAW", 7), ("ALAW", 6)):
        file = encode(tone(RATE), "WAV", subtype)
        data = file[file.index(b"data") + 8 :]
        np.testing.assert_array_equal(decode(wav(data, form=extensible(codec, bits=8))), decode(file))


def test_extensible_that_names_no_codec() -> None:
    with refused(ErrorKind.UNDECODABLE_AUDIO, "names no codec"):
        decode(wav(noise().tobytes(), form=extensible(1)[:18]))


def test_big_endian_wav() -> None:
    audio = noise()
    form = struct.pack(">HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
    for size in (2 * len(audio), 0, 0xFFFFFFFF):
        chunks = b"WAVE" + struct.pack(">4sI", b"fmt ", 16) + form + struct.pack(">4sI", b"data", size)
        file = struct.pack(">4sI", b"RIFX", len(chunks) + 2 * len(audio)) + chunks + audio.astype(">i2").tobytes()
        np.testing.assert_array_equal(decode(file), audio)


def test_bw64() -> None:
    audio = noise()
    np.testing.assert_array_equal(decode(rf64(audio.tobytes(), 2 * len(audio)).replace(b"RF64", b"BW64", 1)), audio)


def test_mp3_within_wav() -> None:
    mp3 = encode(tone(RATE), "MP3", "MPEG_LAYER_III")
    file = wav(mp3, form=struct.pack("<HHIIHHHHIHHH", 0x55, 1, RATE, 4000, 1, 0, 12, 1, 2, 144, 1, 0))
    np.testing.assert_array_equal(decode(file), decode(mp3))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (encode(noise(), "AIFF", "ULAW").replace(b"ulaw", b"QDM2"), "AIFF file's codec, 'QDM2'"),
        (encode(noise(), "CAF", "PCM_16").replace(b"lpcm", b"aac "), "CAF file's codec, 'aac '"),
        (encode(noise(), "AU", "PCM_16").replace(b"\0\0\0\3", b"\0\0\0\x18", 1), "AU file's codec, encoding 24"),
    ],
    ids=["AIFF", "CAF", "AU"],
)
def test_unknown_codec_in_other_files(file: bytes, name: str) -> None:
    with refused(ErrorKind.UNSUPPORTED_MEDIA, name, "Ogg (Vorbis, Opus)"):
        decode(file)


def id3(size: int, footer: bool = False) -> bytes:
    """An ID3v2.4 tag with a picture."""
    lengths = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    tag = b"ID3\4\0" + bytes([0x10 if footer else 0]) + lengths + noise(size // 2 + 2).tobytes()[:size]
    return tag + b"3DI\4\0\x10" + lengths if footer else tag


@pytest.mark.parametrize(
    ("container", "subtype"),
    [("FLAC", "PCM_16"), ("WAV", "PCM_16"), ("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III"), ("AIFF", "PCM_16")],
)
@pytest.mark.parametrize("tags", [id3(0), id3(300), id3(100_000), id3(20, footer=True), id3(10) + id3(300)])
def test_tags_before_a_file(tags: bytes, container: str, subtype: str) -> None:
    file = encode(tone(RATE), container, subtype)
    np.testing.assert_array_equal(decode(tags + file), decode(file))


@pytest.mark.parametrize("tail", [b"TAG" + bytes(125), b"APETAGEX" + bytes(24), b"\0" * 1000, b"OggS"])
@pytest.mark.parametrize(
    ("container", "subtype"),
    [("FLAC", "PCM_16"), ("WAV", "PCM_16"), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("AIFF", "PCM_16"), ("CAF", "PCM_16")],
)
def test_tags_after_a_file(tail: bytes, container: str, subtype: str) -> None:
    file = encode(tone(RATE), container, subtype)
    np.testing.assert_array_equal(decode(file + tail), decode(file))


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("rate", [8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
def test_mp3(rate: int, channels: int) -> None:
    file = encode(tone(rate, 3, channels=channels), "MP3", "MPEG_LAYER_III", rate)
    for body in (file, file[file.index(b"\xff", 500) :]):  # with the encoder's own frame, and cut from a broadcast
        samples = decode(body)
        assert 2.5 * RATE < len(samples) < 3.3 * RATE
        assert np.abs(np.fft.rfft(samples[RATE : 2 * RATE])).argmax() == 440
    assert abs(len(decode(file)) - 3 * RATE) <= 1


def test_joined_mp3_files_are_decoded_whole() -> None:
    first, second = (encode(tone(RATE, 2, hz), "MP3", "MPEG_LAYER_III") for hz in (440, 660))
    for body in (first + second, id3(300) + first + id3(300) + second, first + b"TAG" + bytes(125) + second):
        samples = decode(body)
        assert 4 * RATE <= len(samples) < 4.4 * RATE
        assert np.abs(np.fft.rfft(samples[:RATE])).argmax() == 440
        assert np.abs(np.fft.rfft(samples[-2 * RATE : -RATE])).argmax() == 660


def test_mp3_cut_short_is_decoded_as_far_as_it_goes() -> None:
    file = encode(tone(RATE, 10), "MP3", "MPEG_LAYER_III")
    assert 4.5 * RATE < len(decode(file[: len(file) // 2])) < 5.5 * RATE


def test_mp3_longer_than_allowed() -> None:
    file = encode(tone(RATE, 10), "MP3", "MPEG_LAYER_III")
    with refused(ErrorKind.AUDIO_TOO_LONG, "at most 5 s"):
        decode(file, max_secs=5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, 1e30])
@pytest.mark.parametrize("rate", [RATE, 48_000])
def test_float_that_is_not_finite(value: float, rate: int) -> None:
    audio = tone(rate, channels=2)
    audio[-5, 1] = value
    with refused(ErrorKind.UNDECODABLE_AUDIO, "not a number"):
        decode(encode(audio, "WAV", "DOUBLE", rate))


@pytest.mark.parametrize(("container", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("RF64", "PCM_16"), ("OGG", "VORBIS")])
def test_files_without_audio(container: str, subtype: str) -> None:
    with refused(ErrorKind.UNDECODABLE_AUDIO):
        decode(encode(np.empty(0, np.int16), container, subtype))


def test_flac_cut_short() -> None:
    file = encode(noise(3 * RATE), "FLAC", "PCM_16")
    for length in (4, 30, 42, 100, len(file) // 2, len(file) - 1):
        with refused(ErrorKind.UNDECODABLE_AUDIO, "FLAC"):
            decode(file[:length])


def test_flac_shorter_than_promised() -> None:
    file = flac_with_total(encode(noise(), "FLAC", "PCM_16"), RATE + 7)
    with refused(ErrorKind.UNDECODABLE_AUDIO, RATE + 7, RATE):
        decode(file)


def test_flac_of_unknown_length() -> None:
    audio = noise(3 * RATE + 5)
    np.testing.assert_array_equal(decode(flac_with_total(encode(audio, "FLAC", "PCM_16"), 0)), audio)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
class TestOgg:
    @pytest.fixture
    def pages(self, subtype: str) -> list[bytes]:
        return split_ogg(encode(tone(48_000, 5), "OGG", subtype, 48_000))

    def test_pages_make_a_file(self, pages: list[bytes]) -> None:
        assert len(pages) > 4
        assert abs(len(decode(b"".join(pages))) - 5 * RATE) <= 1

    def test_cut_short(self, pages: list[bytes]) -> None:
        file = b"".join(pages)
        for length in (60, len(file) // 2, len(file) - len(pages[-1]) + 4, len(file) - len(pages[-1]) + 5):
            with refused(ErrorKind.UNDECODABLE_AUDIO, "cut short"):
                decode(file[:length])

    def test_last_page_missing(self, pages: list[bytes]) -> None:
        with refused(ErrorKind.UNDECODABLE_AUDIO, "last page"):
            decode(b"".join(pages[:-1]))


def chain(*files: bytes) -> bytes:
    return b"".join(files)


@pytest.mark.parametrize("number", [2, 3, 7])
def test_chained_ogg_is_decoded_whole(number: int) -> None:
    kinds = [("VORBIS", 44_100, 2), ("OPUS", 48_000, 1), ("VORBIS", 16_000, 1), ("OPUS", 16_000, 2), ("OPUS", 48_000, 1)]
    files = [
        encode(tone(rate, 0.5 + 0.1 * link, 300 + 20 * link, channels), "OGG", subtype, rate)
        for link, (subtype, rate, channels) in zip(range(number), kinds * 2, strict=False)
    ]
    np.testing.assert_array_equal(decode(chain(*files)), np.concatenate([decode(file) for file in files]))


def test_chained_ogg_with_a_link_that_does_not_end() -> None:
    first = split_ogg(encode(tone(48_000, 3), "OGG", "OPUS", 48_000))
    second = encode(tone(48_000, 2, 600), "OGG", "OPUS", 48_000)
    samples = decode(b"".join(first[:-1]) + second)
    assert len(samples) > 4 * RATE
    np.testing.assert_array_equal(samples[-2 * RATE :], decode(second))


def test_chained_ogg_cut_short() -> None:
    file = encode(tone(RATE), "OGG", "VORBIS")
    with refused(ErrorKind.UNDECODABLE_AUDIO, "last page is missing"):
        decode(file + file[:-10])


def test_chained_ogg_longer_than_allowed() -> None:
    file = encode(tone(RATE, 2), "OGG", "OPUS")
    assert len(decode(file * 3, max_secs=6.1)) >= 6 * RATE
    with refused(ErrorKind.AUDIO_TOO_LONG, "6 s", "at most 5 s"):
        decode(file * 3, max_secs=5)


def test_ogg_with_two_streams_at_once() -> None:
    audio = encode(tone(48_000, 3), "OGG", "OPUS", 48_000)
    first, *pages = split_ogg(audio)
    other = ogg_page([b"fishead\0" + bytes(56)], 0, flags=2, serial=99)
    between = [ogg_page([b"other"], number, serial=99) for number in range(1, len(pages) + 1)]
    mixed = (
        other
        + first
        + b"".join(page for pair in zip(between, pages, strict=True) for page in pair)
        + ogg_page([b""], 99, flags=4, serial=99)
    )
    np.testing.assert_array_equal(decode(mixed), decode(audio))


def test_junk_between_pages_is_skipped() -> None:
    file = encode(tone(48_000, 3), "OGG", "OPUS", 48_000)
    first, *pages = split_ogg(file)
    np.testing.assert_array_equal(decode(first + b"".join(b"junk OggS\0 junk" + page for page in pages)), decode(file))
    long_page = b"OggS\0" + bytes(21) + b"\xff" + b"\xff" * 255  # a header of the largest page that there is
    np.testing.assert_array_equal(decode(first + b"".join((long_page + page) for page in pages)), decode(file))


@pytest.mark.parametrize(
    "filling",
    [b"OggS", b"OggS\0", b"OggS\0\0" + bytes(20) + b"\xff" * 256, b"OggS\0" + bytes(22), ogg_page([], 5), b"\0"],
    ids=["capture pattern", "version", "255 segments", "no segment", "empty page", "zeros"],
)
@pytest.mark.parametrize(
    "head",
    [b"", encode(tone(RATE), "OGG", "VORBIS")[:58], encode(tone(RATE), "OGG", "OPUS"), b"OggS"],
    ids=["nothing", "Vorbis header", "Opus file", "capture pattern"],
)
def test_time_of_a_damaged_ogg_is_linear(head: bytes, filling: bytes) -> None:
    body = (head or filling) + filling * (5_000_000 // len(filling)) + b"\0\4"
    began = time.process_time()
    with suppress(ApiError):
        decode(body, "audio/ogg")
    assert time.process_time() - began < 10  # it was minutes


@pytest.mark.parametrize(
    ("packet", "name"),
    [(b"Speex   1.2rc1", "Speex"), (b"\x7fFLAC\1\0\0\1fLaC", "FLAC"), (b"\x80theora", "Theora"), (b"\1\2\3", "unknown")],
)
def test_unknown_codec_in_ogg(packet: bytes, name: str) -> None:
    with refused(ErrorKind.UNSUPPORTED_MEDIA, "codec isn't supported", name, "Ogg (Vorbis, Opus)"):
        decode(ogg_page([packet + bytes(64)], 0, flags=2) + ogg_page([bytes(9)], 1, flags=4), "audio/ogg")


# --- Whatever comes, the answer is samples or an ApiError ---


VALID = [
    encode(tone(rate, 0.2, channels=channels), container, subtype, rate)
    for container, subtype in [*LOSSLESS, *LOSSY, ("OGG", "OPUS")]
    for rate, channels in ((RATE, 1), (48_000, 2))
]
MAGICS = [b"", b"RIFF\xff\xff\xff\xffWAVEfmt \x10\0\0\0", b"RF64\xff\xff\xff\xffWAVEds64", b"fLaC\0\0\0\x22", b"OggS\0\2",
          b"RIFF", b"ID3\4\0\0\0\0\0\0", b"FORM\0\0\0\0AIFF", b"caff\0\1\0\0desc", b".snd\0\0\0\x18", b"\xff\xfb\x90\0",
          b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"]  # fmt: skip
TYPES = ["", OCTETS, "audio/wav", "audio/mpeg", "audio/pcm", "text/html", ";;", "audio/\u00ff"]


@given(st.sampled_from(MAGICS), st.binary(max_size=300), st.sampled_from(TYPES))
def test_random_bodies(magic: bytes, rest: bytes, content_type: str) -> None:
    try:
        assert len(decode(magic + rest, content_type, 1)) > 0
    except ApiError as error:
        assert error.kind.status in (400, 413, 415, 422)  # noqa: PT017


@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.integers(4, 3000), st.binary(max_size=8)), min_size=1, max_size=5),
    st.booleans(),
)
def test_damaged_files(file: bytes, damage: list[tuple[int, bytes]], insert: bool) -> None:
    for at, junk in damage:
        file = file[:at] + junk + file[at if insert else at + len(junk) :]
    if file.startswith(b"OggS"):  # past the checksums, to the decoder
        file = b"".join(
            page[:22] + struct.pack("<I", crc(page[:22] + bytes(4) + page[26:])) + page[26:] for page in split_ogg(file)
        )
    try:
        assert 0 < len(decode(file, max_secs=1)) <= RATE + 1
    except ApiError as error:
        assert error.kind.status in (400, 413, 415, 422)  # noqa: PT017


# --- JSON ---


def test_json() -> None:
    body = orjson.dumps({"audio_buffer": list(range(256)), "description": "x", "more": 1})
    assert unpack_json(body) == (bytes(range(256)), {})
    assert unpack_json(b'{"audio_buffer": []}') == (b"", {})


@pytest.mark.parametrize("opaque", [None, 0, "é", [1, {"a": None}], {}])
def test_opaque_comes_back(opaque: object) -> None:
    assert unpack_json(orjson.dumps({"audio_buffer": [1], "opaque": opaque})) == (b"\1", {"opaque": opaque})


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"audio_buffer": [1,]}', b"NaN", b"[" * 5000])
def test_malformed_json(body: bytes) -> None:
    with refused(ErrorKind.INVALID_BODY, "JSON"):
        unpack_json(body)


@pytest.mark.parametrize("value", [None, 1, [1, 2], {}, {"audio": [1]}, {"audio_buffer": "AAAA"}, {"audio_buffer": {"0": 1}}])
def test_json_without_an_audio_buffer(value: object) -> None:
    with refused(ErrorKind.INVALID_BODY, "audio_buffer"):
        unpack_json(orjson.dumps(value))


@pytest.mark.parametrize(
    ("values", "index", "shown"),
    [
        ([0, 256, -1], 1, "256"),
        ([-1], 0, "-1"),
        ([0, 1, True], 2, "true"),
        ([0, 1.0], 1, "1.0"),
        ([None, 300], 0, "null"),
        ([1, "2"], 1, '"2"'),
        ([1, "x" * 500], 1, '"xxx'),
        ([1, 2, 3, [4]], 3, "list"),
        ([2**63], 0, str(2**63)),
    ],
)
def test_json_values_that_are_not_bytes(values: list[Any], index: int, shown: str) -> None:
    with refused(ErrorKind.UNACCEPTABLE, f"audio_buffer[{index}] is", shown, "0 to 255") as caught:
        unpack_json(orjson.dumps({"audio_buffer": values}))
    assert len(caught.value.message) < 200
