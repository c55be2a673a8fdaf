"""Faults under twenty real-time streams and some recordings; docs/Reliability.md summarises the results."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import datetime, timezone

import pytest

from amira import LiveStream
from amira.paths import ROOT
from amira.ports import LOOPBACK, free_ports
from perf.server import cpu_model
from tests.support.chaos import (
    RATE,
    Backend,
    Outcome,
    Proxy,
    backends,
    disturb,
    kill,
    kill_stub,
    kill_twice,
    pieces,
    stop_for,
    terminate,
)
from tests.support.clients import cut, transcribe
from tests.support.commands import gateway_process
from tests.support.servers import Samples, read_recordings, run_gateway

STREAMS, SECONDS = 20, 12.0
RECOVERY_SECS = 5.0
"""Maximum time from when the service is whole until every stream goes on."""

TWICE = "Triton: SIGKILL twice in a row"
ONE_BY_ONE_SECS = 10.0
"""The same after two deaths with all streams in flight: any may be the cause, so each is sent by itself."""

REPORT = ROOT / "perf" / "results" / "faults.md"
TITLES = ("fault", "finals as undisturbed", "recovered in", "batches", "p95 of partials before", "from the fault on")

Speech = tuple[list[Samples], list[str]]
Write = Callable[[str, Outcome], None]


@pytest.fixture(scope="session")
async def two() -> AsyncIterator[list[Backend]]:
    async with backends(2) as running:
        yield running


@pytest.fixture(scope="session")
async def speech(two: list[Backend]) -> Speech:
    said = pieces([*read_recordings().values()], STREAMS, SECONDS)
    async with run_gateway(triton_endpoint=two[0].target, max_concurrent_streams=STREAMS) as gateway:
        texts = [(await transcribe(gateway.stream_url(), samples)).final["text"] for samples in said]
    return said, texts


@pytest.fixture(scope="session")
def write() -> Iterator[Write]:
    rows: list[str] = []

    def add(title: str, outcome: Outcome) -> None:
        recovery = "" if outcome.recovery_secs is None else f"{outcome.recovery_secs:.1f} s"
        batches = ", ".join(f"{count} × {status}" for status, count in outcome.batches.items())
        rows.append(
            f"| {title} | {STREAMS - len(outcome.lost)} of {STREAMS} | {recovery} | {batches} "
            f"| {seconds(outcome.p95_before)} | {seconds(outcome.p95_during)} |\n"
        )

    yield add
    when = datetime.now(timezone.utc).isoformat(" ", "minutes")
    head = f"{when}, {cpu_model()}. {STREAMS} streams of {SECONDS:g} s, and batches one after the other."
    table = [f"| {' | '.join(TITLES)} |\n", "|---" * len(TITLES) + "|\n", *rows]
    REPORT.write_text(f"# Faults under load\n\n{head}\n\n{''.join(table)}", encoding="utf-8")


def seconds(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f} s"


def assert_nothing_lost(outcome: Outcome, recovery_secs: float = RECOVERY_SECS) -> None:
    assert outcome.lost == []
    assert outcome.closes == []
    assert outcome.wrong_batches <= 0
    assert outcome.recovery_secs is None or outcome.recovery_secs < recovery_secs


BACKEND_FAULTS: dict[str, Callable[[Backend], Awaitable[float]]] = {
    "none": lambda _: asyncio.sleep(0, time.monotonic()),
    "Triton: SIGKILL": kill,
    "Triton: SIGTERM": terminate,
    TWICE: kill_twice,
    "Triton: SIGSTOP for 5 s": lambda backend: stop_for(backend, 5),
    "the decoder's stub killed": lambda backend: kill_stub(backend, "rnnt_greedy_bls"),
    "an encoder's stub killed": lambda backend: kill_stub(backend, "encoder"),
}


@pytest.mark.parametrize("name", BACKEND_FAULTS)
async def test_triton_fails(two: list[Backend], speech: Speech, write: Write, name: str) -> None:
    async with run_gateway(triton_endpoint=two[0].target, max_concurrent_streams=STREAMS) as gateway:
        outcome = await disturb(gateway.stream_url(), gateway.batch_url(), *speech, lambda: BACKEND_FAULTS[name](two[0]))
    write(name, outcome)
    assert_nothing_lost(outcome, ONE_BY_ONE_SECS if name == TWICE else RECOVERY_SECS)


async def test_one_of_two_is_killed(two: list[Backend], speech: Speech, write: Write) -> None:
    async def fault() -> float:
        two[1].signal(signal.SIGKILL)
        return time.monotonic()

    async with run_gateway(triton_endpoints=[backend.target for backend in two], max_concurrent_streams=STREAMS) as gateway:
        outcome = await disturb(gateway.stream_url(), gateway.batch_url(), *speech, fault)
    write("one of two Tritons: SIGKILL", outcome)
    assert_nothing_lost(outcome)
    await two[1].ready_again()


@pytest.mark.parametrize("how", ["delay", "silent", "deaf", "reset", "forget"])
async def test_the_network_is_bad(two: list[Backend], speech: Speech, write: Write, how: str) -> None:
    proxy = Proxy(two[0].ports)
    titles = {
        "delay": "network: 2 s slower for 5 s",
        "silent": "network: a black hole for 5 s",
        "deaf": "network: half-open for 5 s",
        "reset": "network: every connection reset",
        "forget": "network: every connection forgotten, silently",
    }

    async def fault() -> float:
        if how == "delay":
            proxy.delay_secs = 2.0
            await asyncio.sleep(5)
            proxy.delay_secs = 0.0
        elif how in ("silent", "deaf"):
            setattr(proxy, how, True)
            await asyncio.sleep(5)
            setattr(proxy, how, False)
            proxy.reset()
        else:
            getattr(proxy, how)()
        return time.monotonic()

    async with proxy.running():
        target = f"{LOOPBACK}:{proxy.port}"
        async with run_gateway(triton_endpoint=target, max_concurrent_streams=STREAMS) as gateway:
            outcome = await disturb(gateway.stream_url(), gateway.batch_url(), *speech, fault)
    write(titles[how], outcome)
    assert outcome.lost == []
    assert outcome.closes == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_gateway_fails(two: list[Backend], speech: Speech, write: Write, number: signal.Signals) -> None:
    """Clients of amira.v2 continue at the next gateway."""
    (port,) = free_ports(LOOPBACK, 1)
    url = f"ws://{LOOPBACK}:{port}/v2/decode/stream/amira"
    heard_again: list[float] = []

    async def follow(stream: LiveStream, since: asyncio.Future[float]) -> None:
        async for _ in stream:
            if since.done():
                heard_again.append(time.monotonic() - since.result())
                return

    async def talk(samples: Samples, ready: asyncio.Future[float]) -> str:
        async with LiveStream(url) as stream:
            follower = asyncio.create_task(follow(stream, ready))
            began = time.monotonic()
            for turn, frame in enumerate(cut(samples, RATE // 10)):
                await asyncio.sleep(began + turn / 10 - time.monotonic())
                await stream.send(frame)
            text = (await stream.finish()).text
            await follower
            return text

    ready: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    async with gateway_process(port, two[0].ports, max_concurrent_streams=str(STREAMS)) as first:
        talking = [asyncio.create_task(talk(samples, ready)) for samples in speech[0]]
        await asyncio.sleep(SECONDS * 0.4)
        first.send_signal(number)
        code = await first.wait()
    async with gateway_process(port, two[0].ports, max_concurrent_streams=str(STREAMS)):
        ready.set_result(time.monotonic())
        texts = await asyncio.gather(*talking)
    lost = [i for i, (text, expected) in enumerate(zip(texts, speech[1], strict=True)) if text != expected]
    nan = float("nan")
    write(f"gateway: {number.name}, clients of amira.v2", Outcome(lost, [], {}, 0, max(heard_again), nan, nan))
    assert lost == []
    assert code == (0 if number is signal.SIGTERM else -number)
