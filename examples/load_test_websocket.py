"""Load a server with live streams: python examples/load_test_websocket.py [RECORDING] --streams 50 --plot load.html.

Each stream plays the recording at the pace of a microphone, and the streams begin spread over the first seconds. Printed are
percentiles of two latencies: how long after a word was spoken a message has it for good (lag), and how long after the end of
the audio the final comes. The recording is a WAV file with 16 kHz, one channel and 16 bits. This needs the package websockets.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
import wave
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

END_OF_STREAM = b"\x00"
FRAME_SECS = 0.1
BYTES_PER_SEC = 2 * 16_000
PERCENTILES = (50, 90, 95, 99, 100)


@dataclass
class Outcome:
    """What came of one stream: latencies in seconds, and the error that ended it, if one did."""

    lags: list[float] = field(default_factory=list)
    final: float | None = None
    error: str = ""


async def run_stream(url: str, audio: bytes, headers: dict[str, str], delay_secs: float) -> Outcome:
    """Play the audio once."""
    outcome = Outcome()
    await asyncio.sleep(delay_secs)
    try:
        async with connect(url, additional_headers=headers, compression=None, max_size=None) as socket:
            began = time.monotonic()
            player = asyncio.create_task(play(audio, socket, began))
            try:
                await read(socket, outcome, began)
            finally:
                player.cancel()
    except (OSError, WebSocketException) as error:
        outcome.error = outcome.error or str(error)
    if outcome.final is None:
        outcome.error = outcome.error or "closed without a final"
    else:
        outcome.final -= len(audio) / BYTES_PER_SEC
    return outcome


async def play(audio: bytes, socket: ClientConnection, began: float) -> None:
    """Send each frame when a microphone would have recorded it."""
    step = int(FRAME_SECS * BYTES_PER_SEC)
    for end in range(step, len(audio) + step, step):
        await asyncio.sleep(began + min(end, len(audio)) / BYTES_PER_SEC - time.monotonic())
        await socket.send(audio[end - step : end])
    await socket.send(END_OF_STREAM)


async def read(socket: ClientConnection, outcome: Outcome, began: float) -> None:
    """Take the messages to the last one, with their times since the stream's start."""
    async for text in socket:
        message, came = json.loads(text), time.monotonic() - began
        if message["type"] == "partial":
            outcome.lags.append(came - message["audio_processed_ms"] / 1000)
        elif message["type"] == "final":
            outcome.final = came
        elif message["type"] == "error":
            outcome.error = message["error"]["code"]


def percentiles(values: Sequence[float]) -> list[float]:
    """Return the percentiles of ``PERCENTILES``, by the nearest rank."""
    ordered = sorted(values)
    return [ordered[max(0, -(-len(ordered) * percent // 100) - 1)] for percent in PERCENTILES]


def curve(values: Sequence[float], longest: float, colour: str) -> str:
    """Return the cumulative distribution as a line of SVG, in a box of 600 by 300."""
    ordered = sorted(values)
    points = (f"{600 * value / longest:.1f},{300 - 300 * rank / len(ordered):.1f}" for rank, value in enumerate(ordered, 1))
    return f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="0,300 {" ".join(points)}"/>'


def plot(latencies: dict[str, list[float]], title: str) -> str:
    """Return a page with the cumulative distributions."""
    longest = max(max(values) for values in latencies.values())
    colours = dict(zip(latencies, ("#4c78a8", "#f58518"), strict=True))
    curves = "".join(curve(values, longest, colours[name]) for name, values in latencies.items())
    ticks = "".join(
        f'<text x="{x}" y="320" text-anchor="middle">{longest * x / 600:.2f} s</text>'
        f'<text x="-8" y="{304 - x / 2}" text-anchor="end">{x // 6} %</text>'
        for x in range(0, 601, 150)
    )
    legend = "".join(f'<span style="color:{colour}">&#9632; {name}</span> ' for name, colour in colours.items())
    return (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title><h1>{title}</h1>'
        f"<p>Share of messages by latency. {legend}</p>"
        f'<svg viewBox="-60 -20 720 360" width="720" font-family="sans-serif" font-size="12">'
        f'<rect width="600" height="300" fill="none" stroke="#ccc"/>{curves}{ticks}</svg>'
    )


async def main(options: argparse.Namespace) -> int:
    """Run the streams and print what came of them; return the exit code."""
    with wave.open(options.recording) as file:
        audio = file.readframes(file.getnframes())
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    delays = [random.uniform(0, options.spread) for _ in range(options.streams)]  # noqa: S311
    outcomes = await asyncio.gather(*(run_stream(options.url, audio, headers, delay) for delay in delays))
    latencies = {
        "lag": [lag for outcome in outcomes for lag in outcome.lags],
        "final": [outcome.final for outcome in outcomes if outcome.final is not None],
    }
    errors = Counter(outcome.error for outcome in outcomes if outcome.error)
    print(f"{len(latencies['final'])} of {options.streams} streams of {len(audio) / BYTES_PER_SEC:.1f} s had a final")
    for error, count in errors.most_common():
        print(f"{count} failed: {error}")
    print("ms     " + "".join(f"{'p' + str(percent) if percent < 100 else 'max':>7}" for percent in PERCENTILES))  # noqa: PLR2004
    for name, values in latencies.items():
        if values:
            print(f"{name:7}" + "".join(f"{1000 * value:7.0f}" for value in percentiles(values)))
    if options.plot and all(latencies.values()):
        options.plot.write_text(plot(latencies, f"{options.streams} live streams"), encoding="utf-8")
    return 1 if errors else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", nargs="?", default="speech.wav", help="WAV file (default: speech.wav)")
    parser.add_argument("--url", default="ws://localhost:8057/v2/decode/stream/amira", help="stream to load")
    parser.add_argument("--streams", type=int, default=10, help="number of streams (default: 10)")
    parser.add_argument("--spread", type=float, default=2.0, help="seconds over which they begin (default: 2)")
    parser.add_argument("--api-key", help="key, where the server needs one")
    parser.add_argument("--plot", type=Path, help="HTML file for the distribution of the latencies")
    sys.exit(asyncio.run(main(parser.parse_args())))
