"""What ``amira demo`` shows: recordings transcribed in one piece, and live while they play."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import httpx
import numpy as np
import numpy.typing as npt
import orjson
from pydantic import SecretStr
from rich.console import Console
from rich.live import Live
from rich.text import Text
from websockets.asyncio.client import connect

from gateway.audio import RATE
from gateway.audio.files import decode_audio

FRAME_SAMPLES = 1600
SPEED = 4.0
"""Streams play this many times faster than real time, so that the demonstration is short."""

console = Console()


async def show(url: str, model: str, name: str, body: bytes, api_keys: Sequence[SecretStr]) -> None:
    """Transcribe one recording both ways and print text, time and real-time factor."""
    samples = decode_audio(body, "application/octet-stream", max_secs=3600)
    seconds = len(samples) / RATE
    headers = {"Authorization": f"Bearer {api_keys[0].get_secret_value()}"} if api_keys else {}
    console.print(f"\n[bold]{name}[/bold]  {seconds:.2f} s")

    began = time.perf_counter()
    async with httpx.AsyncClient(timeout=60) as client:
        answer = await client.post(
            f"{url}/v2/decode/batch/{model}", content=body, headers={**headers, "Content-Type": "application/octet-stream"}
        )
    took = time.perf_counter() - began
    text = answer.json()["text"] if answer.is_success else answer.json()["error"]["message"]
    console.print(f"  batch   {text}\n          [dim]{took:.3f} s, real-time factor {took / seconds:.3f}[/dim]")

    with Live(console=console, auto_refresh=False, transient=True) as screen:
        first, final, text = await _stream(url, model, samples, headers, screen)
    console.print(
        f"  stream  {text}\n          [dim]played at {SPEED:g} times real time; first words after {first:.2f} s of audio, "
        f"final {final * 1000:.0f} ms after the end[/dim]"
    )


async def _stream(
    url: str, model: str, samples: npt.NDArray[np.int16], headers: dict[str, str], screen: Live
) -> tuple[float, float, str]:
    """Seconds of audio played when the first words came, seconds from the end to the final, and the final text."""
    address = f"{url.replace('http', 'ws', 1)}/v2/decode/stream/{model}"
    async with connect(address, additional_headers=headers, compression=None) as socket:
        began = time.perf_counter()
        ended = 0.0

        async def play() -> None:
            nonlocal ended
            for start in range(0, len(samples), FRAME_SAMPLES):
                await asyncio.sleep(max(0.0, began + start / RATE / SPEED - time.perf_counter()))
                await socket.send(samples[start : start + FRAME_SAMPLES].tobytes())
            await socket.send(b"\x00")
            ended = time.perf_counter()

        player = asyncio.create_task(play())
        first = 0.0
        async for data in socket:
            message = orjson.loads(data)
            if message["type"] == "error":
                return first, 0.0, message["error"]["message"]
            first = first or (time.perf_counter() - began) * SPEED
            if message["type"] == "final":
                await player
                return first, time.perf_counter() - ended, message["text"]
            stable = message["stable_chars"]
            shown = Text("  stream  ").append(message["text"][:stable]).append(message["text"][stable:], style="dim")
            screen.update(shown, refresh=True)
    raise ConnectionError("the stream was closed without a final")
