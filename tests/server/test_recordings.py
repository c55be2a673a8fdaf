"""Long recordings through the gateway, Triton and the decoder: pieces, formats, channels, leaving, and deaths."""

from __future__ import annotations

import asyncio
import errno
import io
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import jiwer
import numpy as np
import numpy.typing as npt
import orjson
import psutil
import pysubs2
import pytest
import soundfile
import webvtt

from amira.ports import Ports
from gateway.audio import RATE
from tests.support.chaos import Backend
from tests.support.clients import decoder_metric, gateway_metrics, growth
from tests.support.commands import until
from tests.support.servers import Gateway, Recordings, run_gateway

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]
Samples = npt.NDArray[np.int16]

PCM = {"Content-Type": "audio/pcm"}
DECODED = "asr_decoder_audio_seconds_total"
LEFT_SECS = 20.0
"""Time limit for what a client leaves behind."""

MANY = httpx.Limits(max_connections=1000)
GAP = np.zeros(RATE // 2, np.int16)
ROUNDS = 3

pytestmark = pytest.mark.usefixtures("no_sequence_left")


@pytest.fixture(scope="module")
async def gateway(make_gateway: MakeGateway) -> AsyncIterator[Gateway]:
    async with make_gateway(max_concurrent_batches=3) as running:
        yield running


@pytest.fixture(scope="module")
def round_(recordings: Recordings) -> Samples:
    """The bundled recordings with a pause after each, half a minute."""
    return np.concatenate([part for samples in recordings.values() for part in (samples, GAP)])


@pytest.fixture(scope="module")
def minutes(round_: Samples) -> Samples:
    """A minute and a half."""
    return np.tile(round_, ROUNDS)


@pytest.fixture(scope="module")
async def alone(gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings) -> str:
    """What is understood of the same where each recording is sent by itself."""
    answers = [await http.post(gateway.batch_url(), content=samples.tobytes(), headers=PCM) for samples in recordings.values()]
    return " ".join([answer.json()["text"] for answer in answers] * ROUNDS)


@pytest.fixture(scope="module")
async def answer(gateway: Gateway, http: httpx.AsyncClient, minutes: Samples) -> dict[str, Any]:
    response = await http.post(gateway.batch_url(), content=minutes.tobytes(), headers=PCM)
    body: dict[str, Any] = response.raise_for_status().json()
    return body


def flac(samples: Samples) -> bytes:
    """The samples [n] or [n, channels] as a file."""
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="FLAC")
    return file.getvalue()


def test_a_long_recording_is_understood_as_its_parts_are(answer: dict[str, Any], alone: str, minutes: Samples) -> None:
    assert jiwer.wer(alone, answer["text"]) < 0.35
    assert answer["audio_length_samples"] == len(minutes)
    assert answer["encoded_length"] == pytest.approx(len(minutes) / 1536, abs=20)
    assert 0.3 < answer["confidence"] <= 1


def test_words_and_segments_are_in_order(answer: dict[str, Any], minutes: Samples) -> None:
    segments, words = answer["segments"], answer["words"]
    assert len(segments) >= 4
    assert [segment["id"] for segment in segments] == list(range(len(segments)))
    assert [word for segment in segments for word in segment["words"]] == words
    assert " ".join(segment["text"] for segment in segments) == answer["text"]
    assert " ".join(word["word"] for word in words) == answer["text"]
    for one, following in zip(words, [*words[1:], None], strict=True):
        assert one["start"] < one["end"] <= (following["start"] if following else len(minutes) / RATE)
    for segment in segments:
        assert (segment["start"], segment["end"]) == (segment["words"][0]["start"], segment["words"][-1]["end"])


def test_words_are_where_they_are_spoken(answer: dict[str, Any], round_: Samples) -> None:
    """The bundled recordings begin with speech; each round of them must begin as the first one does."""
    starts = [word["start"] for word in answer["words"]]
    for number in range(1, ROUNDS):
        assert min(abs(start - starts[0] - number * len(round_) / RATE) for start in starts) < 1.0


async def test_a_file_is_decoded_as_raw_audio_is(
    gateway: Gateway, http: httpx.AsyncClient, answer: dict[str, Any], minutes: Samples
) -> None:
    """As the body, which is larger than what is held in memory, and as the file of a form."""
    file = flac(minutes)
    assert len(file) > 2**20
    assert (await http.post(gateway.batch_url(), content=file)).json() == answer
    assert (await http.post(gateway.batch_url(), files={"file": ("a.flac", file, "audio/flac")})).json() == answer


