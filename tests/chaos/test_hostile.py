"""Hostile clients: their effect on real-time streams beside them, and what they leave behind (docs/Reliability.md)."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np
import pytest

from amira.paths import ROOT
from amira.ports import LOOPBACK, free_ports
from perf.server import cpu_model
from tests.support import hostile
from tests.support.chaos import RATE, Backend, Said, backends, p95, pieces, speak
from tests.support.clients import transcribe
from tests.support.commands import STRANGERS, gateway_process
from tests.support.footprint import Footprint, growth, look
from tests.support.servers import Samples, read_recordings, run_gateway

STREAMS, CAPACITY = 6, 60
TURN_SECS = 13.44
"""Duration of a turn: fourteen windows. The paced streams have the same audio in every turn, since the time of a window depends
on its words."""

ATTACK_SECS = TURN_SECS - 1.5
"""Duration of an attack within a turn; its process needs time to start and end."""

ROUNDS = int(os.environ.get("ROUNDS") or 4)
"""Number of turns without the clients, each followed by one with them. Without hostile clients, the p95 of single turns differs
by a third because of other work of the machine; over four turns by a tenth."""

TIMEOUT_SECS = 4.0
"""The gateway's ``stream_timeout_secs``; the default of 30 would only make the run longer."""

SETTLE_SECS = 3 * TIMEOUT_SECS
MAX_GROWTH_MB = 32.0
"""Maximum growth of memory that is kept for reuse, such as ONNX Runtime's arenas; ``make soak`` looks for lasting growth."""

MAX_SLOWER = 1.1
NOISE_SECS = 0.03
"""Difference of the p95 over all turns between runs without hostile clients."""

REPORT = ROOT / "perf" / "results" / "hostile.md"
TITLES = ("clients", "did", "finals as undisturbed", "p95 of partials without them", "with them", "left behind")


class Kind(NamedTuple):
    """A row of the table.

    Attributes:
        title: behaviour of the clients.
        clients: number of clients.
        did: text for the amount that they did.
        instead_of: whether without them as many are there that are not hostile, since a stream that speaks has its price.
    """

    title: str
    clients: int
    did: str = ""
    instead_of: bool = False


KINDS: Mapping[str, Kind] = {
    "none": Kind("none", 0),
    "compute": Kind("none, but a process of lowest priority that computes", 100),
    "in_time": Kind("6 more that are not hostile", 6, "{} frames"),
    "never_read": Kind("6 that speak, ask, and never read", 6, "{} frames", instead_of=True),
    "half_open": Kind("half-open connections", 40, "{} connections"),
    "too_fast": Kind("6 at ten times real time", 6, "{} frames", instead_of=True),
    "tiny_frames": Kind("8 with frames of 0 to 2 bytes, as many as are taken", 8),
    "connect": Kind("a thousand connects a second", hostile.CONNECTS, "{} connects"),
    "vanish": Kind("streams that vanish", hostile.VANISHERS, "{} streams"),
}


CONTROLS = {"none", "compute", "in_time"}
"""Control rows: the noise of the figures, the cost of a computing process on the server's machine, and the cost of regular
streams. In the turns without hostile clients of all other rows, a process computes as much as the clients did, or there are as
many regular streams."""


@pytest.fixture(scope="module")
async def backend() -> AsyncIterator[Backend]:
    async with backends(1) as (running,):
        yield running


@pytest.fixture(scope="module")
async def speech(backend: Backend) -> tuple[list[Samples], list[str]]:
    """Return the audio of the paced streams, and their undisturbed finals."""
    said = [np.tile(samples, 2 * ROUNDS) for samples in pieces([*read_recordings().values()], STREAMS, TURN_SECS)]
    async with run_gateway(triton_endpoint=backend.target) as gateway:
        return said, [
            conversation.final["text"]
            for conversation in await asyncio.gather(*(transcribe(gateway.stream_url(), samples) for samples in said))
        ]


@pytest.fixture(scope="module")
def write() -> Iterator[Callable[..., None]]:
    rows: list[str] = []

    def add(*cells: str) -> None:
        rows.append(f"| {' | '.join(cells)} |\n")

    yield add
    when = datetime.now(timezone.utc).isoformat(" ", "minutes")
    turns = f"{ROUNDS} times {TURN_SECS:g} s without the clients and {TURN_SECS:g} s with them"
    head = f"{when}, {cpu_model()}. {STREAMS} paced streams, {turns}."
    table = [f"| {' | '.join(TITLES)} |\n", "|---" * len(TITLES) + "|\n", *rows]
    REPORT.write_text(f"# Hostile clients\n\n{head}\n\n{''.join(table)}", encoding="utf-8")


