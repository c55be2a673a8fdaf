"""``amira listen``: transcribe a microphone, or a file in real time, on a running server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
import wave
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from amira.client.exchange import DEFAULT_BASE_URL, DEFAULT_MODEL
from amira.client.live import Message
from amira.client.rest import AsyncClient
from amira.client.types import SAMPLE_RATE, StreamError
from amira.commands.ending import FAILURE, START_A_SERVER, fail
from amira.commands.options import ApiKey, Model, Url

FRAME_SECS = 0.1
"""Length of the pieces in which audio is recorded and sent."""

FRAME_SAMPLES = round(FRAME_SECS * SAMPLE_RATE)
BYTES_PER_SAMPLE = 2
RECONNECT_SECS = 10.0
"""Time in which the command tries to reach a server, in seconds; short, since a person waits."""


class Format(str, Enum):
    """Formats of the final transcript."""

    text = "text"
    json = "json"


def listen(
    device: Annotated[
        str | None, typer.Option(help="Microphone: number, or part of the name.", show_default="the system's")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="A WAV file (16 bit, 16 kHz, mono) to play in real time instead of the microphone.",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    format: Annotated[Format, typer.Option(help="Format of the transcript.")] = Format.text,  # noqa: A002 (names the option)
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File for the transcript; default: standard output.", show_default=False),
    ] = None,
    url: Url = DEFAULT_BASE_URL,
    api_key: ApiKey = None,
    model: Model = DEFAULT_MODEL,
) -> None:
    """Transcribe the microphone until Ctrl-C.

    On a terminal the text is shown while it is decoded: final text plain, text that may still change dim. Ctrl-C ends the
    audio, and the complete transcript follows. The microphone needs: pip install 'amira-asr[mic]'.
    """
    if output:
        _check_writable(output)
    microphone = _open_file(file) if file else _open_microphone(device)
    try:
        client = AsyncClient(url, api_key=api_key)
    except ValueError as error:
        fail(str(error))
    try:
        final = asyncio.run(_listen(client, microphone, model))
    except StreamError as error:
        advice = f"\namira: {START_A_SERVER}" if error.code == "unreachable" else ""
        fail(f"{error}{advice}", FAILURE)
    text = f"{final.text}\n" if format is Format.text else f"{json.dumps(asdict(final), ensure_ascii=False)}\n"
    if output:
        try:
            output.write_text(text, encoding="utf-8")
        except OSError as error:
            typer.echo(text, nl=False)  # nobody says it again
            fail(str(error), FAILURE)
    else:
        typer.echo(text, nl=False)


def _check_writable(path: Path) -> None:
    """End the command if a file can't be written; after the recording it would be too late."""
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        fail(str(error))


async def _listen(client: AsyncClient, microphone: AsyncIterator[bytes], model: str) -> Message:
    """Stream the microphone until Ctrl-C or its end, and show the transcript; return the final.

    Raises:
        StreamError: the stream failed.
    """
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError):  # on Windows, where Ctrl-C ends the command at once
        loop.add_signal_handler(signal.SIGINT, stopped.set)
    async with client, client.live(model=model, reconnect_secs=RECONNECT_SECS) as stream:
        showing = asyncio.create_task(_show(stream))
        try:
            async for audio in microphone:
                if stopped.is_set():
                    break
                await stream.send(audio)
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(signal.SIGINT)  # a second Ctrl-C does not wait for the final
            final = await stream.finish()
        finally:
            await asyncio.gather(showing, return_exceptions=True)  # it ends with the stream
    return final


async def _show(messages: AsyncIterable[Message]) -> None:
    """Show the transcript while it is decoded, on a terminal."""
    console = Console(stderr=True)
    with Live(console=console, auto_refresh=False, transient=True) as screen:
        async for message in messages:
            if console.is_terminal:
                screen.update(_layout(message, console.width * (console.height - 1)), refresh=True)


def _layout(message: Message, room: int) -> Text:
    """Return the end of a transcript, at most ``room`` characters: final text plain, the rest dim."""
    start = max(0, len(message.text) - room)
    settled = max(start, message.stable_chars)
    return Text(message.text[start:settled]).append(message.text[settled:], style="dim")


async def _play(recording: wave.Wave_read) -> AsyncIterator[bytes]:
    """Yield a file's audio in real time."""
    with recording:
        began, played = time.monotonic(), 0
        while audio := recording.readframes(FRAME_SAMPLES):
            played += len(audio) // BYTES_PER_SAMPLE
            await asyncio.sleep(began + played / SAMPLE_RATE - time.monotonic())
            yield audio


def _open_file(path: Path) -> AsyncIterator[bytes]:
    """Return the audio of a file; end the command if its format is not supported."""
    try:
        recording = wave.open(str(path))  # noqa: SIM115 (closed at its end)
    except (wave.Error, EOFError) as error:
        fail(
            f"{path} is not a WAV file: {error}; convert it: ffmpeg -i {path} -ar {SAMPLE_RATE} -ac 1 -c:a pcm_s16le speech.wav"
        )
    found = (recording.getsampwidth(), recording.getframerate(), recording.getnchannels())
    if found != (BYTES_PER_SAMPLE, SAMPLE_RATE, 1):
        fail(
            f"{path} has {8 * found[0]} bits, {found[1]} Hz and {found[2]} channel(s), not 16 bits, {SAMPLE_RATE} Hz and one; "
            f"convert it: ffmpeg -i {path} -ar {SAMPLE_RATE} -ac 1 -c:a pcm_s16le speech.wav"
        )
    return _play(recording)


def _open_microphone(device: str | None) -> AsyncIterator[bytes]:
    """Return the audio of a microphone; end the command if something is missing for it."""
    try:
        import sounddevice  # type: ignore[import-untyped]  # noqa: PLC0415 (an extra)
    except ImportError:
        fail("sounddevice is not installed; the microphone needs pip install 'amira-asr[mic]', or play a file: --file FILE.wav")
    except OSError:
        fail(
            "the library PortAudio is not installed; on Debian and Ubuntu: apt install libportaudio2, on macOS: brew install "
            "portaudio, or play a file: --file FILE.wav"
        )
    chosen: int | str | None = int(device) if device and device.isdecimal() else device
    try:
        sounddevice.check_input_settings(chosen, channels=1, dtype="int16", samplerate=SAMPLE_RATE)
    except (sounddevice.PortAudioError, ValueError) as error:
        fail(f"no microphone: {error}; python -m sounddevice lists the devices, --device chooses one")
    return _record(sounddevice, chosen)


async def _record(sounddevice: Any, device: int | str | None) -> AsyncIterator[bytes]:
    """Yield the microphone's audio endlessly."""
    loop, pieces = asyncio.get_running_loop(), asyncio.Queue[bytes]()

    def take(audio: Any, *_: object) -> None:
        loop.call_soon_threadsafe(pieces.put_nowait, bytes(audio))

    with sounddevice.RawInputStream(
        samplerate=SAMPLE_RATE, blocksize=FRAME_SAMPLES, device=device, channels=1, dtype="int16", callback=take
    ):
        while True:
            yield await pieces.get()