async def test_text_and_subtitles(gateway: Gateway, http: httpx.AsyncClient, minutes: Samples) -> None:
    samples = minutes[: 35 * RATE]
    body = samples.tobytes()
    answer = (await http.post(gateway.batch_url(), content=body, headers=PCM)).json()
    assert len(answer["segments"]) > 1
    got = {}
    for form, content_type in {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}.items():
        response = await http.post(gateway.batch_url(), params={"format": form}, content=body, headers=PCM)
        assert response.headers["Content-Type"].partition(";")[0] == content_type
        got[form] = response.text
    assert got["text"] == answer["text"] + "\n"
    srt, vtt = pysubs2.SSAFile.from_string(got["srt"], format_="srt"), webvtt.from_buffer(io.StringIO(got["vtt"])).captions
    assert " ".join(event.plaintext.replace("\n", " ") for event in srt) == answer["text"]
    assert " ".join(caption.text.replace("\n", " ") for caption in vtt) == answer["text"]
    assert srt[-1].end <= len(samples) / RATE * 1000 + 1000


async def test_channels_have_transcripts_of_their_own(gateway: Gateway, http: httpx.AsyncClient, round_: Samples) -> None:
    left, right = round_, np.roll(round_, 12 * RATE)
    stereo = np.stack([left, right], axis=1)
    sides = [(await http.post(gateway.batch_url(), content=side.tobytes(), headers=PCM)).json() for side in (left, right)]
    as_file = (await http.post(gateway.batch_url(), params={"channels": "separate"}, content=flac(stereo))).json()
    raw = {"channels": ["2", "separate"]}
    as_raw = (await http.post(gateway.batch_url(), params=raw, content=stereo.tobytes(), headers=PCM)).json()
    assert as_file == as_raw
    assert as_file["audio_length_samples"] == len(left)
    for channel, side in enumerate(sides):
        segments = [segment for segment in as_file["segments"] if segment["channel"] == channel]
        assert " ".join(segment["text"] for segment in segments) == side["text"]
        words = [word for word in as_file["words"] if word["channel"] == channel]
        assert [{**word, "channel": channel} for word in side["words"]] == words
    mixed = (await http.post(gateway.batch_url(), content=flac(stereo))).json()
    assert "channel" not in mixed["segments"][0]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("format=docx", "format"),
        ("channels=0", "channels"),
        ("channels=left", "channels"),
        ("channels=1&channels=2", "channels"),
        ("encoding=opus", "encoding"),
        ("sample_rate=1", "sample_rate"),
    ],
)
async def test_unknown_options_are_refused_by_name(gateway: Gateway, http: httpx.AsyncClient, query: str, param: str) -> None:
    response = await http.post(f"{gateway.batch_url()}?{query}", content=bytes(3200), headers=PCM)
    assert response.status_code == 422
    assert response.json()["error"]["param"] == param


async def test_the_first_line_comes_before_the_rest_is_decoded(
    gateway: Gateway, http: httpx.AsyncClient, triton: Ports, answer: dict[str, Any], minutes: Samples
) -> None:
    before = await decoder_metric(triton, DECODED)
    body = np.tile(minutes, 2).tobytes()
    lines: list[dict[str, Any]] = []
    async with http.stream("POST", gateway.batch_url(), params={"format": "ndjson"}, content=body, headers=PCM) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if not lines:
                decoded_secs = await decoder_metric(triton, DECODED) - before
            lines.append(orjson.loads(line))
    assert decoded_secs < 0.9 * len(body) / 2 / RATE
    *segments, whole = lines
    assert {line["type"] for line in segments} == {"segment"}
    assert segments[0]["text"] == answer["segments"][0]["text"]
    assert whole["type"] == "transcript"
    assert whole["text"] == " ".join(segment["text"] for segment in segments)
    assert whole["audio_length_samples"] == len(body) // 2
    assert not {"words", "segments"} & set(whole)


