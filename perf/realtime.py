"""Measure the CPU time of a gateway with realtime sessions and with native streams, before a stand-in for Triton.

    python -m perf.realtime [--sessions N] [--secs S]

Each session sends 100 ms of a bundled recording every 100 ms. Native streams send 16 kHz, realtime sessions 24 kHz in base64.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson
import soxr
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from amira.paths import SPEECH
from gateway.audio import RATE
from perf.alone import standin_running
from perf.processes import Meter
from perf.server import amira
from perf.speech import Samples, cut, join, read_speech

PIECE_SECS = 0.1
OPENAI_RATE = 24_000


def native_frames(samples: Samples) -> list[bytes]:
    """Return the frames of a native stream."""
    return [piece.tobytes() for piece in cut(samples, round(RATE * PIECE_SECS))]


def realtime_frames(samples: Samples) -> list[bytes]:
    """Return the events of a realtime session."""
    resampled = np.asarray(soxr.resample(samples, RATE, OPENAI_RATE), np.int16)
    audio = [b64encode(piece.tobytes()).decode() for piece in cut(resampled, round(OPENAI_RATE * PIECE_SECS))]
    return [orjson.dumps({"type": "input_audio_buffer.append", "audio": piece}) for piece in audio]


async def talk(url: str, first: str | None, frames: Sequence[bytes], wait_secs: float) -> None:
    """Send frames in real time, and read the messages."""

    async def read() -> None:
        with contextlib.suppress(ConnectionClosed):
            async for _ in socket:
                pass

    async with connect(url, compression=None, max_size=None, ping_interval=None) as socket:
        reader = asyncio.create_task(read())
        if first:
            await socket.send(first)
        due = time.monotonic() + wait_secs
        for frame in frames:
            due += PIECE_SECS
            await asyncio.sleep(due - time.monotonic())
            await socket.send(frame if first is None else frame.decode())
        reader.cancel()


async def measure(path: str, first: str | None, frames: Sequence[bytes], sessions: int) -> float:
    """Return the CPU time of the gateway in milliseconds per second and session."""
    room: dict[str, Any] = {"max_concurrent_streams": sessions, "max_connects_per_address": 100_000}
    async with standin_running(0) as standin, amira("serve", triton_endpoint=standin.url, **room) as gateway:
        url = gateway.url.replace("http", "ws", 1) + path
        meter = Meter({"gateway": gateway.pid})
        meter.start()
        await asyncio.gather(*(talk(url, first, frames, PIECE_SECS * i / sessions) for i in range(sessions)))
        used_secs = meter.stop().cpu_secs["gateway"]
        return used_secs / sessions / (len(frames) * PIECE_SECS) * 1000


def cases(samples: Samples) -> Iterator[tuple[str, str, str | None, list[bytes]]]:
    """Return name, path, first event and frames of each case."""
    yield "native", "/v2/decode/stream/amira", None, native_frames(samples)
    yield "native, events=speech", "/v2/decode/stream/amira?events=speech", None, native_frames(samples)
    for detection in (None, {"type": "server_vad"}):
        session = {"type": "transcription", "audio": {"input": {"turn_detection": detection}}}
        first = orjson.dumps({"type": "session.update", "session": session}).decode()
        yield f"realtime, {detection['type'] if detection else 'none'}", "/v1/realtime", first, realtime_frames(samples)


def main() -> None:
    """Parse the command line, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=200, help="at the same time")
    parser.add_argument("--secs", type=float, default=20.0, help="length of each")
    arguments = parser.parse_args()
    samples = join(read_speech(SPEECH), arguments.secs)
    print("| session | CPU of the gateway, ms per second of a session |\n|---|---|")
    for name, path, first, frames in cases(samples):
        print(f"| {name} | {asyncio.run(measure(path, first, frames, arguments.sessions)):.1f} |", flush=True)


if __name__ == "__main__":
    main()
