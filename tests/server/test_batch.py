"""Recordings through the gateway, Triton and the decoder."""

from __future__ import annotations

import asyncio
import io
import re
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import httpx
import jiwer
import numpy as np
import numpy.typing as npt
import orjson
import pytest
import soundfile
import soxr

from amira.paths import SPEECH
from amira.ports import LOOPBACK, Ports
from gateway.guard import LINGER_SECS
from gateway.limits.places import Places
from tests.support.clients import gateway_metrics, growth
from tests.support.repositories import REPORTED_SECS
from tests.support.servers import Gateway, Recordings

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]

OCTETS = {"Content-Type": "application/octet-stream"}
JFK = "and so my fellow americans ask not what your country can do for you ask what you can do for your country"

pytestmark = pytest.mark.usefixtures("no_sequence_left")


def encode(samples: npt.NDArray[Any], rate: int = 16000, channels: int = 1, **form: Any) -> bytes:
    """Return the samples as a file."""
    audio = soxr.resample(samples.astype(np.float32) / 32768, 16000, rate) if rate != 16000 else samples
    file = io.BytesIO()
    soundfile.write(file, np.repeat(audio[:, None], channels, axis=1), rate, **form)
    return file.getvalue()


FORMS: dict[str, Callable[[npt.NDArray[Any]], bytes]] = {
    "raw": lambda samples: samples.tobytes(),
    "wav 8 kHz": lambda samples: encode(samples, 8000, format="WAV"),
    "wav 16 kHz": lambda samples: encode(samples, format="WAV"),
    "wav 44.1 kHz stereo": lambda samples: encode(samples, 44100, 2, format="WAV"),
    "wav 48 kHz": lambda samples: encode(samples, 48000, format="WAV"),
    "wav 24 bit": lambda samples: encode(samples, format="WAV", subtype="PCM_24"),
    "wav float": lambda samples: encode(samples.astype(np.float32) / 32768, format="WAV", subtype="FLOAT"),
    "flac": lambda samples: encode(samples, format="FLAC"),
    "ogg opus": lambda samples: encode(samples, 48000, format="OGG", subtype="OPUS"),
}


@pytest.fixture(scope="session")
async def reference(gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings) -> dict[str, Any]:
    """Return the answer to jfk, sent as raw PCM."""
    answer = await http.post(gateway.batch_url(), content=recordings["jfk"].tobytes(), headers=OCTETS)
    body: dict[str, Any] = answer.raise_for_status().json()
    return body