async def test_an_error_after_the_first_line_is_a_line(
    make_gateway: MakeGateway, http: httpx.AsyncClient, minutes: Samples
) -> None:
    """FLAC that ends too early is found out at its end; what can't begin is an error as ever."""
    file = flac(minutes)
    async with make_gateway() as gateway:
        url = f"{gateway.batch_url()}?format=ndjson"
        response = await http.post(url, content=file[: len(file) * 2 // 3])
        assert response.status_code == 200
        *segments, error = map(orjson.loads, response.text.splitlines())
        assert segments
        assert error["error"]["code"] == "undecodable_audio"
        assert error["error"]["request_id"] == response.headers["X-Request-ID"]
        assert (await http.post(url, content=file[:20_000])).status_code == 400


@pytest.mark.parametrize("form", ["json", "ndjson"])
async def test_a_client_that_leaves_stops_its_recording(
    make_gateway: MakeGateway, triton: Ports, minutes: Samples, form: str
) -> None:
    body = np.tile(minutes, 8).tobytes()
    async with make_gateway() as gateway:
        before, decoded = await gateway_metrics(gateway.url), await decoder_metric(triton, DECODED)
        url = f"{gateway.batch_url()}?format={form}"
        async with httpx.AsyncClient(timeout=httpx.Timeout(60, read=60 if form == "ndjson" else 2)) as impatient:
            if form == "ndjson":
                async with impatient.stream("POST", url, content=body, headers=PCM) as response:
                    await anext(response.aiter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    await impatient.post(url, content=body, headers=PCM)
        at, left_at = 0.0, -1.0
        while at != left_at:  # until the pieces in flight are decoded
            await asyncio.sleep(3)
            at, left_at = left_at, await decoder_metric(triton, DECODED)
        grown = growth(before, await gateway_metrics(gateway.url))
        assert grown("asr_requests_total", endpoint="batch", model="amira", status="499") == 1
        assert left_at - decoded < 0.7 * len(body) / 2 / RATE


async def test_a_short_recording_passes_a_long_one(
    make_gateway: MakeGateway, http: httpx.AsyncClient, triton: Ports, minutes: Samples
) -> None:
    async with make_gateway(max_concurrent_batches=2) as gateway:
        body = np.tile(minutes, 3).tobytes()
        decoded = await decoder_metric(triton, DECODED)
        long = asyncio.create_task(http.post(gateway.batch_url(), content=body, headers=PCM))
        while await decoder_metric(triton, DECODED) == decoded:
            await asyncio.sleep(0.1)
        for _ in range(3):
            short = await http.post(gateway.batch_url(), content=minutes[: 2 * RATE].tobytes(), headers=PCM)
            assert short.status_code == 200
        assert not long.done()
        assert (await long).json()["audio_length_samples"] == len(body) // 2


async def test_a_full_disk_is_told(
    gateway: Gateway, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, minutes: Samples
) -> None:
    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *_, **__: Full())
    response = await http.post(gateway.batch_url(), content=minutes.tobytes(), headers=PCM)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "no_capacity"
    assert "disk" in response.json()["error"]["message"]


@pytest.mark.parametrize("form", [False, True])
async def test_a_directory_that_is_not_writable_is_told(
    gateway: Gateway, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, minutes: Samples, form: bool
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/1/nowhere")  # nothing can be created there, by root either
    body: dict[str, Any] = {"files": {"file": minutes.tobytes()}} if form else {"content": minutes.tobytes(), "headers": PCM}
    response = await http.post(gateway.batch_url(), **body)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "no_capacity"
    assert "not writable" in response.json()["error"]["message"]
    small = await http.post(gateway.batch_url(), content=minutes[:RATE].tobytes(), headers=PCM)
    assert small.status_code == 200, "it is never stored"


@pytest.mark.parametrize("route", ["/v1/audio/transcriptions", "/v2/decode/batch/amira"])
async def test_fields_of_a_form_take_little_memory(gateway: Gateway, http: httpx.AsyncClient, route: str) -> None:
    process = psutil.Process()
    before = peak = process.memory_info().rss
    field = b"x" * (1_900_000 if "v1" in route else 900_000)

    async def send() -> AsyncIterator[bytes]:
        nonlocal peak
        for number in range(200):
            peak = max(peak, process.memory_info().rss)
            yield b'--b\r\nContent-Disposition: form-data; name="%d"\r\n\r\n%b\r\n' % (number, field)

    response = await http.post(
        f"{gateway.url}{route}", content=send(), headers={"Content-Type": "multipart/form-data; boundary=b"}
    )
    assert response.status_code in (400, 413)
    assert peak - before < 128 * 2**20


def spooled() -> list[str]:
    """Files that are open here and have no name."""
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [link for link in links if link.startswith(tempfile.gettempdir()) and link.endswith("(deleted)")]


async def test_an_upload_that_is_cut_off_leaves_nothing(
    make_gateway: MakeGateway, http: httpx.AsyncClient, triton: Ports, minutes: Samples
) -> None:
    """The client goes in the middle of a recording of hours, of which nothing is decoded before it is there."""
    async with make_gateway() as gateway:
        decoded, before = await decoder_metric(triton, DECODED), await gateway_metrics(gateway.url)
        url = httpx.URL(gateway.url)
        held = spooled()
        for how in ("close", "reset"):
            _, writer = await asyncio.open_connection(url.host, url.port)
            head = (
                f"POST /v2/decode/batch/amira HTTP/1.1\r\nHost: x\r\nContent-Type: audio/pcm\r\nContent-Length: {2**29}\r\n\r\n"
            )
            writer.write(head.encode() + minutes.tobytes())
            await writer.drain()
            await until(lambda: len(spooled()) > len(held), LEFT_SECS)
            writer.transport.abort() if how == "reset" else writer.close()
            await until(lambda: spooled() == held, LEFT_SECS)
        short = await http.post(gateway.batch_url(), content=minutes[:RATE].tobytes(), headers=PCM)
        assert short.status_code == 200
        grown = growth(before, await gateway_metrics(gateway.url))
        assert grown("asr_requests_total", endpoint="batch", model="amira", status="499") == 2
        assert await decoder_metric(triton, DECODED) - decoded < 2


@pytest.mark.slow
async def test_a_thousand_files_at_once(make_gateway: MakeGateway, recordings: Recordings) -> None:
    """All get an answer: as many as there are places for are decoded, and the others are told to come again."""
    file = flac(recordings["jfk"][:RATE])
    async with make_gateway(inference_queue_size=20) as gateway, httpx.AsyncClient(timeout=300, limits=MANY) as many:
        statuses = Counter(
            response.status_code
            for response in await asyncio.gather(*(many.post(gateway.batch_url(), content=file) for _ in range(1000)))
        )
        after = await many.post(gateway.batch_url(), content=file)
    assert statuses.keys() <= {200, 503}
    assert statuses[200] >= 20
    assert after.status_code == 200
    workers = [child for child in psutil.Process().children(recursive=True) if "gateway.audio.worker" in child.cmdline()]
    assert workers == []


async def test_a_killed_backend_costs_nothing(http: httpx.AsyncClient, answer: dict[str, Any], minutes: Samples) -> None:
    """Its pieces in flight are sent once more; none is lost, none comes twice."""
    backend = Backend("recordings")
    await backend.start()
    try:
        async with run_gateway(triton_endpoint=backend.target, recovery_timeout_secs=120) as gateway:
            body = np.tile(minutes, 3).tobytes()
            long = asyncio.create_task(http.post(gateway.batch_url(), content=body, headers=PCM, timeout=240))
            while not await decoder_metric(backend.ports, DECODED):
                await asyncio.sleep(0.1)
            assert not long.done()
            before = await gateway_metrics(gateway.url)
            pid = backend.triton.pid
            backend.signal(9)
            response = await long
            await backend.started_anew(pid)
            grown = growth(before, await gateway_metrics(gateway.url))
    finally:
        await backend.stop()
    assert response.status_code == 200, response.text
    assert grown("asr_backend_deaths_total", endpoint=backend.target) == 1
    assert response.json()["text"].startswith(answer["segments"][0]["text"])
    assert response.json()["audio_length_samples"] == 3 * len(minutes)
    texts = [segment["text"] for segment in response.json()["segments"]]
    assert [segment["id"] for segment in response.json()["segments"]] == list(range(len(texts)))


async def chunks(body: bytes) -> AsyncIterator[bytes]:
    """A body in pieces, of which the client holds one."""
    for at in range(0, len(body), 2**16):
        yield body[at : at + 2**16]


@pytest.mark.slow
async def test_memory_is_flat(make_gateway: MakeGateway, minutes: Samples) -> None:
    """The gateway here is this process. Half an hour takes no more than ten minutes, which are 38 MB less as raw PCM."""
    process, peaks = psutil.Process(), []
    async with make_gateway() as gateway, httpx.AsyncClient(timeout=300) as http:
        for body in [flac(np.tile(minutes, times)) for times in (5, 15)]:
            url, peak = f"{gateway.batch_url()}?format=text", 0
            post = asyncio.create_task(http.post(url, content=chunks(body)))
            while not post.done():
                peak = max(peak, process.memory_info().rss)
                await asyncio.sleep(0.05)
            assert (await post).status_code == 200
            peaks.append(peak)
    assert peaks[1] - peaks[0] < 12 * 2**20
