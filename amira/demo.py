"""Demonstrate the server: transcribe recordings as files, and live as streams."""

from __future__ import annotations

import asyncio
import time

from rich.console import Console
from rich.live import Live
from rich.text import Text

from amira.client.live import LiveStream
from amira.client.rest import AsyncClient
from amira.client.types import RequestError, StreamError
from gateway.audio import RATE
from gateway.audio.files import decode_audio

FRAME_SAMPLES = 1600
SPEED = 4.0
"""Speed of streams as a multiple of real time; above 1 to shorten the demonstration."""

MAX_SECS = 3600
"""Maximum length of a recording, in seconds; the server has its own limits."""

console = Console()


async def show(url: str, model: str, name: str, body: bytes, api_key: str | None) -> None:
    """Transcribe a recording as a file and as a stream; print text, time and real-time factor.

    Args:
        url: base URL of the server.
        model: public name of the model.
        name: name of the recording.
        body: the recording.
        api_key: API key, if the server requires one.
    """
    samples = decode_audio(body, "application/octet-stream", max_secs=MAX_SECS)
    console.print(f"\n[bold]{name}[/bold]  {len(samples) / RATE:.2f} s")
    await _show_recording(AsyncClient(url, api_key=api_key, retry_secs=0), model, body, len(samples) / RATE)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    stream = LiveStream(f"{url.replace('http', 'ws', 1)}/v2/decode/stream/{model}", headers=headers)
    await _show_stream(stream, samples.tobytes())


async def _show_recording(client: AsyncClient, model: str, body: bytes, secs: float) -> None:
    began = time.perf_counter()
    try:
        async with client:
            text = (await client.transcribe(body, model=model)).text
    except RequestError as error:
        text = str(error)
    took = time.perf_counter() - began
    console.print(f"  batch   {text}\n          [dim]{took:.3f} s, real-time factor {took / secs:.3f}[/dim]")


async def _show_stream(stream: LiveStream, pcm: bytes) -> None:
    began = time.perf_counter()
    first_words = ended = 0.0
    text = ""

    async def play() -> None:
        nonlocal ended
        step = 2 * FRAME_SAMPLES
        for start in range(0, len(pcm), step):
            await asyncio.sleep(began + start / 2 / RATE / SPEED - time.perf_counter())
            await stream.send(pcm[start : start + step])
        ended = time.perf_counter()
        await stream.finish()

    async with stream:
        player = asyncio.create_task(play())
        try:
            with Live(console=console, auto_refresh=False, transient=True) as screen:
                async for message in stream:
                    text, stable = message.text, message.stable_chars
                    first_words = first_words or (time.perf_counter() - began) * SPEED
                    screen.update(Text("  stream  ").append(text[:stable]).append(text[stable:], style="dim"), refresh=True)
            final = time.perf_counter() - ended
        except StreamError as error:
            console.print(f"  stream  {error}")
            return
        finally:
            await asyncio.gather(player, return_exceptions=True)  # it fails with the stream
    console.print(
        f"  stream  {text}\n"
        f"          [dim]played at {SPEED:g} times real time; first words after {first_words:.2f} s of audio, "
        f"final {final * 1000:.0f} ms after the end[/dim]"
    )