async def test_answer_has_the_documented_fields(reference: dict[str, Any], recordings: Recordings) -> None:
    assert set(reference) == {
        "text", "tokens", "audio_length_samples", "features_length", "encoded_length", "confidence", "words", "segments",
    }  # fmt: skip
    assert jiwer.wer(JFK, reference["text"]) < 0.3
    assert reference["audio_length_samples"] == len(recordings["jfk"])
    assert reference["encoded_length"] == -(-len(recordings["jfk"]) // 1536)
    assert reference["features_length"] == -(-len(recordings["jfk"]) // 384)
    assert 0.3 < reference["confidence"] <= 1
    assert " ".join(word["word"] for word in reference["words"]) == reference["text"]
    for word in reference["words"]:
        assert 0 <= word["start"] < word["end"] <= 11.1
        assert 0 < word["confidence"] <= 1
    (segment,) = reference["segments"]
    assert (segment["id"], segment["text"], segment["words"]) == (0, reference["text"], reference["words"])
    assert (segment["start"], segment["end"]) == (reference["words"][0]["start"], reference["words"][-1]["end"])
    assert segment["confidence"] == reference["confidence"]
    assert "channel" not in segment


@pytest.mark.parametrize("form", FORMS)
async def test_audio_formats(
    gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings, reference: dict[str, Any], form: str
) -> None:
    answer = await http.post(gateway.batch_url(), content=FORMS[form](recordings["jfk"]), headers=OCTETS)
    assert answer.status_code == 200, answer.text
    text = answer.json()["text"]
    if form in ("raw", "wav 16 kHz", "flac", "wav 24 bit", "wav float"):
        assert text == reference["text"]
    # With telephone bandwidth and Opus this small model loses some words.
    assert jiwer.wer(JFK, text) < (0.8 if form == "wav 8 kHz" else 0.5)
    assert answer.json()["audio_length_samples"] == pytest.approx(len(recordings["jfk"]), abs=400)


@pytest.mark.parametrize("content_type", ["audio/flac", "audio/x-flac", "application/octet-stream"])
async def test_bundled_file(gateway: Gateway, http: httpx.AsyncClient, content_type: str) -> None:
    """44.1 kHz stereo FLAC, as the README's curl sends it."""
    body = (SPEECH / "jfk.flac").read_bytes()
    answer = await http.post(gateway.batch_url(), content=body, headers={"Content-Type": content_type})
    assert jiwer.wer(JFK, answer.json()["text"]) < 0.3


async def test_multipart(gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings, reference: dict[str, Any]) -> None:
    wav = encode(recordings["jfk"], format="WAV")
    answer = await http.post(gateway.batch_url(), files={"file": ("speech.wav", wav, "audio/wav")}, data={"note": "x"})
    assert answer.json() == reference
    answer = await http.post(gateway.batch_url(), files={"recording": ("speech.wav", wav, "audio/wav")})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_body"
    assert answer.json()["error"]["param"] == "file"
    answer = await http.post(gateway.batch_url(), content=b"--x", headers={"Content-Type": "multipart/form-data"})
    assert answer.status_code == 400


async def test_json(gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings, reference: dict[str, Any]) -> None:
    opaque = {"id": [1, "ü", None]}
    body = {"audio_buffer": list(recordings["jfk"].tobytes()), "opaque": opaque, "description": "a test"}
    answer = await http.post(gateway.batch_url(), json=body)
    assert answer.json() == {**reference, "opaque": opaque}


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("speech.wav", b"no")
    return file.getvalue()


WAV = encode(np.zeros(32000, np.int16), format="WAV")
FLAC = encode((np.random.default_rng(0).normal(size=32000) * 3000).astype(np.int16), format="FLAC")


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"", "application/octet-stream", 400, "empty_body"),
        (b"\0" * 1001, "application/octet-stream", 400, "odd_length"),
        (WAV[:-1000], "application/octet-stream", 400, "undecodable_audio"),
        (FLAC[: len(FLAC) // 2], "audio/flac", 400, "undecodable_audio"),
        (b"please transcribe this for me", "application/octet-stream", 415, "unsupported_media"),
        (b"hello", "text/plain", 415, "unsupported_media"),
        (_zip(), "application/octet-stream", 415, "unsupported_media"),
        (_zip(), "application/zip", 415, "unsupported_media"),
        (b"\xff\xfb\x90\x00" * 100, "audio/mpeg", 415, "unsupported_media"),
        (encode(np.zeros(4000, np.int16), 4000, format="WAV"), "audio/wav", 422, "unacceptable"),
        (encode(np.zeros(4000, np.int16), 384000, format="WAV"), "audio/wav", 422, "unacceptable"),
        (b"{", "application/json", 400, "invalid_body"),
        (b'{"audio": []}', "application/json", 400, "invalid_body"),
        (b'{"audio_buffer": [1, 256]}', "application/json", 422, "unacceptable"),
    ],
)
async def test_invalid_bodies_are_refused(
    gateway: Gateway, http: httpx.AsyncClient, body: bytes, content_type: str, status: int, code: str
) -> None:
    answer = await http.post(gateway.batch_url(), content=body, headers={"Content-Type": content_type})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == code
    assert set(error) == {"message", "type", "code", "param", "request_id", "retryable", "retry_after_ms"}
    assert error["request_id"] == answer.headers["X-Request-ID"]
    assert error["retryable"] is False
    assert "/" not in error["message"] or "application/" in error["message"], "the message has a path"


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (bytes(31 * 32000), "application/octet-stream"),
        (encode(np.zeros(31 * 16000, np.int16), format="FLAC"), "audio/flac"),
    ],
)
async def test_longer_audio_than_allowed_is_refused(
    make_gateway: MakeGateway, http: httpx.AsyncClient, body: bytes, content_type: str
) -> None:
    async with make_gateway(max_batch_audio_length_secs=30) as gateway:
        answer = await http.post(gateway.batch_url(), content=body, headers={"Content-Type": content_type})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "audio_too_long"
    assert "30 s" in answer.json()["error"]["message"]


