"""Live streams paced in real time over WebSockets, and the search for how many a server holds.

A stream sends its frames when they would come from a microphone. The latency of a chunk is the time from when its last sample
was due to be sent to the first message that covers it, so it includes the right context that the chunk waits for. A chunk that
does not change the text gets no message; a trial of the same audio beforehand tells which chunks do.
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
"""How long a stream's last messages are waited for; what has not come by then counts as coming then."""

CONNECT_LEAD_SECS = 0.2


class Script(NamedTuple):
    """What a stream sends, and which of its chunks change the text."""

    samples: Samples
    chunks: Sequence[int]

    def cut(self, size: int, windows: Windows) -> Script:
        """The beginning of it, in samples."""
        complete = windows.complete(size)
        return Script(self.samples[:size], [chunk for chunk in self.chunks if chunk < complete])


class Message(NamedTuple):
    """When a message came, in seconds of ``time.perf_counter``, and how much audio it covers."""

    arrived: float
    processed_ms: int


class Partial(NamedTuple):
    """The time that a chunk's text took, in seconds.

    Attributes:
        latency: since its last sample was due.
        added: since the frame was sent that completed its window; what is left is the server's doing.
    """

    latency: float
    added: float


async def rehearse(client: GrpcClient, samples: Samples, windows: Windows) -> Script:
    """Send audio chunk by chunk straight to Triton, and see which chunks change the text."""
    changing, chunk = [], 0
    final_text = text = ""
    async for answer in client.chunks(samples, windows):
        before, text = text, final_text + answer.as_numpy("TEXT")[0, 0].decode()
        if answer.as_numpy("SEGMENT")[0, 1]:
            final_text = text
        if text.lstrip() != before.lstrip():
            changing.append(chunk)
        chunk += 1
    return Script(samples, changing)


async def play(url: str, scripts: Sequence[Script], windows: Windows, lead_secs: float) -> list[Partial]:
    """Play a stream for each script, at random phases of a chunk, and wait for their finals.

    Args:
        url: the gateway's.
        scripts: one for each stream; they may repeat.
        windows: of the recogniser.
        lead_secs: audio at the beginning whose chunks are not counted.

    Returns:
        The partials of all counted chunks that change the text.

    Raises:
        PerfError: a stream was refused, or ended by an error.
    """
    phases = random.Random(len(scripts))  # noqa: S311 (the same for every run)
    address = f"{url.replace('http', 'ws', 1)}{PATH}"
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
    """Look for no garbage, for up to 90 ms, while arrivals are timed."""
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
    """What a stream's messages say of its chunks' times.

    Args:
        script: what was sent.
        windows: of the recogniser.
        lead_secs: audio at the beginning whose chunks are not counted.
        start: when the stream began; this and all times in seconds of one clock.
        sent_at: when each frame was sent.
        messages: what came, in order.
        gave_up: when nothing more was waited for.
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
    """Note what comes until the final.

    Raises:
        PerfError: an error came instead.
    """
    async for data in socket:
        message = orjson.loads(data)
        if message["type"] == "error":
            raise PerfError(f"a stream failed: {message['error']['message']}")
        messages.append(Message(time.perf_counter(), message["audio_processed_ms"]))


def _frame_with(samples: int) -> int:
    """Index of the frame with the last of so many samples."""
    return (samples - 1) // FRAME_SAMPLES


def _due(start: float, frame: int) -> float:
    """When a frame has been spoken."""
    return start + (frame + 1) * FRAME_SAMPLES / RATE


async def most_held(holds: Callable[[int], Awaitable[bool]], start: int, precision: float) -> int:
    """The largest number that holds, as far as doubling and bisecting find it.

    Args:
        holds: whether a number does; taken to be so for every smaller one.
        start: where to begin.
        precision: share of the result within which it is enough to know it.

    Returns:
        A number that held; 0 if not even 1 does.
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
