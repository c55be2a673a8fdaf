"""Windows of each latency, through gateway, Triton and decoder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from itertools import pairwise

import httpx
import jiwer
import numpy as np
import orjson
import pytest

from amira.models.repository import recognisers
from amira.paths import MODEL_REPOSITORY
from tests.support.clients import END, converse, cut, listen, open_socket, transcribe
from tests.support.servers import Gateway, Recordings, Samples

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]

SESSION_KEY = "one for all gateways"
FEATURE_MS = 24

pytestmark = pytest.mark.usefixtures("no_sequence_left")


@pytest.fixture(scope="module")
def speech(recordings: Recordings) -> Samples:
    return np.concatenate([*recordings.values()])[: 16_000 * 12]


def chunk_and_right_ms(latency: str) -> tuple[int, int]:
    (bundled,) = recognisers(MODEL_REPOSITORY)
    p = bundled.parameters
    chunks = {
        "low": p["low_latency_features"].split(",")[1],
        "balanced": p["chunk_features"],
        "throughput": p["high_throughput_features"].split(",")[1],
    }
    return int(chunks[latency]) * FEATURE_MS, int(p["right_features"]) * FEATURE_MS


def test_latencies_are_in_order() -> None:
    waits = [sum(chunk_and_right_ms(latency)) for latency in ("low", "balanced", "throughput")]
    assert waits == sorted(set(waits))


@pytest.mark.parametrize(
    "latency", ["low", *(pytest.param(latency, marks=pytest.mark.slow) for latency in ("balanced", "throughput"))]
)
async def test_each_latency_has_its_own_windows(make_gateway: MakeGateway, speech: Samples, latency: str) -> None:
    chunk_ms, right_ms = chunk_and_right_ms(latency)
    async with make_gateway(latency=latency, max_frame_bytes=2 * len(speech)) as gateway:
        url = gateway.stream_url()
        *partials, final = (await converse(url, [*cut(speech, 800), END], pause_secs=0.02)).messages
        others = [(await transcribe(url, speech, size)).final for size in (1234, 7001, len(speech))]
    processed = [partial["audio_processed_ms"] for partial in partials]
    assert all(ms % chunk_ms == 0 for ms in processed)
    # Audio is decoded chunk by chunk, and each chunk that changes the text gives a partial.
    assert min(after - before for before, after in pairwise(processed)) == chunk_ms
    assert processed[-1] <= len(speech) // 16 - right_ms
    for other in others:
        assert other == final


async def test_latencies_give_different_texts(make_gateway: MakeGateway, speech: Samples) -> None:
    finals = {}
    for latency in ("low", "balanced", "throughput"):
        async with make_gateway(latency=latency) as gateway:
            finals[latency] = (await transcribe(gateway.stream_url(), speech)).final["text"]
    assert len(set(finals.values())) > 1
    assert max(jiwer.wer(finals["balanced"], text) for text in finals.values()) < 0.5


async def test_resumed_stream_keeps_its_latency(make_gateway: MakeGateway, speech: Samples) -> None:
    async with (
        make_gateway(latency="low", session_key=SESSION_KEY) as first,
        make_gateway(session_key=SESSION_KEY) as second,
    ):
        whole = await converse(first.stream_url(), [*cut(speech, 1600), END], pause_secs=0.01, subprotocols=["amira.v2"])
        acks = [message for message in whole.messages if message["type"] == "ack"]
        ack = acks[len(acks) // 2]
        async with open_socket(second.stream_url(), subprotocols=["amira.v2"]) as socket:
            await socket.send(orjson.dumps({"type": "resume", "session": ack["session"]}).decode())
            for frame in [*cut(speech[ack["samples"] :], 16_000), END]:
                await socket.send(frame)
            rest = (await listen(socket)).final
    assert rest["tokens"] == whole.final["tokens"][ack["settled"]["tokens"] :]
    assert rest["audio_processed_ms"] == whole.final["audio_processed_ms"]


async def test_latency_does_not_change_recordings(make_gateway: MakeGateway, http: httpx.AsyncClient, speech: Samples) -> None:
    texts = set()
    for latency in ("low", "throughput"):
        async with make_gateway(latency=latency) as gateway:
            headers = {"Content-Type": "application/octet-stream"}
            texts.add((await http.post(gateway.batch_url(), content=speech.tobytes(), headers=headers)).json()["text"])
    assert len(texts) == 1
    assert "" not in texts
