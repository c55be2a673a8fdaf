"""Clients of a running server, and its metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import httpx
import numpy as np
import numpy.typing as npt
import orjson
from prometheus_client.parser import text_string_to_metric_families
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from amira.ports import Ports
from tests.support.repositories import REPORTED_SECS

MetricSamples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

END = b"\x00"
KEEPALIVE = b"\x01"


class Conversation(NamedTuple):
    """Messages of one socket until the server closed it."""

    messages: list[dict[str, Any]]
    close_code: int | None

    @property
    def final(self) -> dict[str, Any]:
        finals = [message for message in self.messages if message["type"] == "final"]
        assert len(finals) == 1, self.messages
        assert self.messages[-1] is finals[0], "something came after the final"
        return finals[0]

    @property
    def error(self) -> dict[str, Any]:
        last = self.messages[-1]
        assert last["type"] == "error", self.messages
        assert last["close_code"] == self.close_code
        error: dict[str, Any] = last["error"]
        return error


def open_socket(url: str, **options: Any) -> connect:
    return connect(url, compression=None, max_size=None, **options)


async def listen(socket: ClientConnection) -> Conversation:
    """Collect messages until the server closes the socket."""
    messages = []
    try:
        while True:
            messages.append(orjson.loads(await socket.recv()))
    except ConnectionClosed:
        return Conversation(messages, socket.close_code)


async def converse(url: str, frames: Iterable[bytes | str], pause_secs: float = 0.0, **options: Any) -> Conversation:
    """Send frames, and collect messages until the server closes the socket."""
    async with open_socket(url, **options) as socket:
        listener = asyncio.create_task(listen(socket))
        try:
            for frame in frames:
                await socket.send(frame)
                await asyncio.sleep(pause_secs)
        except ConnectionClosed:
            pass  # the server closed early; its messages have the reason
        return await listener


def cut(samples: npt.NDArray[np.int16], sizes: int | Sequence[int]) -> list[bytes]:
    """Cut samples into frames of these sizes; the last size repeats."""
    frames, start, turn = [], 0, 0
    while start < len(samples):
        size = sizes if isinstance(sizes, int) else sizes[min(turn, len(sizes) - 1)]
        frames.append(samples[start : start + size].tobytes())
        start, turn = start + size, turn + 1
    return frames


async def transcribe(
    url: str, samples: npt.NDArray[np.int16], frame_samples: int | Sequence[int] = 1600, **options: Any
) -> Conversation:
    """Stream a recording as fast as the server reads it, without a ping timeout, since pings wait behind the audio."""
    return await converse(url, [*cut(samples, frame_samples), END], ping_timeout=None, **options)


async def decoder_metric(ports: Ports, name: str, settle_secs: float = REPORTED_SECS) -> float:
    """Return a metric's sum over its labels, from Triton's metrics port.

    Args:
        ports: of the Triton.
        name: of the metric.
        settle_secs: pause before, in which the decoder reports what it did until now.
    """
    await asyncio.sleep(settle_secs)
    async with httpx.AsyncClient() as client:
        page = (await client.get(f"http://{ports.host}:{ports.metrics}/metrics")).text
    return sum(
        sample.value for family in text_string_to_metric_families(page) for sample in family.samples if sample.name == name
    )


async def gateway_metrics(url: str) -> MetricSamples:
    """Return every sample of the gateway's metrics, by name and labels."""
    async with httpx.AsyncClient() as client:
        page = (await client.get(f"{url}/metrics")).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def growth(before: MetricSamples, after: MetricSamples) -> Callable[..., float]:
    """Return a function of a metric's name and labels that returns its growth between two reads."""

    def grown(name: str, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return after[key] - before[key]

    return grown