class Done(NamedTuple):
    """Amount that the clients of a turn did, and the share of a CPU that their process used."""

    amount: int = 0
    share: float = 0.0


async def attack(port: int, kind: str, clients: int) -> Done:
    """Run the clients for a turn."""
    if not clients:
        await asyncio.sleep(TURN_SECS)
        return Done()
    command = [sys.executable, hostile.__file__, kind, str(port), str(ATTACK_SECS), str(clients)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    amount, used_secs = output.split()[-2:]
    return Done(int(amount), float(used_secs) / ATTACK_SECS)


async def settled(backend: Backend, url: str, pid: int, before: Footprint) -> Footprint:
    """Return the footprint when no more is held than before, or after ``SETTLE_SECS``."""
    deadline = time.monotonic() + SETTLE_SECS
    while True:
        now = await look(backend, url, pid)
        if not any(count > 0 for count in held(before, now).values()) or time.monotonic() > deadline:
            return now
        await asyncio.sleep(0.2)


def held(before: Footprint, now: Footprint) -> dict[str, int]:
    """Return the increase of the resources that are freed when a client leaves."""
    return {
        "sequences": now.sequences - before.sequences,
        "tasks": now.tasks - before.tasks,
        "descriptors": sum(now.descriptors.values()) - sum(before.descriptors.values()),
    }


@pytest.mark.parametrize("name", KINDS)
async def test_hostile_clients(
    backend: Backend, speech: tuple[list[Samples], list[str]], write: Callable[..., None], name: str
) -> None:
    kind = KINDS[name]
    said, texts = speech
    (port,) = free_ports(LOOPBACK, 1)
    url, stream_url = f"http://{LOOPBACK}:{port}", f"ws://{LOOPBACK}:{port}/v2/decode/stream/amira"
    settings = {
        "max_concurrent_streams": str(CAPACITY),
        "stream_timeout_secs": str(TIMEOUT_SECS),
    }
    async with gateway_process(port, backend.ports, STRANGERS, **settings) as gateway:
        # The growth of pools and caches at first use does not count.
        first, *_ = await asyncio.gather(
            attack(port, name, kind.clients), *(transcribe(stream_url, samples[: 5 * RATE]) for samples in said)
        )
        await asyncio.sleep(TIMEOUT_SECS + 1)
        before = await look(backend, url, gateway.pid)
        streams = [asyncio.create_task(speak(stream_url, samples)) for samples in said]
        began = time.monotonic()
        attacks, spans = [first], []
        for turn in range(2 * ROUNDS):
            await asyncio.sleep(began + turn * TURN_SECS - time.monotonic())
            since = time.monotonic()
            if turn % 2:
                attacks.append(await attack(port, name, kind.clients))
                spans.append((since, time.monotonic()))
            elif kind.instead_of:
                await attack(port, "in_time", kind.clients)
            elif name not in CONTROLS:
                await attack(port, "compute", max(1, round(100 * attacks[-1].share)))  # its start takes a while too
        results: list[Said] = await asyncio.gather(*streams)
        after = await settled(backend, url, gateway.pid, before)
    latencies: dict[bool, list[float]] = {False: [], True: []}
    for at, secs in itertools.chain.from_iterable(one.latencies for one in results):
        latencies[any(since <= at < until for since, until in spans)].append(secs)
    right = sum(one.finals == [text] for one, text in zip(results, texts, strict=True))
    grown = growth(before, after)
    more = held(before, after)
    largest = max(grown, key=lambda process: grown[process])
    left = ", ".join(
        [*(f"{count} {what}" for what, count in more.items() if count > 0), f"{grown[largest]:+.0f} MB ({largest})"]
    )
    if kind.instead_of:
        there = f", {kind.clients} others in real time there"
    else:
        there = "" if name in CONTROLS else f", {np.mean([one.share for one in attacks]):.0%} of a core computed there"
    write(
        kind.title,
        kind.did.format(f"{sum(one.amount for one in attacks[1:]):,}"),
        f"{right} of {STREAMS}",
        f"{p95(latencies[False]):.2f} s{there}",
        f"{p95(latencies[True]):.2f} s",
        left,
    )
    assert right == STREAMS
    assert not any(count > 0 for count in more.values()), more
    assert max(grown.values()) < MAX_GROWTH_MB, grown
    assert math.isfinite(p95(latencies[False]))
    if name not in CONTROLS:
        assert p95(latencies[True]) < MAX_SLOWER * p95(latencies[False]) + NOISE_SECS
