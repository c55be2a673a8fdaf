"""Real faults: no word is lost or repeated."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator

import pytest

from tests.support.chaos import (
    Backend,
    Outcome,
    Proxy,
    backends,
    disturb,
    kill,
    kill_stub,
    kill_twice,
    pieces,
    speak,
    stop_for,
    transcribe_repeatedly,
)
from tests.support.clients import decoder_metric, gateway_metrics, growth, transcribe
from tests.support.servers import Gateway, Recordings, Samples, run_gateway

STREAMS, SECONDS = 5, 6.0
PATIENT = {"recovery_timeout_secs": 60}
"""Recovery time for tests: on a busy machine, a Triton may take longer to start than the default."""


@pytest.fixture(scope="module")
async def two(quick_restarts: None) -> AsyncIterator[list[Backend]]:  # noqa: ARG001 (needed for its effect)
    async with backends(2, warm=False) as running:
        yield running


@pytest.fixture(scope="module")
async def speech(two: list[Backend], recordings: Recordings) -> tuple[list[Samples], list[str]]:
    """Return the audio of the streams, and their undisturbed finals."""
    said = pieces([*recordings.values()], STREAMS, SECONDS)
    async with run_gateway(triton_endpoint=two[0].target) as gateway:
        texts = [(await transcribe(gateway.stream_url(), samples)).final["text"] for samples in said]
    assert all(texts)
    return said, texts


def assert_nothing_lost(outcome: Outcome, deaths: int = 1) -> None:
    assert outcome.lost == []
    assert outcome.closes == []
    assert outcome.wrong_batches == 0
    assert set(outcome.batches) <= {200, 502, 503}, "one that comes while there is no Triton is refused"
    assert outcome.batches.get(502, 0) <= deaths, "only the one in flight at a death is given up"
    assert outcome.batches[200]


async def test_killed(two: list[Backend], speech: tuple[list[Samples], list[str]]) -> None:
    async with run_gateway(triton_endpoint=two[0].target, **PATIENT) as gateway:
        before = await gateway_metrics(gateway.url)
        outcome = await disturb(gateway.stream_url(), gateway.batch_url(), *speech, lambda: kill(two[0]))
        grown = growth(before, await gateway_metrics(gateway.url))
    assert_nothing_lost(outcome)
    assert outcome.recovery_secs is not None
    assert outcome.recovery_secs < 10  # make chaos says 5, with the machine to itself
    assert grown("asr_stream_recoveries_total", outcome="recovered") >= STREAMS
    assert grown("asr_stream_recoveries_total", outcome="failed") == 0
    assert grown("asr_replayed_audio_seconds_total") > 0


async def test_killed_with_a_beam(two: list[Backend], recordings: Recordings) -> None:
    """Hypotheses move to the restarted Triton with the state of their stream."""
    said = pieces([*recordings.values()], STREAMS, SECONDS)
    async with run_gateway(triton_endpoint=two[0].target, **PATIENT) as gateway:
        url = f"{gateway.stream_url()}?beam=4"
        texts = [(await transcribe(url, samples)).final["text"] for samples in said]
        assert texts != [(await transcribe(f"{gateway.stream_url()}?beam=1", samples)).final["text"] for samples in said]
        before = await gateway_metrics(gateway.url)
        outcome = await disturb(url, gateway.batch_url(), said, texts, lambda: kill(two[0]))
        grown = growth(before, await gateway_metrics(gateway.url))
    assert_nothing_lost(outcome)
    assert grown("asr_stream_recoveries_total", outcome="recovered") >= STREAMS


async def test_triton_killed_twice(two: list[Backend], speech: tuple[list[Samples], list[str]]) -> None:
    """Streams in flight at both deaths are not treated as the cause, since others were in flight too."""
    async with run_gateway(triton_endpoint=two[0].target, **PATIENT) as gateway:
        outcome = await disturb(gateway.stream_url(), gateway.batch_url(), *speech, lambda: kill_twice(two[0]))
    assert_nothing_lost(outcome, deaths=2)


@pytest.mark.parametrize("model", ["encoder", pytest.param("rnnt_greedy_bls", marks=pytest.mark.slow)])
async def test_killed_model_process(two: list[Backend], speech: tuple[list[Samples], list[str]], model: str) -> None:
    async with run_gateway(triton_endpoint=two[0].target, **PATIENT) as gateway:
        outcome = await disturb(gateway.stream_url(), gateway.batch_url(), *speech, lambda: kill_stub(two[0], model))
    assert_nothing_lost(outcome)


async def test_one_of_two_is_killed(two: list[Backend], speech: tuple[list[Samples], list[str]]) -> None:
    async with run_gateway(triton_endpoints=[backend.target for backend in two]) as gateway:

        async def fault() -> float:
            shares = [await decoder_metric(backend.ports, "asr_decoder_sequences") for backend in two]
            assert min(shares) >= STREAMS // 2, "the streams are not shared out"
            two[1].signal(signal.SIGKILL)
            return time.monotonic()

        outcome = await disturb(gateway.stream_url(), gateway.batch_url(), *speech, fault)
    assert_nothing_lost(outcome)
    assert outcome.recovery_secs is not None
    assert outcome.recovery_secs < 3, "they waited for the dead one"
    await two[1].ready_again()


async def test_stopped_for_longer_than_the_time_limit(two: list[Backend], speech: tuple[list[Samples], list[str]]) -> None:
    async with run_gateway(triton_endpoint=two[0].target, inference_timeout_secs=1.5, **PATIENT) as gateway:
        outcome = await disturb(gateway.stream_url(), gateway.batch_url(), *speech, lambda: stop_for(two[0], 2.0))
    assert outcome.lost == []
    assert outcome.closes == []


async def test_stall_mixes_up_no_answers(two: list[Backend], recordings: Recordings) -> None:
    """A Triton that stalled takes later answers of its models for answers to other requests."""
    speech = pieces([*recordings.values()], 8, 2.0)
    once, done = asyncio.Event(), asyncio.Event()
    once.set()
    async with run_gateway(triton_endpoint=two[0].target) as gateway:

        async def transcribe_all(until: asyncio.Event) -> list[list[tuple[int, str]]]:
            url = gateway.batch_url()
            return await asyncio.gather(*(transcribe_repeatedly(url, samples, until, pause_secs=0) for samples in speech))

        undisturbed = await transcribe_all(once)
        disturbed = asyncio.create_task(transcribe_all(done))
        await asyncio.sleep(1)
        await stop_for(two[0], 1.2)
        await asyncio.sleep(1)
        done.set()
        for ((first, text),), answers in zip(undisturbed, await disturbed, strict=True):
            assert first == 200
            assert {other for status, other in answers if status == 200} <= {text}
            # 502: it was in flight when the models' processes ended themselves, and is never sent again.
            assert {status for status, _ in answers} <= {200, 502, 503}


@pytest.mark.parametrize("how", ["reset", "silent", *(pytest.param(how, marks=pytest.mark.slow) for how in ("forget", "deaf"))])
async def test_bad_network(two: list[Backend], speech: tuple[list[Samples], list[str]], how: str) -> None:
    proxy = Proxy(two[0].ports)

    async def fault() -> float:
        if how in ("reset", "forget"):
            getattr(proxy, how)()
        else:
            setattr(proxy, how, True)
            await asyncio.sleep(3)
            setattr(proxy, how, False)
            proxy.reset()
        return time.monotonic()

    # Requests on a forgotten connection are sent again long before their timeout.
    timeout_secs = 30 if how == "forget" else 2
    async with (
        proxy.running(),
        run_gateway(triton_endpoint=f"127.0.0.1:{proxy.port}", inference_timeout_secs=timeout_secs) as gateway,
    ):
        outcome = await disturb(gateway.stream_url(), gateway.batch_url(), *speech, fault)
    assert outcome.lost == []
    assert outcome.closes == []
    assert outcome.recovery_secs is not None
    assert outcome.recovery_secs < 10  # make chaos says 5, with the machine to itself


async def test_no_sequence_is_left(two: list[Backend], gateway: Gateway) -> None:
    """Abandoned sequences are ended if their Triton is still alive."""
    assert gateway
    for _ in range(100):
        left = [await decoder_metric(backend.ports, "asr_decoder_sequences") for backend in two]
        if not any(left):
            return
        await asyncio.sleep(0.2)
    pytest.fail(f"the decoders still hold {left} streams")


async def test_lasting_outage_ends_the_stream(two: list[Backend], recordings: Recordings) -> None:
    """After the recovery time, the stream gets the documented error, and its place is free again."""
    proxy = Proxy(two[0].ports)
    async with (
        proxy.running(),
        run_gateway(
            triton_endpoint=f"127.0.0.1:{proxy.port}", inference_timeout_secs=0.5, recovery_timeout_secs=1.5
        ) as gateway,
    ):
        stream = asyncio.create_task(speak(gateway.stream_url(), recordings["jfk"]))
        await asyncio.sleep(3)
        proxy.silent = True
        said = await asyncio.wait_for(stream, 15)
        metrics = await gateway_metrics(gateway.url)
    assert said.close_code == 4503
    assert said.messages[-1][1]["error"]["code"] in ("backend_timeout", "backend_failed", "not_ready")
    assert said.messages[-1][1]["error"]["retryable"] is True
    assert said.finals == []
    assert metrics["asr_stream_recoveries_total", (("outcome", "failed"),)] >= 1
    assert metrics["asr_active_connections", ()] == 0
