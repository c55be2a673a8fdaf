"""Cached encoders behind a real Triton: tokens equal those of sherpa-onnx, for any cuts, batches and faults."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import orjson
import pytest

from amira.models.repository import recognisers
from tests.support.chaos import Backend
from tests.support.clients import END, converse, cut, decoder_metric, gateway_metrics, growth, listen, open_socket, transcribe
from tests.support.published import TAIL, as_sherpa_onnx, imported, published, sherpa_at_once, sherpa_streamed
from tests.support.recogniser import Recogniser
from tests.support.servers import Gateway, Recordings, Samples, run_gateway

PARITY = ("nemo", "zipformer")
IMPORTED = ("nemo560", "offline")
OCTETS = {"Content-Type": "application/octet-stream"}


class Served(NamedTuple):
    """A gateway before a Triton with imported models."""

    gateway: Gateway
    backend: Backend
    repository: Path


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Served]:
    repository = tmp_path_factory.mktemp("served")
    for name in PARITY:
        for model in as_sherpa_onnx(name).glob(f"{name}*"):
            if not (repository / model.name).exists():
                shutil.copytree(model, repository / model.name)
    for name in IMPORTED:
        for model in imported(name).glob(f"{name}*"):
            shutil.copytree(model, repository / model.name)
    backend = Backend("cached", repository, ensembles=["nemo560"])
    await backend.start()
    names = {name: name for name in (*PARITY, *IMPORTED)}
    settings = {
        "models": names,
        "model_languages": {"nemo560": "en"},
        "max_concurrent_streams": 64,
        "recovery_timeout_secs": 60,
        "canary_interval_secs": 3600,
    }
    try:
        async with run_gateway(triton_endpoint=backend.target, **settings) as gateway:
            yield Served(gateway, backend, repository)
    finally:
        await backend.stop()


def pieces_of(served: Served, name: str, tokens: list[int]) -> list[str]:
    lines = (served.repository / f"{name}_decoder" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return [lines[token].rpartition(" ")[0].replace("▁", " ") for token in tokens]


@pytest.mark.parametrize("name", PARITY)
async def test_streamed_tokens_and_times_equal_sherpa_onnx(served: Served, recordings: Recordings, name: str) -> None:
    frame_secs = {"nemo": 0.08, "zipformer": 0.04}[name]
    for samples in recordings.values():
        padded = np.concatenate([samples, TAIL])
        tokens, times = sherpa_streamed(published(name), padded)
        final = (await transcribe(served.gateway.stream_url(name), padded)).final
        count = len(tokens)
        assert pieces_of(served, name, final["tokens"][:count]) == tokens
        words = final["words"][:count]
        starts = [int(word["start"] / frame_secs + 1e-6) * frame_secs for word in words]
        assert starts == pytest.approx(times, abs=2e-3)


async def test_offline_tokens_equal_sherpa_onnx(served: Served, recordings: Recordings, http: httpx.AsyncClient) -> None:
    for samples in recordings.values():
        tokens, _ = sherpa_at_once(published("offline"), samples)
        answer = await http.post(served.gateway.batch_url("offline"), content=samples.tobytes(), headers=OCTETS)
        assert answer.status_code == 200, answer.text
        assert pieces_of(served, "offline", answer.json()["tokens"]) == tokens


async def test_stream_equals_the_decoder_without_triton(served: Served, recordings: Recordings) -> None:
    """FP16 caches pass through Triton bit for bit; a recording in one request is decoded like a stream."""
    ours = Recogniser(served.repository, "nemo560")
    samples = recordings["jfk"]
    expected = [token.id for token in (await ours.recognise([samples])).tokens]
    assert len(set(expected)) >= 5
    for frame_samples in (1600, [1, 7001, 23], 30_000):
        final = (await transcribe(served.gateway.stream_url("nemo560"), samples, frame_samples)).final
        assert final["tokens"] == expected


async def test_interleaved_streams_share_calls(served: Served, recordings: Recordings) -> None:
    ours = Recogniser(served.repository, "nemo560")
    audio = [np.roll(recordings["jfk"], 997 * i)[: 60_000 + 999 * i] for i in range(32)]
    expected = [[token.id for token in (await ours.recognise([samples])).tokens] for samples in audio]

    async def count(name: str) -> float:
        return await decoder_metric(served.backend.ports, name)

    calls, windows = await count("asr_decoder_encode_calls_total"), await count("asr_decoder_windows_total")
    said = await asyncio.gather(
        *(converse(served.gateway.stream_url("nemo560"), [*cut(samples, 3200), END], 0.01) for samples in audio)
    )
    assert [conversation.final["tokens"] for conversation in said] == expected
    await asyncio.sleep(1)  # metrics are reported at intervals
    calls, windows = (
        await count("asr_decoder_encode_calls_total") - calls,
        await count("asr_decoder_windows_total") - windows,
    )
    assert windows > 1.5 * calls, "windows of different streams shared few calls"


async def test_killed_triton_costs_little_beyond_what_is_kept(
    served: Served, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is filled from the audio that is kept, which is less than the anchor asks for: nothing is lost or repeated."""
    monkeypatch.setattr("gateway.triton.utterance.MAX_REPLAY_SECS", 2.0)
    samples = recordings["2033-164914-0000"]
    url = served.gateway.stream_url("nemo560")
    undisturbed = (await transcribe(url, samples)).final
    before = await gateway_metrics(served.gateway.url)
    said = await converse_slowly(url, frames_until_death(served, samples, 100_000))
    grown = growth(before, await gateway_metrics(served.gateway.url))
    assert grown("asr_stream_recoveries_total", outcome="recovered") >= 1
    assert 0 < grown("asr_replayed_audio_seconds_total") < 8
    settled = undisturbed["tokens"][: len(undisturbed["tokens"]) // 3]
    assert said["tokens"][: len(settled)] == settled
    assert said["audio_processed_ms"] == undisturbed["audio_processed_ms"]
    ends = [word["end"] for word in said["words"]]
    assert ends == sorted(ends)


@pytest.mark.parametrize("phase", ["before an anchor", "behind an anchor"])
async def test_killed_triton_costs_no_token(served: Served, recordings: Recordings, phase: str) -> None:
    """The cache is filled again from the audio that the gateway keeps; no text is repeated."""
    speech = [*recordings.values()]
    pause = np.zeros(40_000, np.int16)
    samples = np.concatenate([speech[0], pause, speech[1][:90_000]])
    kill_at = 30_000 if phase == "before an anchor" else len(speech[0]) + len(pause) + 45_000
    url = served.gateway.stream_url("nemo560")
    undisturbed = (await transcribe(url, samples)).final
    before = await gateway_metrics(served.gateway.url)

    said = await converse_slowly(url, frames_until_death(served, samples, kill_at))
    assert said["tokens"] == undisturbed["tokens"]
    assert said["text"] == undisturbed["text"]
    grown = growth(before, await gateway_metrics(served.gateway.url))
    assert grown("asr_stream_recoveries_total", outcome="recovered") >= 1
    replayed = grown("asr_replayed_audio_seconds_total")
    assert 0 < replayed < len(samples) / 16_000
    if phase == "behind an anchor":
        assert replayed < (kill_at - len(speech[0])) / 16_000 + 1, "audio before the anchor was sent again"


async def frames_until_death(served: Served, samples: Samples, kill_at: int) -> AsyncIterator[bytes]:
    """Yield frames, and kill Triton at a sample."""
    for start in range(0, len(samples), 3200):
        if start <= kill_at < start + 3200 and served.backend.triton.pid:  # else it ended by itself, on a busy machine
            served.backend.signal(signal.SIGKILL)
        yield samples[start : start + 3200].tobytes()
    yield END


async def converse_slowly(url: str, frames: AsyncIterator[bytes]) -> dict[str, Any]:
    async with open_socket(url, ping_timeout=None) as socket:
        listener = asyncio.create_task(listen(socket))
        async for frame in frames:
            await socket.send(frame)
            await asyncio.sleep(0.05)
        final: dict[str, Any] = (await listener).final
        return final


async def test_stream_resumes_without_its_cache(served: Served, recordings: Recordings) -> None:
    """On another gateway: the client sends the audio since the last fresh cache again, and the final is the same."""
    pause = np.zeros(40_000, np.int16)
    speech = [*recordings.values()]
    samples = np.concatenate([speech[0], pause, speech[1][:60_000]])
    settings = {
        "triton_endpoint": served.backend.target,
        "models": {"nemo560": "nemo560"},
        "session_key": "one for both gateways",
    }
    async with run_gateway(**settings) as first, run_gateway(**settings) as second:
        whole = await converse(first.stream_url("nemo560"), [*cut(samples, 3200), END], 0.02, subprotocols=["amira.v2"])
        text, acks = "", []
        for message in whole.messages:
            if message["type"] == "ack":
                acks.append((message, text[: message["settled"]["chars"]]))
            else:
                text = message["text"]
        starts = {ack["samples"] for ack, _ in acks}
        assert max(starts) > len(speech[0]), "no anchor: the test shows nothing"
        for ack, settled in acks[:: max(1, len(acks) // 4)]:
            resume = orjson.dumps({"type": "resume", "session": ack["session"]}).decode()
            async with open_socket(second.stream_url("nemo560"), subprotocols=["amira.v2"]) as socket:
                await socket.send(resume)
                for frame in [*cut(samples[ack["samples"] :], 16_000), END]:
                    await socket.send(frame)
                rest = (await listen(socket)).final
            assert settled + rest["text"] == whole.final["text"]
            assert whole.final["tokens"][ack["settled"]["tokens"] :] == rest["tokens"]


def test_repository_is_described(served: Served) -> None:
    """With kind, chunks, and the memory of its caches."""
    lines = {recogniser.name: recogniser.describe() for recogniser in recognisers(served.repository)}
    assert lines["nemo560"] == (
        "nemo560: rnnt, 40 pieces, 80 ms a frame, cached, chunks of balanced 560 ms, "
        "0.0 MB a stream, up to 1 MB of shared memory for its encoder calls"
    )
    assert "40 ms a frame, cached, chunks of balanced 320 ms" in lines["zipformer"]
    assert "windows of 10.00" in lines["offline"]
