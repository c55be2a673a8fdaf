"""Measure the gateway with a stand-in for Triton: the time it adds to requests and streams, and its growth over an hour."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import orjson
from websockets.asyncio.client import connect

from amira.paths import ROOT
from amira.ports import LOOPBACK, free_ports
from gateway.audio import RATE
from gateway.triton.geometry import Windows
from perf.clients import GrpcClient, RestClient
from perf.endurance import Growth, Watch
from perf.load import closed_loop, percentiles_ms
from perf.processes import Meter
from perf.server import Process, amira
from perf.speech import Samples
from perf.streams import PATH, Script, play

INFERENCE_MS = 50.0
"""Inference time of the stand-in while request times are measured. Without it, eight requests at once would only queue for the
gateway."""

REQUESTS_A_TURN = 100


class Added(NamedTuple):
    """Time that the gateway adds to a request: the difference of the percentiles with and without the gateway."""

    p50_ms: float
    p99_ms: float


@contextlib.asynccontextmanager
async def standin_running(inference_ms: float) -> AsyncIterator[Process]:
    """Run a stand-in with this inference time."""
    (port,) = free_ports(LOOPBACK, 1)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "perf.standin", str(port), "--delay-ms", str(inference_ms)),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield Process(f"{LOOPBACK}:{port}", process.pid)
    finally:
        process.terminate()
        await process.wait()


async def added_time(samples: Samples, at_once: int, times: int) -> Added:
    """Measure the same requests through the gateway (REST) and without it (gRPC), in alternation.

    Args:
        samples: the recording of every request.
        at_once: number of requests in flight.
        times: number of alternations.
    """
    async with standin_running(INFERENCE_MS) as standin, amira("serve", triton_endpoint=standin.url) as gateway:
        rest, grpc = RestClient(gateway.url), GrpcClient(standin.url)
        latencies: dict[str, list[float]] = {"REST": [], "gRPC": []}
        try:
            for _ in range(times):
                for name, send in (("REST", rest.transcribe), ("gRPC", grpc.ours)):
                    # The first requests arrive at the same instant, which is another load, so they do not count.
                    latencies[name] += (await closed_loop(send, [samples] * REQUESTS_A_TURN, at_once))[at_once:]
        finally:
            await rest.close()
            await grpc.close()
    (with_p50, _, with_p99), (without_p50, _, without_p99) = map(percentiles_ms, latencies.values())
    return Added(with_p50 - without_p50, with_p99 - without_p99)


async def crowd(samples: Samples, windows: Windows, streams: int, hold_secs: float) -> float:
    """Return the p99 of the time that a gateway on one core adds to partials of paced streams, in milliseconds.

    The last two partials of each stream do not count: at that time other streams end already, all within a second.

    Args:
        samples: audio of every stream.
        windows: geometry of the recogniser's windows.
        streams: number of streams at once.
        hold_secs: duration of the load.
    """
    first, *others = sorted(os.sched_getaffinity(0))
    rest = set(others or [first])
    size = round(windows.chunk + windows.right + hold_secs * RATE)
    script = Script(samples[:size], range(windows.complete(size) - 2))
    room = {"max_concurrent_streams": streams, "max_connects_per_address": 100_000}
    async with standin_running(0) as standin, amira("serve", triton_endpoint=standin.url, **room) as gateway:
        with _on(gateway.pid, {first}), _on(standin.pid, rest), _on(os.getpid(), rest):
            partials = await play(gateway.url, [script] * streams, windows, 0.0)
    return percentiles_ms([partial.added for partial in partials])[2]


@contextlib.contextmanager
def _on(pid: int, cores: set[int]) -> Iterator[None]:
    """Pin a process to a set of cores."""

    def pin(chosen: set[int]) -> None:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), chosen)

    before = os.sched_getaffinity(pid)
    pin(cores)
    try:
        yield
    finally:
        pin(before)


async def long_stream(samples: Samples, windows: Windows) -> Growth:
    """Measure a long stream through the gateway; a chunk is sent when the partial of the one before has arrived."""
    async with standin_running(0) as standin, amira("serve", triton_endpoint=standin.url) as gateway:
        meter = Meter({"gateway": gateway.pid})
        watch = Watch(windows, lambda: meter.rss_mb()["gateway"])
        async with connect(f"{gateway.url.replace('http', 'ws', 1)}{PATH}", compression=None, max_size=None) as socket:
            sent = 0
            for chunk in range(windows.complete(len(samples))):
                began = time.perf_counter()
                await socket.send(samples[sent : windows.chunk_due(chunk)].tobytes())
                sent, processed_ms = windows.chunk_due(chunk), 0
                while processed_ms < (chunk + 1) * windows.chunk * 1000 // RATE:
                    message = await socket.recv()
                    took_secs = time.perf_counter() - began  # without the client's parsing, which grows with the text
                    processed_ms = orjson.loads(message)["audio_processed_ms"]
                watch.note(took_secs)
        return watch.growth()
