"""Containers by FFmpeg: what is decoded, what cut and hostile ones give, and that none reaches a file or the network."""

from __future__ import annotations

import asyncio
import io
import socket
import struct
import threading
import wave
from collections.abc import AsyncIterator
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway.audio import RATE
from gateway.audio.body import Pieces
from gateway.audio.containers import DECODERS, decode_container
from gateway.audio.files import decode_audio, decode_blocks
from gateway.audio.pool import FilePool
from gateway.audio.raw import DEFAULT
from gateway.audio.sniff import DECODABLE, identify
from gateway.errors import ApiError, ErrorKind
from tests.support.media import RECORDER, decode_body, encode_container

SPEECH: NDArray[np.int16] = soundfile.read(Path(__file__).parents[2] / "speech" / "jfk.flac", dtype="int16", always_2d=True)[0][
    : 4 * RATE, 0
]
FRAGMENTS = {"movflags": "empty_moov", "frag_duration": "500000"}
FILES = {
    "M4A": encode_container(SPEECH, "ipod", "aac"),
    "ALAC": encode_container(SPEECH, "mp4", "alac"),
    "fragments": encode_container(SPEECH, "mp4", "aac", options=FRAGMENTS),
    "index at the front": encode_container(SPEECH, "mp4", "aac", options={"movflags": "faststart"}),
    "QuickTime": encode_container(SPEECH, "mov", "pcm_s16le", 16_000),
    "WebM": encode_container(SPEECH, "webm", "libopus"),
    "MediaRecorder": encode_container(SPEECH, "webm", "libopus", options=RECORDER),
    "Matroska": encode_container(SPEECH, "matroska", "flac"),
    "ADTS": encode_container(SPEECH, "adts", "aac"),
    "WMA": encode_container(SPEECH, "asf", "wmav2", 44_100),
    "AMR": encode_container(SPEECH, "amr", "libopencore_amrnb", 8000),
}


@pytest.fixture
async def files() -> AsyncIterator[FilePool]:
    files = FilePool(places=2)
    yield files
    await files.close()


def similarity(one: NDArray[np.int16], other: NDArray[np.int16]) -> float:
    """Correlation at the best delay."""
    size = 2 ** int(np.ceil(np.log2(len(one) + len(other))))
    spectra = [np.fft.rfft(samples / np.linalg.norm(samples.astype(float)), size) for samples in (one, other)]
    return float(np.fft.irfft(spectra[0] * np.conj(spectra[1]), size).max())


@pytest.mark.parametrize("name", FILES)
def test_speech_comes_out_as_it_went_in(name: str) -> None:
    samples = decode_audio(FILES[name], "", 60)
    assert abs(len(samples) - len(SPEECH)) < 0.15 * RATE
    assert similarity(samples, SPEECH) > (0.8 if name == "AMR" else 0.95)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 96_000])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_rates_and_channels(rate: int, channels: int) -> None:
    file = encode_container(SPEECH, "matroska", "flac", rate, channels)
    samples = decode_audio(file, "", 60)
    assert abs(len(samples) - len(SPEECH)) <= 2
    assert similarity(samples, SPEECH) > (0.99 if rate > 8000 else 0.9)
    (format_, start) = identify(file)
    separate = np.concatenate(list(decode_blocks(file, identify(file), 60, separate=True)), axis=1)
    assert (format_.name, start, separate.shape) == ("WebM or Matroska", 0, (channels, len(samples)))
    assert np.abs(separate - samples).max() <= 1


@pytest.mark.parametrize("name", FILES)
async def test_samples_of_a_process_are_those_of_decoding_here(files: FilePool, name: str) -> None:
    np.testing.assert_array_equal(await decode_body(files, FILES[name], "", 60), decode_audio(FILES[name], "", 60))


@pytest.mark.parametrize("name", FILES)
def test_longer_than_allowed(name: str) -> None:
    with pytest.raises(ApiError, match="at most 3 s") as caught:
        decode_audio(FILES[name], "", 3)
    assert caught.value.kind is ErrorKind.AUDIO_TOO_LONG


