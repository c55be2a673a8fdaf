"""Readiness means that speech is recognised: models' processes that are stopped or dead, and a Triton that is only slow."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from amira.ports import Ports
from tests.support.chaos import Backend, speak
from tests.support.clients import decoder_metric, gateway_metrics, open_socket, transcribe
from tests.support.commands import until
from tests.support.repositories import served_repository
from tests.support.servers import Gateway, Recordings, run_gateway

INTERVAL_SECS = 0.5
"""Pause between canaries; a tenth of users' gateways', so that tests need not wait."""

NOTICED_SECS = 10.0
"""A stopped process is noticed within this time: a pause, and two rounds that take up to 2 s each on an idle machine."""

RESTARTED_SECS = 90.0
"""Within this time it is replaced, on a machine that is busy with other tests."""

MODELS = ["decoder_joint", "encoder", "encoder_exclusive", "encoder_stream", "preprocessor", "detokenizer", "rnnt_greedy_bls"]


@pytest.fixture(scope="module")
async def backend(quick_restarts: None) -> AsyncIterator[Backend]:  # noqa: ARG001 (needed for its effect)
    """A Triton that is kept alive as the launcher does, with more canaries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("amira.engine.process.CANARY_INTERVAL_SECS", INTERVAL_SECS)
        backend = Backend("canary", served_repository(warm=False))
    await backend.start()
    yield backend
    await backend.stop()


@asynccontextmanager
async def unkept() -> AsyncIterator[Backend]:
    """A Triton that nobody restarts."""
    backend = Backend("canary-unkept", served_repository(warm=False))
    await backend.triton.start()
    try:
        yield backend
    finally:
        await backend.stop()


async def readiness(gateway: Gateway) -> int:
    async with httpx.AsyncClient(timeout=30) as http:
        return (await http.get(f"{gateway.url}/health/ready")).status_code


async def detailed(gateway: Gateway) -> dict[str, Any]:
    async with httpx.AsyncClient(timeout=30) as http:
        body: dict[str, Any] = (await http.get(f"{gateway.url}/health/detailed")).json()
        return body


async def wait_for_readiness(gateway: Gateway, expected: int, limit_secs: float) -> None:
    """Wait for a status of /health/ready."""

    async def come() -> bool:
        return await readiness(gateway) == expected

    await until(come, limit_secs)