async def test_thirty_seconds_are_accepted(gateway: Gateway, http: httpx.AsyncClient) -> None:
    answer = await http.post(gateway.batch_url(), content=bytes(30 * 32000), headers=OCTETS)
    assert answer.status_code == 200
    assert answer.json()["text"] == ""
    assert answer.json()["confidence"] is None


@pytest.mark.parametrize("samples", [1, 10, 383, 1537])
async def test_very_short_audio(gateway: Gateway, http: httpx.AsyncClient, samples: int) -> None:
    answer = await http.post(gateway.batch_url(), content=bytes(2 * samples), headers=OCTETS)
    assert answer.status_code == 200, answer.text
    assert answer.json()["audio_length_samples"] == samples


async def test_oversized_body_is_refused(make_gateway: MakeGateway, http: httpx.AsyncClient) -> None:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield bytes(10**6)

    async with make_gateway(max_request_size=10_485_760) as gateway:
        for content in (body(), bytes(10**8)):
            answer = await http.post(gateway.batch_url(), content=content, headers=OCTETS)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "body_too_large"
            assert "10485760" in answer.json()["error"]["message"]


async def test_endless_body_is_cut_off(make_gateway: MakeGateway) -> None:
    async with make_gateway(max_request_size=10_485_760) as gateway:
        await _pour_into(gateway)


