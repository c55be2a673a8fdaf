"""Measure a stream of an hour, the memory of open streams, and the time to start."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

from websockets.asyncio.client import connect

from amira.paths import MODEL_REPOSITORY
from amira.ports import LOOPBACK, free_ports
from gateway.audio import RATE
from gateway.server import TRIM_SECS
from gateway.triton.geometry import Windows
from perf.clients import GrpcClient
from perf.processes import Meter
from perf.recogniser import DECODER
from perf.server import Target, amira, read_counters, triton_server
from perf.speech import Samples, cut
from perf.streams import FRAME_SAMPLES, PATH

SETTLE_SECS = 1.0


class Growth(NamedTuple):
    """Time and memory of a stream's last minute, relative to its first minute."""

    time: float
    memory: float


@dataclass
class Watch:
    """Records the time of each chunk. The first minute begins when the stream's window is full.

    Attributes:
        windows: geometry of the stream's windows.
        rss_mb: returns the memory of the serving process in MB.
    """

    windows: Windows
    rss_mb: Callable[[], float]
    _secs: list[float] = field(default_factory=list)
    _first_rss_mb: float = 0.0

    def note(self, secs: float) -> None:
        """Record the time of the next chunk in seconds."""
        self._secs.append(secs)
        if len(self._secs) == self._lead + self._minute:
            self._first_rss_mb = self.rss_mb()

    def growth(self) -> Growth:
        """Return the growth over all recorded chunks."""
        first, last = self._secs[self._lead : self._lead + self._minute], self._secs[-self._minute :]
        return Growth(median(last) / median(first), self.rss_mb() / self._first_rss_mb)

    @property
    def _lead(self) -> int:
        return -(-self.windows.size // self.windows.chunk)

    @property
    def _minute(self) -> int:
        return 60 * RATE // self.windows.chunk


async def long_stream(target: Target, samples: Samples, windows: Windows) -> Growth:
    """Measure a long stream without the gateway; a chunk is sent when the one before is answered."""
    client, meter = GrpcClient(target.endpoint), Meter({"triton": target.pid or 0})
    watch = Watch(windows, lambda: meter.rss_mb()[DECODER])
    began = time.perf_counter()
    async for _ in client.chunks(samples, windows):
        watch.note(time.perf_counter() - began)
        began = time.perf_counter()
    await client.close()
    return watch.growth()


class Memory(NamedTuple):
    """Memory of the gateway and the decoder in MB."""

    gateway: float
    decoder: float


async def memory_a_stream(samples: Samples, streams: int, repository: Path = MODEL_REPOSITORY) -> Memory:
    """Return the memory per open stream after it has sent its audio.

    The servers are started for this measurement, and serve one stream before it.

    Args:
        samples: audio of every stream.
        streams: number of open streams.
        repository: the model repository.
    """
    variables = {"max_concurrent_streams": streams + 1, "inference_timeout_secs": 60}
    async with (
        triton_server(None, repository) as target,
        amira("serve", triton_endpoint=target.endpoint, **variables) as gateway,
    ):
        meter = Meter({"triton": target.pid or 0, "gateway": gateway.pid})
        await _with_open_streams(gateway.url, target, samples, 1, meter)
        before = meter.rss_mb()
        after = await _with_open_streams(gateway.url, target, samples, streams, meter)
    return Memory(*((after[name] - before[name]) / streams for name in ("gateway", DECODER)))


async def _with_open_streams(url: str, target: Target, samples: Samples, streams: int, meter: Meter) -> Mapping[str, float]:
    """Return the memory of the servers in MB while `streams` streams are open."""
    address = f"{url.replace('http', 'ws', 1)}{PATH}"
    async with contextlib.AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(connect(address, compression=None)) for _ in range(streams)]
        for frame in cut(samples, FRAME_SAMPLES):
            await asyncio.gather(*(socket.send(frame.tobytes()) for socket in sockets))
        await _settled(target)
        await asyncio.sleep(TRIM_SECS + SETTLE_SECS)  # until the gateway has returned freed memory
        return meter.rss_mb()


async def _settled(target: Target) -> None:
    """Wait until the decoder's counter of encoded windows no longer changes."""
    before: object = None
    while (now := (await read_counters(target.metrics_url))["asr_decoder_windows_total", DECODER]) != before:
        before = now
        await asyncio.sleep(SETTLE_SECS)


async def start_secs(times: int) -> float:
    """Return the median time from ``amira run`` to ready in seconds."""
    return median([await _start_secs() for _ in range(times)])


async def _start_secs() -> float:
    ports: Sequence[int] = free_ports(LOOPBACK, 2)
    variables = dict(zip(("triton_grpc_port", "triton_metrics_port"), ports, strict=True))
    began = time.perf_counter()
    async with amira("run", **variables):
        return time.perf_counter() - began