async def nothing_left(triton: Ports) -> bool:
    return await decoder_metric(triton, "asr_decoder_sequences") == 0


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=[] if model == "decoder_joint" else pytest.mark.slow) for model in MODELS]
)
async def test_stopped_process_is_noticed_and_replaced(backend: Backend, recordings: Recordings, model: str) -> None:
    async with run_gateway(triton_endpoint=backend.target, canary_interval_secs=INTERVAL_SECS) as gateway:
        await wait_for_readiness(gateway, 200, RESTARTED_SECS)
        expected = (await transcribe(gateway.stream_url(), recordings["jfk"])).final["text"]
        before = backend.triton.pid
        (process, *_) = backend.stubs(model)
        process.suspend()
        await wait_for_readiness(gateway, 503, NOTICED_SECS)
        await until(lambda: backend.triton.pid not in (None, before), RESTARTED_SECS)
        await wait_for_readiness(gateway, 200, RESTARTED_SECS)
        assert (await transcribe(gateway.stream_url(), recordings["jfk"])).final["text"] == expected


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=[] if model == "detokenizer" else pytest.mark.slow) for model in MODELS]
)
@pytest.mark.parametrize("how", [signal.SIGSTOP, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
async def test_recording_and_stream_outlast_a_lost_process(
    backend: Backend, recordings: Recordings, model: str, how: signal.Signals
) -> None:
    """A long recording, several pieces of which are in flight, and one live stream: too few to open a circuit breaker."""
    long = np.tile(recordings["jfk"], 12)
    settings = {"canary_interval_secs": INTERVAL_SECS, "recovery_timeout_secs": RESTARTED_SECS, "max_concurrent_batches": 3}
    async with run_gateway(triton_endpoint=backend.target, **settings) as gateway, httpx.AsyncClient(timeout=240) as http:
        await wait_for_readiness(gateway, 200, RESTARTED_SECS)

        async def post() -> httpx.Response:
            return await http.post(gateway.batch_url(), content=long.tobytes(), headers={"Content-Type": "audio/pcm"})

        expected = (await post()).json()["text"], (await transcribe(gateway.stream_url(), recordings["jfk"])).final["text"]
        before = backend.triton.pid
        recording = asyncio.create_task(post())
        stream = asyncio.create_task(speak(gateway.stream_url(), recordings["jfk"]))
        await asyncio.sleep(0.7)
        assert not recording.done()
        backend.stubs(model)[0].send_signal(how)
        answer, said = await asyncio.gather(recording, stream)
        await backend.started_anew(before)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["text"], said.finals) == (expected[0], [expected[1]])


@pytest.mark.slow
async def test_stopped_process_on_a_triton_that_nobody_restarts() -> None:
    async with unkept() as backend, run_gateway(triton_endpoint=backend.target, canary_interval_secs=INTERVAL_SECS) as gateway:
        assert await readiness(gateway) == 200
        label = (("endpoint", backend.target),)
        assert (await gateway_metrics(gateway.url))["asr_triton_ready", label] == 1
        (process,) = backend.stubs("decoder_joint")
        process.kill()  # as the kernel does when memory is short
        await wait_for_readiness(gateway, 503, NOTICED_SECS)
        body = await detailed(gateway)
        assert body["status"] == "critical"
        (endpoint,) = body["dependencies"]["triton"]
        assert endpoint["reachable"] is True
        assert set(endpoint["models"].values()) == {"ready"}, "Triton itself says that all is well"
        assert endpoint["recognition"]["asr_ensemble"]["ok"] is False
        assert (await gateway_metrics(gateway.url))["asr_triton_ready", label] == 0
        async with httpx.AsyncClient(timeout=30) as http:
            answer = await http.post(gateway.batch_url(), content=bytes(32_000), headers={"Content-Type": "audio/pcm"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "not_ready"


async def test_new_streams_go_where_speech_is_recognised(backend: Backend, recordings: Recordings) -> None:
    async with unkept() as broken:
        targets = [broken.target, backend.target]
        async with run_gateway(triton_endpoints=targets, canary_interval_secs=INTERVAL_SECS) as gateway:

            async def shows(status: str) -> bool:
                return bool((await detailed(gateway))["status"] == status)

            await until(lambda: shows("ready"), RESTARTED_SECS)
            (process,) = broken.stubs("preprocessor")
            process.suspend()
            await until(lambda: shows("degraded"), NOTICED_SECS)
            assert await readiness(gateway) == 200
            before = await decoder_metric(broken.ports, "asr_decoder_audio_seconds_total")
            for _ in range(4):
                assert (await transcribe(gateway.stream_url(), recordings["jfk"][:48_000])).close_code == 1000
            after = await decoder_metric(broken.ports, "asr_decoder_audio_seconds_total")
            assert after - before < 0.1, "only canaries went there"
            process.resume()


@pytest.mark.slow
async def test_readiness_stays_under_heavy_load(triton: Ports, recordings: Recordings) -> None:
    """More than the machine can take: answers come late, and no canary calls that a failure."""
    settings: dict[str, Any] = {
        "triton_endpoint": f"{triton.host}:{triton.grpc}",
        "canary_interval_secs": 0.5,
        "max_concurrent_streams": 100,
        "max_concurrent_batches": 16,
    }
    long = np.resize(recordings["jfk"], 25 * 16_000)
    async with run_gateway(**settings) as gateway, httpx.AsyncClient(timeout=120) as http:
        headers = {"Content-Type": "audio/pcm"}
        batches = [
            asyncio.create_task(http.post(gateway.batch_url(), content=long.tobytes(), headers=headers)) for _ in range(16)
        ]
        streams = [asyncio.create_task(transcribe(gateway.stream_url(), long)) for _ in range(24)]
        seen: list[int] = []
        while not all(task.done() for task in (*batches, *streams)):
            seen.append(await readiness(gateway))
            await asyncio.sleep(0.2)
        await asyncio.gather(*batches, *streams)
        await until(lambda: nothing_left(triton), RESTARTED_SECS)
    assert len(seen) > 10
    assert set(seen) == {200}


async def test_canaries_leave_nothing_and_hold_no_place(
    make_gateway: Callable[..., AbstractAsyncContextManager[Gateway]], triton: Ports
) -> None:
    before = await decoder_metric(triton, "asr_decoder_calls_total")

    async def several_were_sent() -> bool:
        return await decoder_metric(triton, "asr_decoder_calls_total") - before >= 4

    async with make_gateway(canary_interval_secs=INTERVAL_SECS, max_concurrent_streams=1) as gateway:
        await until(several_were_sent)
        body = await detailed(gateway)
        assert body["streams"]["active"] == 0
        assert body["batches"]["active"] == 0
        assert body["dependencies"]["triton"][0]["sequences"] == 0
        async with open_socket(gateway.stream_url()):
            assert (await detailed(gateway))["streams"]["active"] == 1
    assert await decoder_metric(triton, "asr_decoder_sequences") == 0
