"""Live streams through the gateway, Triton and the decoder."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from itertools import pairwise
from typing import Any

import httpx
import jiwer
import numpy as np
import pytest
from numpy.typing import NDArray
from websockets.exceptions import ConnectionClosed, InvalidStatus

from amira.ports import Ports
from tests.support.chaos import speak
from tests.support.clients import (
    END,
    KEEPALIVE,
    converse,
    cut,
    decoder_metric,
    gateway_metrics,
    growth,
    listen,
    open_socket,
    transcribe,
)
from tests.support.servers import Gateway, Recordings, Samples

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]

pytestmark = pytest.mark.usefixtures("no_sequence_left")

JFK = "and so my fellow americans ask not what your country can do for you ask what you can do for your country"


async def test_final_is_the_spoken_text(gateway: Gateway, recordings: Recordings) -> None:
    conversation = await transcribe(gateway.stream_url(), recordings["jfk"])
    assert conversation.close_code == 1000
    assert jiwer.wer(JFK, conversation.final["text"]) < 0.5
    assert "my fellow" in conversation.final["text"]


async def test_messages_have_the_documented_fields(gateway: Gateway, recordings: Recordings) -> None:
    samples = recordings["jfk"]
    conversation = await converse(gateway.stream_url(), [*cut(samples, 1600), END], pause_secs=0.02)
    *partials, final = conversation.messages
    assert len(partials) >= 3
    for message in conversation.messages:
        assert set(message) == {"type", "text", "tokens", "confidence", "words", "audio_processed_ms", "stable_chars"}
        assert 0 < message["confidence"] <= 1
        assert 0 <= message["stable_chars"] <= len(message["text"])
    assert {message["type"] for message in partials} == {"partial"}
    texts = [message["text"] for message in partials]
    assert all(before != after for before, after in pairwise(texts)), "a partial without a change"
    processed = [message["audio_processed_ms"] for message in conversation.messages]
    assert processed == sorted(processed)
    assert processed[-1] == len(samples) * 1000 // 16000
    assert final["stable_chars"] == len(final["text"])
    assert " ".join(word["word"] for word in final["words"]) == final["text"]
    starts = [word["start"] for word in final["words"]]
    assert starts == sorted(starts)
    assert all(0 <= word["start"] <= word["end"] <= len(samples) / 16000 + 0.1 for word in final["words"])


async def test_stable_text_never_changes(gateway: Gateway, recordings: Recordings) -> None:
    spoken = (converse(gateway.stream_url(), [*cut(samples, 1600), END], pause_secs=0.02) for samples in recordings.values())
    for messages, _ in await asyncio.gather(*spoken):
        assert len(messages) > 3
        for before, after in pairwise(messages):
            stable = before["text"][: before["stable_chars"]]
            assert after["text"].startswith(stable)
            assert after["stable_chars"] >= before["stable_chars"]


async def test_frame_size_does_not_change_the_final(make_gateway: MakeGateway, recordings: Recordings) -> None:
    """Frames of 20 ms, 100 ms, 1 s, random lengths, and everything at once."""
    samples = np.concatenate([*recordings.values()])[: 16000 * 8]
    random = np.random.default_rng(7).integers(1, 4000, 500).tolist()
    async with make_gateway(max_frame_bytes=2 * len(samples)) as gateway:
        reference = (await transcribe(gateway.stream_url(), samples, 1234)).final
        for sizes in (320, 1600, 16000, random, len(samples)):
            final = (await transcribe(gateway.stream_url(), samples, sizes)).final
            assert (final["text"], final["tokens"]) == (reference["text"], reference["tokens"])
            assert final["words"] == reference["words"]


async def test_32_streams_share_calls_and_equal_their_solo_runs(
    gateway: Gateway, triton: Ports, recordings: Recordings, http: httpx.AsyncClient
) -> None:
    everything = np.concatenate([*recordings.values()])
    rng = np.random.default_rng(3)
    starts = rng.integers(0, len(everything) - 16000 * 4, 32)
    streams = [
        everything[start : start + 16000 * int(seconds)] for start, seconds in zip(starts, rng.integers(2, 6, 32), strict=True)
    ]
    solo = [(await transcribe(gateway.stream_url(), samples)).final["tokens"] for samples in streams]

    async def paced(samples: Samples, frame_samples: int) -> list[int]:
        """Stream in real time; of faster streams, only one at a time is decoded."""
        frames = [*cut(samples, frame_samples), END]
        final = (await converse(gateway.stream_url(), frames, pause_secs=frame_samples / 16000)).final
        return list(final["tokens"])

    async def load() -> None:
        while True:
            answer = await http.post(
                gateway.batch_url(), content=recordings["jfk"].tobytes(), headers={"Content-Type": "audio/pcm"}
            )
            assert answer.status_code == 200

    async def counts() -> NDArray[np.float64]:
        names = ("rows", "calls", "windows", "encode_calls")
        return np.array([await decoder_metric(triton, f"asr_decoder_{name}_total") for name in names])

    before = await counts()
    assert await asyncio.gather(*(paced(samples, 3200) for samples in streams)) == solo, "chunks are due at the same time"
    rows, calls, windows, encode_calls = await counts() - before
    assert rows / calls > 1.5, "few streams shared a decoder call"
    assert windows / encode_calls > 1.5, "few streams shared an encoder call"
    loading = [asyncio.create_task(load()) for _ in range(2)]
    sizes = rng.integers(160, 3200, len(streams)).tolist()
    assert await asyncio.gather(*map(paced, streams, sizes)) == solo
    assert not any(task.done() for task in loading), "the load failed"
    for task in loading:
        task.cancel()
    await asyncio.gather(*loading, return_exceptions=True)
    assert any(solo), "no stream had speech"


@pytest.mark.parametrize("samples", [0, 1, 100, 1536, 15360])
async def test_silence_gives_an_empty_final(gateway: Gateway, samples: int) -> None:
    conversation = await transcribe(gateway.stream_url(), np.zeros(samples, np.int16))
    assert conversation.close_code == 1000
    assert conversation.final["text"] == ""
    assert conversation.final["tokens"] == []
    assert conversation.final["confidence"] is None
    assert conversation.final["audio_processed_ms"] == samples * 1000 // 16000


async def test_keepalives_do_not_count_as_audio(gateway: Gateway, recordings: Recordings) -> None:
    samples = next(iter(recordings.values()))
    plain = (await transcribe(gateway.stream_url(), samples)).final
    frames = [part for frame in cut(samples, 1600) for part in (KEEPALIVE, frame)]
    assert (await converse(gateway.stream_url(), [*frames, KEEPALIVE, END])).final == plain


async def test_audio_after_the_end_is_ignored(gateway: Gateway, recordings: Recordings) -> None:
    samples = next(iter(recordings.values()))
    plain = (await transcribe(gateway.stream_url(), samples)).final
    conversation = await converse(gateway.stream_url(), [*cut(samples, 1600), END, *cut(samples, 1600), b"\x07", "text"])
    assert conversation.final == plain
    assert conversation.close_code == 1000


@pytest.mark.parametrize(
    ("frame", "close_code", "code", "named"),
    [
        (b"\x01\x02\x03", 1007, "odd_length", "3 bytes"),
        (b"\x07", 1007, "unknown_control", "0x07"),
        (b"", 1007, "empty_frame", "empty"),
        ("hello", 1003, "text_frame", "text"),
        (bytes(300_000), 1009, "frame_too_large", "262144"),
    ],
)
async def test_invalid_frames_close_the_stream(
    gateway: Gateway, recordings: Recordings, frame: bytes | str, close_code: int, code: str, named: str
) -> None:
    audio = cut(next(iter(recordings.values())), 16000)
    conversation = await converse(gateway.stream_url(), [*audio[:3], frame, END])
    assert conversation.close_code == close_code
    assert conversation.error["code"] == code
    assert named in conversation.error["message"]
    assert conversation.error["request_id"]
    assert conversation.error["retryable"] is False


async def test_oversized_frame_closes_1009(gateway: Gateway) -> None:
    conversation = await converse(gateway.stream_url(), [bytes(10_000_000)])
    assert conversation.close_code == 1009


async def test_lost_client_frees_everything(gateway: Gateway, triton: Ports, recordings: Recordings) -> None:
    sockets = [await open_socket(gateway.stream_url()) for _ in range(5)]
    for socket in sockets:
        for frame in cut(recordings["jfk"], 16000)[:4]:
            await socket.send(frame)
    while await decoder_metric(triton, "asr_decoder_sequences") < 5:
        await asyncio.sleep(0.02)
    for socket in sockets:
        socket.transport.abort()
    while (await gateway_metrics(gateway.url))["asr_active_connections", ()]:
        await asyncio.sleep(0.02)


async def test_client_lost_after_its_end_frees_everything(gateway: Gateway, recordings: Recordings) -> None:
    socket = await open_socket(gateway.stream_url())
    await socket.send(recordings["jfk"][: 16000 * 8].tobytes())
    await socket.send(END)
    socket.transport.abort()
    await asyncio.sleep(0.3)


async def test_idle_stream_closes_4408(make_gateway: MakeGateway) -> None:
    async with make_gateway(stream_timeout_secs=0.5) as gateway:
        conversation = await converse(gateway.stream_url(), [bytes(32000)])
    assert conversation.close_code == 4408
    assert conversation.error["code"] == "stream_idle"
    assert "0.5 s" in conversation.error["message"]


async def test_keepalives_keep_a_stream_open(make_gateway: MakeGateway, recordings: Recordings) -> None:
    samples = next(iter(recordings.values()))
    async with make_gateway(stream_timeout_secs=0.5) as gateway:
        frames = [*cut(samples, 16000)[:2], *[KEEPALIVE] * 8, END]
        conversation = await converse(gateway.stream_url(), frames, pause_secs=0.2)
        assert conversation.close_code == 1000
        assert conversation.final == (await transcribe(gateway.stream_url(), samples[:32000])).final


async def test_too_long_stream_closes_4413(make_gateway: MakeGateway) -> None:
    async with make_gateway(max_stream_audio_secs=2) as gateway:
        conversation = await transcribe(gateway.stream_url(), np.zeros(16000 * 3, np.int16))
    assert conversation.close_code == 4413
    assert conversation.error["code"] == "audio_too_long"


async def test_small_buffer_loses_nothing(make_gateway: MakeGateway, recordings: Recordings) -> None:
    """The socket is not read while the buffer is full, and the client waits."""
    samples = recordings["jfk"]
    async with make_gateway(audio_buffer_capacity=8000, max_frame_bytes=8000) as gateway:
        small = (await transcribe(gateway.stream_url(), samples, 2000)).final
    async with make_gateway() as gateway:
        assert small == (await transcribe(gateway.stream_url(), samples, 2000)).final


async def test_silence_ends_a_segment(gateway: Gateway, recordings: Recordings) -> None:
    """After a silence longer than the left context, at the same phase of the window grid, only the times differ."""
    chunk = 15360
    silence = np.zeros(5 * chunk, np.int16)
    samples = next(iter(recordings.values()))
    utterance = np.concatenate([silence, samples, np.zeros(-len(samples) % chunk, np.int16)])
    once = (await transcribe(gateway.stream_url(), np.concatenate([utterance, silence]))).final
    twice = (await transcribe(gateway.stream_url(), np.concatenate([utterance, utterance, silence]))).final
    assert once["text"]
    assert twice["text"] == f"{once['text']} {once['text']}"
    assert twice["tokens"] == once["tokens"] * 2
    assert twice["confidence"] == pytest.approx(once["confidence"], abs=1e-3)
    shift = len(utterance) / 16000
    for first, second in zip(once["words"], twice["words"][len(once["words"]) :], strict=True):
        assert second["start"] == pytest.approx(first["start"] + shift, abs=2e-3)


async def test_unknown_model_is_refused_before_the_upgrade(gateway: Gateway) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await converse(gateway.stream_url("nobody"), [])
    response = refused.value.response
    assert response.status_code == 404
    assert b"nobody" in response.body
    assert b"amira" in response.body
    assert response.headers["X-Request-ID"]


async def test_unknown_path_is_refused(gateway: Gateway, http: httpx.AsyncClient) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await converse(gateway.stream_url().replace("decode", "encode"), [])
    assert refused.value.response.status_code == 404
    assert b"/v2/encode/stream/amira" in refused.value.response.body
    assert (await http.get(f"{gateway.url}/v2/decode/stream/amira")).status_code == 404


async def test_upgrade_has_the_request_id(gateway: Gateway) -> None:
    async with open_socket(gateway.stream_url(), additional_headers={"X-Request-ID": "mine"}) as socket:
        assert socket.response
        assert socket.response.headers["X-Request-ID"] == "mine"
        await socket.send(bytes(3))
        assert (await listen(socket)).error["request_id"] == "mine"


async def test_browser_gets_the_error_as_a_frame(make_gateway: MakeGateway) -> None:
    async with make_gateway(allowed_origins=["https://app.example"]) as gateway:
        # Browsers close a connection on which none of their subprotocols is accepted.
        async with open_socket(gateway.stream_url("nobody"), origin="https://app.example", subprotocols=["amira.v2"]) as socket:
            assert socket.subprotocol == "amira.v2"
            assert socket.response
            assert socket.response.headers["X-Request-ID"]
            assert (await listen(socket)).close_code == 4404
        conversation = await converse(gateway.stream_url("nobody"), [], origin="https://app.example")
        assert conversation.close_code == 4404
        assert conversation.error["code"] == "model_not_found"
        with pytest.raises(InvalidStatus) as refused:
            await converse(gateway.stream_url(), [], origin="https://evil.example")
        assert refused.value.response.status_code == 403
        assert (await converse(gateway.stream_url(), [END], origin="https://app.example")).close_code == 1000


async def test_keys(make_gateway: MakeGateway) -> None:
    async with make_gateway(api_keys=["first", "second"]) as gateway:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"X-API-Key": "firs"}):
            with pytest.raises(InvalidStatus) as refused:
                await converse(gateway.stream_url(), [], additional_headers=headers)
            assert refused.value.response.status_code == 401
            assert refused.value.response.headers["WWW-Authenticate"] == "Bearer"
        for headers in ({"Authorization": "Bearer second"}, {"X-API-Key": "first"}):
            assert (await converse(gateway.stream_url(), [END], additional_headers=headers)).close_code == 1000


async def test_stream_over_capacity_is_refused(make_gateway: MakeGateway) -> None:
    async with make_gateway(max_concurrent_streams=1) as gateway, open_socket(gateway.stream_url()) as socket:
        with pytest.raises(InvalidStatus) as refused:
            await converse(gateway.stream_url(), [])
        response = refused.value.response
        assert response.status_code == 503
        assert 1 <= int(response.headers["Retry-After"]) <= 5
        assert b'"retryable":true' in response.body
        await socket.send(END)
        assert (await listen(socket)).close_code == 1000
        assert (await converse(gateway.stream_url(), [END])).close_code == 1000


async def test_drain_ends_live_streams_with_their_final(make_gateway: MakeGateway, recordings: Recordings) -> None:
    samples = next(iter(recordings.values()))
    async with make_gateway(drain_timeout_secs=0.5) as gateway:
        socket = await open_socket(gateway.stream_url())
        for frame in cut(samples, 16000):
            await socket.send(frame)
        gateway.server.should_exit = True
        conversation = await listen(socket)
    async with make_gateway() as gateway:
        assert conversation.final == (await transcribe(gateway.stream_url(), samples)).final
    assert conversation.close_code == 1012


async def test_streams_are_counted_and_measured(gateway: Gateway, recordings: Recordings) -> None:
    samples = next(iter(recordings.values()))
    before = await gateway_metrics(gateway.url)
    await transcribe(gateway.stream_url(), samples)
    with pytest.raises((ConnectionClosed, InvalidStatus)):
        await converse(gateway.stream_url("nobody"), [])
    grown = growth(before, await gateway_metrics(gateway.url))

    assert grown("asr_requests_total", endpoint="stream", model="amira", status="101") == 1
    assert grown("asr_requests_total", endpoint="stream", model="unknown", status="404") == 1
    assert grown("asr_websocket_closes_total", code="1000") == 1
    assert grown("asr_rejections_total", reason="model_not_found") == 1
    assert grown("asr_final_latency_seconds_count", model="amira") == 1
    assert grown("asr_audio_seconds_total", endpoint="stream", model="amira") == pytest.approx(len(samples) / 16000)
    assert grown("triton_inference_duration_seconds_count", model="asr_ensemble") >= 2


async def test_latency_is_measured_in_real_time_only(gateway: Gateway, recordings: Recordings) -> None:
    """A recording sent faster than real time lags, which is not overload."""
    samples = next(iter(recordings.values()))
    for how, seen in ((transcribe, 0), (speak, 1)):
        before = await gateway_metrics(gateway.url)
        await how(gateway.stream_url(), samples)
        grown = growth(before, await gateway_metrics(gateway.url))
        for name in ("asr_partial_latency_seconds_count", "asr_stream_lag_seconds_count"):
            assert min(1, grown(name, model="amira")) == seen
        assert grown("asr_audio_seconds_total", endpoint="stream", model="amira") == pytest.approx(len(samples) / 16000)


async def test_quota_of_a_key(make_gateway: MakeGateway, recordings: Recordings) -> None:
    samples = recordings["jfk"]
    key: dict[str, Any] = {"additional_headers": {"X-API-Key": "first"}}
    async with make_gateway(api_keys=["first", "second"], max_streams_per_key=1, max_audio_rate_per_key=0.1) as gateway:
        async with open_socket(gateway.stream_url(), **key) as socket:
            with pytest.raises(InvalidStatus) as refused:
                await converse(gateway.stream_url(), [], **key)
            assert refused.value.response.status_code == 429
            assert int(refused.value.response.headers["Retry-After"]) >= 1
            for frame in cut(samples, 16000):
                await socket.send(frame)
            conversation = await listen(socket)
        assert conversation.close_code == 4429
        assert conversation.error["code"] == "quota_exceeded"
        assert conversation.error["retry_after_ms"] >= 1000
        async with httpx.AsyncClient() as http:
            for name, status in (("first", 429), ("second", 200)):
                headers = {"X-API-Key": name, "Content-Type": "audio/pcm"}
                answer = await http.post(gateway.batch_url(), content=samples[:16000].tobytes(), headers=headers)
                assert answer.status_code == status
