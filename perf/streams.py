"""Play live streams in real time over WebSockets, and search for the largest number that a server sustains.

A stream sends its frames at the times at which a microphone would. The latency of a chunk is the time from the due time of its
last sample to the first message that covers the chunk; it includes the right context. A chunk that does not change the text
gets no message, so the same audio is decoded beforehand to find the chunks that do.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple

import orjson
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from gateway.audio import RATE
from gateway.triton.geometry import Windows
from perf.clients import GrpcClient
from perf.server import PerfError
from perf.speech import Samples

FRAME_SAMPLES = 1600
END = b"\x00"
PATH = "/v2/decode/stream/amira"
PATIENCE_SECS = 3.0
"""Timeout for the last messages of a stream; a missing message counts as arriving at that time."""

CONNECT_LEAD_SECS = 0.2


class Script(NamedTuple):
    """Audio of a stream, and the indices of the chunks that change the text."""

    samples: Samples
    chunks: Sequence[int]

    def cut(self, size: int, windows: Windows) -> Script:
        """Return the first `size` samples of the script."""
        complete = windows.complete(size)
        return Script(self.samples[:size], [chunk for chunk in self.chunks if chunk < complete])


class Message(NamedTuple):
    """Arrival of a message, in seconds of ``time.perf_counter``, and the audio that it covers."""

    arrived: float
    processed_ms: int


class Partial(NamedTuple):
    """Times until a chunk's text arrived, in seconds.

    Attributes:
        latency: time since the chunk's last sample was due.
        added: time since the frame was sent that completed the chunk's window: the time of the server alone.
    """

    latency: float
    added: float


async def rehearse(client: GrpcClient, samples: Samples, windows: Windows, latency: str = "balanced") -> Script:
    """Decode audio chunk by chunk without the gateway, and return a script with the chunks that change the text."""
    changing, chunk = [], 0
    final_text = text = ""
    async for answer in client.chunks(samples, windows, latency=latency):
        before, text = text, final_text + answer.as_numpy("TEXT")[0, 0].decode()
        if answer.as_numpy("SEGMENT")[0, 1]:
            final_text = text
        if text.lstrip() != before.lstrip():
            changing.append(chunk)
        chunk += 1
    return Script(samples, changing)


async def play(
    url: str, scripts: Sequence[Script], windows: Windows, lead_secs: float, latency: str = "balanced"
) -> list[Partial]:
    """Play one stream per script, at random phases of a chunk, and wait for the finals.

    Args:
        url: URL of the gateway.
        scripts: one per stream; they may repeat.
        windows: geometry of the recogniser's windows.
        lead_secs: length of the audio at the start whose chunks do not count.
        latency: the latency that has these windows.

    Returns:
        Partials of all counted chunks that change the text.

    Raises:
        PerfError: a stream was refused, or ended with an error.
    """
    phases = random.Random(len(scripts))  # noqa: S311 (the same phases in every run)
    address = f"{url.replace('http', 'ws', 1)}{PATH}?latency={latency}"
    try:
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(_without_collections())
            sockets = [await stack.enter_async_context(_open(address)) for _ in scripts]
            start = time.perf_counter() + CONNECT_LEAD_SECS
            played = await asyncio.gather(
                *(
                    _play(socket, script, windows, lead_secs, start + phases.random() * windows.chunk / RATE)
                    for socket, script in zip(sockets, scripts, strict=True)
                )
            )
    except (OSError, WebSocketException) as error:
        raise PerfError(f"one of {len(scripts)} streams was refused or cut off: {error}") from None
    return [partial for partials in played for partial in partials]


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Disable garbage collection, which takes up to 90 ms, while arrivals are timed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _open(address: str) -> connect:
    return connect(address, compression=None, max_size=None, ping_interval=None, close_timeout=1)


async def _play(socket: ClientConnection, script: Script, windows: Windows, lead_secs: float, start: float) -> list[Partial]:
    messages: list[Message] = []
    listener = asyncio.create_task(_listen(socket, messages))
    audio = script.samples.tobytes()
    sent_at = []
    for i, offset in enumerate(range(0, len(audio), 2 * FRAME_SAMPLES)):
        await asyncio.sleep(_due(start, i) - time.perf_counter())
        sent_at.append(time.perf_counter())
        await socket.send(audio[offset : offset + 2 * FRAME_SAMPLES])
    await socket.send(END)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(listener, PATIENCE_SECS)
    return timings(script, windows, lead_secs, start, sent_at, messages, gave_up=time.perf_counter())


def timings(
    script: Script,
    windows: Windows,
    lead_secs: float,
    start: float,
    sent_at: Sequence[float],
    messages: Sequence[Message],
    gave_up: float,
) -> list[Partial]:
    """Return the times of a stream's chunks.

    Args:
        script: audio and chunks of the stream.
        windows: geometry of the recogniser's windows.
        lead_secs: length of the audio at the start whose chunks do not count.
        start: start of the stream; all times are in seconds of one clock.
        sent_at: time at which each frame was sent.
        messages: messages in order of arrival.
        gave_up: arrival time of missing messages.
    """
    partials = []
    for chunk in script.chunks:
        covered = (chunk + 1) * windows.chunk
        if covered - windows.chunk >= lead_secs * RATE:
            arrived = next((at for at, processed_ms in messages if processed_ms >= covered * 1000 // RATE), gave_up)
            sent = sent_at[_frame_with(windows.chunk_due(chunk))]
            partials.append(Partial(arrived - _due(start, _frame_with(covered)), arrived - sent))
    return partials


async def _listen(socket: ClientConnection, messages: list[Message]) -> None:
    """Collect messages until the final.

    Raises:
        PerfError: the server sent an error.
    """
    async for data in socket:
        message = orjson.loads(data)
        if message["type"] == "error":
            raise PerfError(f"a stream failed: {message['error']['message']}")
        messages.append(Message(time.perf_counter(), message["audio_processed_ms"]))


def _frame_with(samples: int) -> int:
    """Return the index of the frame that completes `samples` samples."""
    return (samples - 1) // FRAME_SAMPLES


def _due(start: float, frame: int) -> float:
    """Return the time at which a frame's last sample is due."""
    return start + (frame + 1) * FRAME_SAMPLES / RATE


async def most_held(holds: Callable[[int], Awaitable[bool]], start: int, precision: float) -> int:
    """Search for the largest number that holds, by doubling and bisection.

    Args:
        holds: whether a number holds; assumed to be monotonic.
        start: first number to try.
        precision: relative precision of the result.

    Returns:
        A number that held; 0 if 1 does not.
    """
    low, high = 0, start
    while await holds(high):
        low, high = high, 2 * high
    while high - low > max(1, precision * low):
        middle = (low + high) // 2
        if await holds(middle):
            low = middle
        else:
            high = middle
    return low