@pytest.mark.parametrize(
    ("container", "rate"),
    [("QuickTime", 1), ("QuickTime", 5_999), ("Matroska", 1), ("Matroska", 192_001), ("Matroska", 2**31 - 1)],
)
def test_sample_rates_of_headers_that_lie_are_refused_by_number(container: str, rate: int) -> None:
    if container == "QuickTime":
        file = bytearray(encode_container(SPEECH, "mov", "pcm_s16le"))
        at = file.index(b"sowt") + 28  # a fixed-point number of 16.16 bits
        file[at : at + 4] = struct.pack(">HH", rate, 0)
    else:
        file = bytearray(encode_container(SPEECH, "matroska", "pcm_s16le"))
        at = file.index(b"\xb5\x88") + 2  # SamplingFrequency, 8 bytes
        file[at : at + 8] = struct.pack(">d", rate)
    with pytest.raises(ApiError, match=f"sample rate is {rate} Hz") as caught:
        decode_audio(bytes(file), "", 60)
    assert caught.value.kind is ErrorKind.UNACCEPTABLE


@pytest.mark.parametrize("name", ["fragments", "WebM", "MediaRecorder", "Matroska", "ADTS", "WMA", "AMR"])
def test_cut_files_of_unknown_length_are_decoded_as_far_as_they_go(name: str) -> None:
    whole, half = (decode_audio(file, "", 60) for file in (FILES[name], FILES[name][: len(FILES[name]) // 2]))
    assert 0.1 * len(whole) < len(half) < 0.75 * len(whole)
    assert similarity(half, whole[: len(half)]) > 0.9


@pytest.mark.parametrize("name", ["M4A", "ALAC", "index at the front", "QuickTime"])
def test_cut_files_with_an_index_are_refused(name: str) -> None:
    with pytest.raises(ApiError, match="cut short") as caught:
        decode_audio(FILES[name][: len(FILES[name]) // 2], "", 60)
    assert caught.value.kind is ErrorKind.UNDECODABLE_AUDIO


def test_only_the_first_audio_stream_is_decoded() -> None:
    target = io.BytesIO()
    with av.open(target, "w", format="matroska") as output:
        picture = output.add_stream("mpeg4", rate=25)
        picture.width = picture.height = 64
        sounds = [output.add_stream("pcm_s16le", rate=RATE, layout="mono") for _ in range(2)]
        for number in range(50):
            image = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 5 * number, np.uint8), format="rgb24")
            output.mux(picture.encode(image))
        for sound, samples in zip(sounds, (SPEECH, SPEECH[::-1]), strict=True):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), format="s16", layout="mono")
            frame.sample_rate = RATE
            output.mux(sound.encode(frame))
        for stream in (picture, *sounds):
            output.mux(stream.encode(None))
    np.testing.assert_array_equal(decode_audio(target.getvalue(), "video/x-matroska", 60), SPEECH)


def test_no_audio_and_no_codec_for_it_are_named() -> None:
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as output:
        picture = output.add_stream("mpeg4", rate=25)
        picture.width = picture.height = 64
        output.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        output.mux(picture.encode(None))
    with pytest.raises(ApiError, match="MP4 file has no audio") as caught:
        decode_audio(target.getvalue(), "", 60)
    assert caught.value.kind is ErrorKind.UNSUPPORTED_MEDIA
    with pytest.raises(ApiError, match=r"codec, tta, isn't supported") as caught:
        decode_audio(encode_container(SPEECH, "matroska", "tta"), "", 60)
    assert caught.value.kind is ErrorKind.UNSUPPORTED_MEDIA


# --- Nothing but the file itself is read ---

SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio {port} RTP/AVP 0\n"
PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:{port}/x.ts\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile {path}\n"


@pytest.fixture
def listener() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.3)
    return listener