async def _pour_into(gateway: Gateway) -> None:
    reader, writer = await asyncio.open_connection(LOOPBACK, gateway.server.port)
    writer.write(b"POST /v2/decode/batch/amira HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def pour() -> None:
        chunk = b"%x\r\n" % 2**16 + bytes(2**16) + b"\r\n"
        while True:
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(0.001)

    pouring = asyncio.create_task(pour())
    answer = await reader.readuntil(b"}}")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"body_too_large" in answer
    with pytest.raises(ConnectionError):
        await asyncio.wait_for(pouring, LINGER_SECS + 3)
    writer.close()


async def test_concurrent_recordings_equal_their_solo_runs(
    gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings
) -> None:
    bodies = [samples[:length].tobytes() for samples in recordings.values() for length in (16000, 40001, 60000)]

    async def ask(body: bytes) -> Any:
        return (await http.post(gateway.batch_url(), content=body, headers=OCTETS)).json()

    solo = [await ask(body) for body in bodies]
    together = await asyncio.gather(*map(ask, bodies * 2))
    assert [answer["tokens"] for answer in together] == [answer["tokens"] for answer in solo * 2]


@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 100, 1000, 100_000])
async def test_http2_upgrade_offer_is_ignored(gateway: Gateway, recordings: Recordings, piece_bytes: int) -> None:
    """Java's HttpClient sends it with every request; a network may cut a request anywhere."""
    body = recordings["jfk"][:32000].tobytes()
    head = (
        f"POST /v2/decode/batch/amira HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        f"Content-Type: application/octet-stream\r\nUpgrade: h2c\r\nX-Long: {'x' * 200}\r\n"
        f"HTTP2-Settings: AAMAAABkAAQAAP__\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    reader, writer = await asyncio.open_connection(LOOPBACK, gateway.server.port)
    for _ in range(2):
        for start in range(0, len(head), piece_bytes):
            writer.write(head[start : start + piece_bytes])
            await asyncio.sleep(0.001)
        writer.write(body)
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert answer.startswith(b"HTTP/1.1 200 ")
        length = re.search(rb"content-length: (\d+)", answer)
        assert length
        assert orjson.loads(await reader.readexactly(int(length[1])))["text"].startswith("and so my fel")
    writer.close()


async def test_lost_client_counts_as_499(gateway: Gateway) -> None:
    before = await gateway_metrics(gateway.url)
    _, writer = await asyncio.open_connection(LOOPBACK, gateway.server.port)
    writer.write(b"POST /v2/decode/batch/amira HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + bytes(5000))
    await writer.drain()
    writer.close()
    for _ in range(50):
        grown = growth(before, await gateway_metrics(gateway.url))
        if gone := grown("asr_requests_total", endpoint="batch", model="amira", status="499"):
            break
        await asyncio.sleep(0.1)
    assert gone == 1
    assert grown("asr_rejections_total", reason="internal") == 0


async def test_deeply_nested_opaque_is_refused(gateway: Gateway, http: httpx.AsyncClient) -> None:
    body = b'{"audio_buffer":[0,0],"opaque":' + b"[" * 300 + b"]" * 300 + b"}"
    answer = await http.post(gateway.batch_url(), content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "opaque")


async def test_routes_and_methods(gateway: Gateway, http: httpx.AsyncClient) -> None:
    answer = await http.post(gateway.batch_url("nobody"), content=b"", headers=OCTETS)
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"
    assert "amira" in answer.json()["error"]["message"]
    answer = await http.get(gateway.batch_url())
    assert answer.status_code == 405
    assert answer.json()["error"]["code"] == "method_not_allowed"
    assert answer.headers["Allow"] == "POST"
    answer = await http.get(f"{gateway.url}/nothing/here")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


async def test_request_ids(gateway: Gateway, http: httpx.AsyncClient) -> None:
    answer = await http.get(f"{gateway.url}/health", headers={"X-Request-ID": "mine-1"})
    assert answer.headers["X-Request-ID"] == "mine-1"
    for bad in ("x" * 129, "a\tb"):
        answer = await http.get(f"{gateway.url}/health", headers={"X-Request-ID": bad})
        assert answer.headers["X-Request-ID"] not in ("", bad)


async def test_keys(make_gateway: MakeGateway, http: httpx.AsyncClient) -> None:
    async with make_gateway(api_keys=["secret"]) as gateway:
        body = bytes(3200)
        answer = await http.post(gateway.batch_url(), content=body, headers=OCTETS)
        assert answer.status_code == 401
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"
        answer = await http.post(gateway.batch_url(), content=body, headers={**OCTETS, "Authorization": "Bearer nope"})
        assert answer.status_code == 401
        answer = await http.post(gateway.batch_url(), content=body, headers={**OCTETS, "Authorization": "Bearer secret"})
        assert answer.status_code == 200
        assert (await http.get(f"{gateway.url}/health")).status_code == 200


async def test_full_queue_is_refused(make_gateway: MakeGateway, http: httpx.AsyncClient) -> None:
    async with make_gateway(max_concurrent_batches=1, inference_queue_size=1) as gateway:
        posts = [http.post(gateway.batch_url(), content=bytes(640000), headers=OCTETS) for _ in range(6)]
        answers = await asyncio.gather(*posts)
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 1 <= len(refused) <= 4
    for answer in refused:
        assert answer.status_code == 503
        assert 1 <= int(answer.headers["Retry-After"]) <= 5
        error = answer.json()["error"]
        assert error["code"] == "no_capacity"
        assert error["retryable"] is True
        assert 1000 <= error["retry_after_ms"] <= 5000


async def test_leaving_the_queue_frees_a_place(
    make_gateway: MakeGateway, http: httpx.AsyncClient, recordings: Recordings
) -> None:
    async with make_gateway(max_concurrent_batches=1, inference_queue_size=1) as gateway:
        before = await gateway_metrics(gateway.url)

        async def post(secs: float) -> httpx.Response:
            body = np.resize(recordings["jfk"], round(secs * 16_000)).tobytes()
            return await http.post(gateway.batch_url(), content=body, headers=OCTETS)

        first = asyncio.create_task(post(20))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(post(1))
        await asyncio.sleep(0.1)
        assert (await post(1)).status_code == 503
        second.cancel()
        await asyncio.sleep(0.1)
        assert not first.done()
        assert (await post(1)).status_code == 200
        assert (await first).status_code == 200
        grown = growth(before, await gateway_metrics(gateway.url))
    assert grown("asr_requests_total", endpoint="batch", model="amira", status="499") == 1


async def test_wait_for_a_place_is_bounded(
    make_gateway: MakeGateway, http: httpx.AsyncClient, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.resources.Places", partial(Places, max_queue_secs=0.1))
    async with make_gateway(max_concurrent_batches=1) as gateway:
        body = np.resize(recordings["jfk"], 30 * 16_000).tobytes()
        first = asyncio.create_task(http.post(gateway.batch_url(), content=body, headers=OCTETS))
        await asyncio.sleep(0.1)
        late = await http.post(gateway.batch_url(), content=body[:32_000], headers=OCTETS)
        assert not first.done()
        assert (late.status_code, late.json()["error"]["code"]) == (503, "no_capacity")
        assert (await first).status_code == 200
        assert (await http.post(gateway.batch_url(), content=body[:32_000], headers=OCTETS)).status_code == 200


async def test_many_recordings_open_no_breaker(
    make_gateway: MakeGateway, gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings
) -> None:
    """Together they take longer than the timeout of a stream's request, and the breaker stays closed."""
    body = np.resize(recordings["jfk"], 12 * 16_000).tobytes()

    async def post_all(url: str) -> float:
        """Return the time that all recordings take together, in seconds."""
        began = time.monotonic()
        answers = await asyncio.gather(*(http.post(url, content=body, headers=OCTETS) for _ in range(8)))
        assert [answer.status_code for answer in answers] == [200] * 8
        return time.monotonic() - began

    async def post_all_in_haste(timeout_secs: float) -> float:
        async with make_gateway(inference_timeout_secs=timeout_secs) as hasty:
            posts = asyncio.create_task(post_all(hasty.batch_url()))
            states = set()
            while not posts.done():
                health = (await http.get(f"{hasty.url}/health/detailed")).json()
                states.add(health["dependencies"]["triton"][0]["breaker"])
                await asyncio.sleep(0.05)
            assert states == {"closed"}
            return await posts

    # A recording may take four times as long as a request of a stream, so the machine may become half as fast meanwhile. If it
    # becomes so much faster that all recordings are in time, there is nothing to see.
    for _ in range(5):
        timeout_secs = 0.6 * await post_all(gateway.batch_url())
        if await post_all_in_haste(timeout_secs) > timeout_secs:
            return
    pytest.fail("the machine became quicker all the time")


async def test_keep_alive_is_longer_than_that_of_proxies(gateway: Gateway) -> None:
    assert gateway.server.config.timeout_keep_alive > 60


async def test_cors(make_gateway: MakeGateway, http: httpx.AsyncClient) -> None:
    origin = {"Origin": "https://app.example"}
    async with make_gateway(enable_cors=True, allowed_origins=["https://app.example"]) as gateway:
        answer = await http.get(f"{gateway.url}/health", headers=origin)
        assert answer.headers["Access-Control-Allow-Origin"] == "https://app.example"
        answer = await http.get(f"{gateway.url}/health", headers={"Origin": "https://evil.example"})
        assert "Access-Control-Allow-Origin" not in answer.headers
    async with make_gateway() as gateway:
        assert "Access-Control-Allow-Origin" not in (await http.get(f"{gateway.url}/health", headers=origin)).headers


async def test_requests_are_counted(gateway: Gateway, http: httpx.AsyncClient, triton: Ports, recordings: Recordings) -> None:
    async def decoder() -> dict[str, float]:
        await asyncio.sleep(REPORTED_SECS)
        samples = await gateway_metrics(f"http://{triton.host}:{triton.metrics}")
        return {name: value for (name, _), value in samples.items() if name.startswith("asr_decoder_")}

    before, decoded = await gateway_metrics(gateway.url), await decoder()
    samples = recordings["jfk"]
    began = time.monotonic()
    answer = await http.post(gateway.batch_url(), params={"beam": 1}, content=samples.tobytes(), headers=OCTETS)
    took_secs = time.monotonic() - began
    await http.post(gateway.batch_url("../etc"), content=b"", headers=OCTETS)
    await http.post(gateway.batch_url(), content=b"", headers=OCTETS)
    grown = growth(before, await gateway_metrics(gateway.url))

    assert grown("asr_requests_total", endpoint="batch", model="amira", status="200") == 1
    assert grown("asr_requests_total", endpoint="batch", model="amira", status="400") == 1
    assert grown("asr_request_duration_seconds_count", endpoint="batch", model="amira") == 2
    assert grown("asr_audio_seconds_total", endpoint="batch", model="amira") == pytest.approx(11.0)
    assert grown("asr_rejections_total", reason="empty_body") == 1
    did = {re.sub("asr_decoder_|_total", "", name): now - decoded[name] for name, now in (await decoder()).items()}
    assert (did["windows"], did["encode_calls"], did["segments"]) == (1, 1, 1)
    assert did["tokens"] == len(answer.json()["tokens"])
    assert did["audio_seconds"] == pytest.approx(11.0)
    assert 20 <= did["calls"] <= 40, "about one call per token"
    assert did["rows"] == did["calls"], "no other stream could share a call"
    assert 0 < did["decode_seconds"] < did["encode_seconds"] < did["decode_seconds"] + did["encode_seconds"] < took_secs
