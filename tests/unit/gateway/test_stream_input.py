"""Live streams of any kind: what their first bytes are decides, and how they are cut decides nothing."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gateway.audio import RATE, pool
from gateway.audio.files import decode_audio
from gateway.audio.pool import FilePool
from gateway.audio.raw import DEFAULT, Encoding, RawFormat
from gateway.audio.stream import StreamInput
from gateway.errors import ApiError, ErrorKind
from tests.support.media import RECORDER, decode_body, encode_container

SPEECH: NDArray[np.int16] = soundfile.read(Path(__file__).parents[2] / "speech" / "jfk.flac", dtype="int16", always_2d=True)[0][
    : 3 * RATE, 0
]
WEBM = encode_container(SPEECH, "webm", "libopus", options=RECORDER)
OGG = encode_container(SPEECH, "ogg", "libopus", options={"page_duration": "100000"})
FLAC = encode_container(SPEECH, "flac", "flac", rate=RATE)


def wav(subtype: str, rate: int = RATE, channels: int = 1) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.repeat(SPEECH[:, None] / 0x8000, channels, axis=1), rate, subtype, format="WAV")
    return file.getvalue()


@pytest.fixture
async def files() -> AsyncIterator[FilePool]:
    files = FilePool(places=2)
    yield files
    await files.close()


class Taken:
    """What a stream gives, with the times at which it comes."""

    def __init__(self) -> None:
        self.parts: list[NDArray[np.int16]] = []

    async def append(self, samples: NDArray[np.int16]) -> None:
        assert samples.dtype == np.int16
        assert samples.ndim == 1
        self.parts.append(samples)

    @property
    def samples(self) -> NDArray[np.int16]:
        return np.concatenate(self.parts) if self.parts else np.empty(0, np.int16)


async def send(files: FilePool, body: bytes, lengths: Sequence[int] = (640,), raw: RawFormat = DEFAULT) -> NDArray[np.int16]:
    """Send a stream in pieces of these lengths, again and again."""
    taken, at, turn = Taken(), 0, 0
    audio = StreamInput(raw, files, taken.append, 60)
    try:
        while at < len(body):
            length = lengths[turn % len(lengths)]
            await audio.feed(body[at : at + length])
            at, turn = at + length, turn + 1
        await audio.end()
    finally:
        await audio.close()
    return taken.samples


LENGTHS = [(640,), (2,), (7, 2, 1000), (2**20,)]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("body", [WEBM, OGG, FLAC], ids=["WebM", "Ogg", "FLAC"])
async def test_containers_are_decoded_as_a_file_is(files: FilePool, body: bytes, lengths: Sequence[int]) -> None:
    samples, expected = await send(files, body, lengths), decode_audio(body, "", 60)
    assert abs(len(samples) - len(expected)) <= 1
    length = min(len(samples), len(expected))
    assert np.corrcoef(samples[:length], expected[:length])[0, 1] > 0.99


@pytest.mark.parametrize("lengths", [*LENGTHS, (3,), (1,)])
@pytest.mark.parametrize(
    ("subtype", "rate", "channels"), [("PCM_16", RATE, 1), ("PCM_16", 48_000, 2), ("ULAW", 8000, 1), ("FLOAT", 44_100, 1)]
)
async def test_wav_is_decoded_as_a_file_is(
    files: FilePool, subtype: str, rate: int, channels: int, lengths: Sequence[int]
) -> None:
    body = wav(subtype, rate, channels)[: 60_000 if lengths[0] < 7 else None]
    expected = decode_audio(wav(subtype, rate, channels), "", 60)
    samples = await send(files, body, lengths)
    if len(body) > 60_000:
        assert len(samples) == len(expected)
    assert np.abs(samples[:-2000].astype(int) - expected[: len(samples)][:-2000]).max() <= 1
    assert files._server is None


@given(st.lists(st.integers(1, 500), min_size=1, max_size=50).map(lambda halves: [2 * half for half in halves]))
def test_no_cut_changes_raw_audio(lengths: list[int]) -> None:
    body = SPEECH.tobytes()
    assert asyncio.run(send(FilePool(), body, lengths)).tobytes() == body


async def test_tags_after_the_audio_of_a_wav_are_not_audio(files: FilePool) -> None:
    body = wav("PCM_16") + b"LIST\x10\0\0\0INFOISFT\4\0\0\0x\0\0\0" * 9
    np.testing.assert_array_equal(await send(files, body), SPEECH)


@pytest.mark.parametrize("lengths", [*LENGTHS, (1,)])
async def test_joined_wav_streams_give_the_audio_of_each(files: FilePool, lengths: Sequence[int]) -> None:
    one, other = wav("PCM_16"), wav("ULAW", 8000)[:20_000]
    expected = np.concatenate([await send(files, body) for body in (one, other)])
    tags = b"LIST\x10\0\0\0INFOISFT\4\0\0\0x\0\0\0"
    np.testing.assert_array_equal(await send(files, one + tags + other, lengths), expected)


async def test_joined_flac_streams_give_the_audio_of_each(files: FilePool) -> None:
    np.testing.assert_array_equal(await send(files, FLAC * 2), np.concatenate([SPEECH, SPEECH]))


def with_chunks(body: bytes, chunks: bytes) -> bytes:
    """Return a WAV file with more chunks before its audio."""
    at = body.index(b"data")
    return body[:at] + chunks + body[at:]


@pytest.mark.parametrize("lengths", [(2,), (100,), (2**20,)])
async def test_no_cut_of_a_large_wav_header_changes_the_audio(files: FilePool, lengths: Sequence[int]) -> None:
    picture = b"LIST" + (20_000).to_bytes(4, "little") + bytes(20_000)
    np.testing.assert_array_equal(await send(files, with_chunks(wav("PCM_16"), picture)[:40_000], lengths), SPEECH[:9974])
    with pytest.raises(ApiError, match="more than 65536 bytes"):
        await send(files, with_chunks(wav("PCM_16"), picture * 4), lengths)


async def test_a_wav_header_in_tiny_frames_costs_little(files: FilePool) -> None:
    """Reading it anew with each frame takes seconds, in which no other stream is served."""
    body = with_chunks(wav("PCM_16"), b"junk\0\0\0\0" * 1010)
    began = time.thread_time()
    with pytest.raises(ApiError, match="more than 128 chunks"):
        await send(files, body, (2,))
    assert time.thread_time() - began < 1


@pytest.mark.parametrize("size", [0, 2**32 - 1])
async def test_wav_from_a_pipe_goes_on_to_the_end(files: FilePool, size: int) -> None:
    body = wav("PCM_16")
    at = body.index(b"data") + 4
    np.testing.assert_array_equal(await send(files, body[:at] + size.to_bytes(4, "little") + body[at + 4 :]), SPEECH)


@pytest.mark.parametrize("body", [WEBM, OGG], ids=["WebM", "Ogg"])
async def test_a_container_is_late_by_a_fifth_of_a_second_at_most(files: FilePool, body: bytes) -> None:
    await decode_body(files, OGG, "", 60)  # the server runs
    taken = Taken()
    audio = StreamInput(DEFAULT, files, taken.append, 60)
    step = len(body) // 30  # as many bytes as a tenth of a second has on average
    late = []
    try:
        for at in range(0, len(body), step):
            await audio.feed(body[at : at + step])
            deadline = time.monotonic() + 5
            while len(taken.samples) < (at + step) / len(body) * len(SPEECH) - 0.2 * RATE and time.monotonic() < deadline:
                await asyncio.sleep(0.001)
            late.append((at + step) / len(body) * len(SPEECH) / RATE - len(taken.samples) / RATE)
        await audio.end()
    finally:
        await audio.close()
    assert max(late) <= 0.2  # all that has come, up to two tenths of a second, is there before more comes


@pytest.mark.parametrize("body", [WEBM, OGG], ids=["WebM", "Ogg"])
async def test_without_the_extra_containers_are_refused_by_name(
    files: FilePool, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "CONTAINERS", False)
    with pytest.raises(ApiError, match=r"is (Ogg|WebM).*amira-asr\[containers\]") as caught:
        await send(files, body)
    assert caught.value.kind is ErrorKind.UNSUPPORTED_MEDIA


async def test_a_container_that_is_damaged_fails_the_stream(files: FilePool) -> None:
    audio = StreamInput(DEFAULT, files, Taken().append, 60)
    try:
        await audio.feed(WEBM[:4] + bytes(4000))
        with pytest.raises(ApiError) as caught:
            await asyncio.wait_for(asyncio.shield(audio.failed), 20)
        assert caught.value.kind is ErrorKind.UNDECODABLE_AUDIO
        with pytest.raises(ApiError):
            await audio.feed(b"more")
    finally:
        await audio.close()


async def test_closing_ends_the_process(files: FilePool) -> None:
    audio = StreamInput(DEFAULT, files, Taken().append, 60)
    await audio.feed(WEBM[: len(WEBM) // 2])
    await audio.close()
    assert len(await decode_body(files, OGG, "", 60)) > RATE


@pytest.mark.parametrize("subtype", ["PCM_24", "PCM_U8", "IMA_ADPCM"])
async def test_other_codecs_of_wav_streams_are_refused_by_name(files: FilePool, subtype: str) -> None:
    with pytest.raises(ApiError, match="16-bit PCM, 32-bit float, A-law or µ-law") as caught:
        await send(files, wav(subtype))
    assert caught.value.kind is ErrorKind.UNSUPPORTED_MEDIA


async def test_a_wav_that_ends_within_its_header(files: FilePool) -> None:
    with pytest.raises(ApiError, match="within its header"):
        await send(files, wav("PCM_16")[:40])


@pytest.mark.parametrize(
    ("raw", "size", "rule"),
    [
        (DEFAULT, 641, "16-bit samples need an even number"),
        (RawFormat(Encoding.FLOAT32), 642, "32-bit samples need a multiple of 4"),
    ],
)
async def test_frames_of_raw_audio_hold_whole_samples(files: FilePool, raw: RawFormat, size: int, rule: str) -> None:
    for body, lengths in ((bytes(size), [size]), (bytes(4 * 640 + size), [640, 640, 640, 640, size]), (bytes(3), [3])):
        with pytest.raises(ApiError, match=rule if len(body) > 3 else "samples need") as caught:
            await send(files, body, lengths, raw)
        assert caught.value.kind is ErrorKind.ODD_LENGTH


async def test_channels_may_be_cut_apart(files: FilePool) -> None:
    body = np.repeat(SPEECH[:, None], 2, axis=1).tobytes()
    np.testing.assert_array_equal(await send(files, body, [2, 6], RawFormat(channels=2)), SPEECH)


async def test_streams_that_can_be_resumed_must_be_raw(files: FilePool) -> None:
    audio = StreamInput(DEFAULT, files, Taken().append, 60, resumable=True)
    with pytest.raises(ApiError, match=r"WebM or Matroska.*must be raw audio") as caught:
        await audio.feed(WEBM[:100])
    assert caught.value.kind is ErrorKind.UNSUPPORTED_MEDIA
    await audio.close()