@pytest.mark.parametrize("demuxer", ["mov", "matroska", "aac", "amr", "asf", "ogg", "caf", "aiff", "au"])
@pytest.mark.parametrize("text", [SDP, PLAYLIST, CONCAT])
def test_text_that_names_files_and_hosts_opens_none(text: str, demuxer: str, listener: socket.socket, tmp_path: Path) -> None:
    path = tmp_path / "private.wav"
    soundfile.write(path, SPEECH, RATE)
    body = text.format(port=listener.getsockname()[1], path=path).encode()
    with listener:
        for file in (body, body + bytes(5000)):
            with pytest.raises(ApiError):
                list(decode_container("x", demuxer, Pieces([file]), 60))
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_reference_to_another_file_is_not_followed(tmp_path: Path) -> None:
    """A QuickTime file may keep its samples elsewhere (a data reference of the kind ``alis`` or ``url``)."""
    samples = tmp_path / "private.raw"
    samples.write_bytes(b"private" * 50_000)
    file = bytearray(FILES["QuickTime"])
    at = file.index(b"dref")
    entry = at + 12
    assert file[entry : entry + 4] == b"\0\0\0\x0c"
    link = b"url \0\0\0\0file://" + str(samples).encode() + b"\0"
    file[entry : entry + 12] = (4 + len(link)).to_bytes(4, "big") + link  # not self-contained
    for name in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):  # each grows
        start = file.rindex(name, 0, entry) - 4
        size = int.from_bytes(file[start : start + 4], "big") + 4 + len(link) - 12
        file[start : start + 4] = size.to_bytes(4, "big")
    np.testing.assert_array_equal(decode_audio(bytes(file), "", 60), SPEECH)  # its own samples, at the same offsets


def test_every_decoder_that_may_run_is_one_of_audio() -> None:
    for name in set(DECODERS.split(",")) & av.codecs_available:
        assert av.Codec(name, "r").type == "audio"


# --- Whatever comes, the answer is samples or an ApiError, and no process takes another with it ---


@settings(deadline=None)
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.integers(4, 60_000), st.binary(max_size=8)), min_size=1, max_size=6),
    st.booleans(),
)
def test_damaged_containers(name: str, damage: list[tuple[int, bytes]], insert: bool) -> None:
    file = FILES[name]
    for at, junk in damage:
        at %= len(file)  # noqa: PLW2901
        file = file[:at] + junk + file[at if insert else at + len(junk) :]
    try:
        assert 0 < len(decode_audio(file, "", 5)) <= 5 * RATE + 100
    except ApiError as error:
        assert error.kind.status in (400, 413, 415, 422)  # noqa: PT017
    except MemoryError:
        pass  # damaged sizes; the worker answers 400


async def test_hostile_containers_cost_no_other_request(files: FilePool) -> None:
    expected = decode_audio(FILES["M4A"], "", 60)
    random = np.random.default_rng(0)

    async def attack() -> None:
        for whole in FILES.values():
            file = bytearray(whole)
            for at in random.integers(4, len(file), 50):
                file[at] = random.integers(256)
            try:
                await decode_body(files, bytes(file), "", 60)
            except ApiError as error:
                assert error.kind.status in (400, 413, 415, 422)  # noqa: PT017

    attacks = [asyncio.create_task(attack()) for _ in range(3)]
    for _ in range(5):
        np.testing.assert_array_equal(await decode_body(files, FILES["M4A"], "", 60), expected)
    await asyncio.gather(*attacks)


async def test_a_reader_that_pauses_pauses_the_process(files: FilePool, tmp_path: Path) -> None:
    """Half an hour is decoded as it is read, and time without reads does not count."""
    path = tmp_path / "long.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        for _ in range(450):
            file.writeframes(SPEECH.tobytes())
    with path.open("rb") as source:
        async with files.read(source, "", raw=DEFAULT, separate=False, max_secs=3600) as reader:
            length = 0
            async for block in reader:
                if not length:
                    before = threading.active_count()
                    await asyncio.sleep(0.5)
                    assert threading.active_count() == before
                    assert len(reader._blocks) * len(block[0]) < 10 * RATE  # type: ignore[attr-defined]
                length += block.shape[1]
    assert length == 450 * len(SPEECH)
    assert set(DECODABLE) >= {"MP4", "AMR"}
