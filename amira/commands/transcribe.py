"""``amira transcribe``: transcribe recordings on a running server."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from amira.client import exchange
from amira.client.exchange import DEFAULT_BASE_URL, DEFAULT_MODEL
from amira.client.rest import AsyncClient
from amira.client.types import RequestError, Segment
from amira.client.upload import Audio
from amira.commands.ending import FAILURE, START_A_SERVER, fail, warn
from amira.commands.options import ApiKey, Model, Url

RETRY_SECS = 10.0
"""Time in which the command retries, in seconds; short, since a person waits."""

TIMEOUT_SECS = 3600.0
"""Timeout of the transcript of a recording of hours, in seconds."""

STDIN = Path("-")


class Format(str, Enum):
    """Formats of a transcript."""

    text = "text"
    json = "json"
    verbose_json = "verbose_json"
    srt = "srt"
    vtt = "vtt"


SUFFIXES: Mapping[exchange.Format, str] = {
    "text": ".txt",
    "json": ".json",
    "verbose_json": ".json",
    "srt": ".srt",
    "vtt": ".vtt",
}
SUBTITLES = ("srt", "vtt")


@dataclass(frozen=True)
class Job:
    """Arguments of the command.

    Attributes:
        recordings: the files; ``-`` is standard input.
        format: format of the transcripts.
        directory: directory of the transcripts; None: standard output.
        model: public name of the model.
        stream: whether segments are printed as they come.
    """

    recordings: Sequence[Path]
    format: exchange.Format
    directory: Path | None
    model: str
    stream: bool

    def target(self, recording: Path) -> Path | None:
        """Return the file for a recording's transcript; None: standard output."""
        name = "stdin" if recording == STDIN else recording.stem
        return self.directory / f"{name}{SUFFIXES[self.format]}" if self.directory else None


def transcribe(
    recordings: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE",
            help="Recordings in any format that the server decodes, or raw PCM (16 bit, 16 kHz, mono); - for standard input.",
            show_default=False,
        ),
    ],
    format: Annotated[Format, typer.Option(help="Format of the transcripts.")] = Format.text,  # noqa: A002 (names the option)
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Directory for a file per transcript, named after its recording; default: standard output.",
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    url: Url = DEFAULT_BASE_URL,
    api_key: ApiKey = None,
    model: Model = DEFAULT_MODEL,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Recordings sent at once.")] = 4,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes; only with --format text.")] = False,
) -> None:
    """Transcribe recordings on a running server.

    Transcripts are printed in the order of the recordings. The exit code is 1 if any recording failed; the others are
    transcribed nevertheless.
    """
    job = Job(recordings, format.value, output_dir, model, stream)
    _check(job)
    try:
        if output_dir:
            output_dir.mkdir(parents=True, exist_ok=True)
        # Read here, where Ctrl-C ends it.
        piped = sys.stdin.buffer.read() if STDIN in recordings else b""
    except OSError as error:
        fail(str(error))
    try:
        client = AsyncClient(url, api_key=api_key, retry_secs=RETRY_SECS, timeout_secs=TIMEOUT_SECS)
    except ValueError as error:
        fail(str(error))
    if not asyncio.run(_transcribe_all(client, job, piped, 1 if stream else jobs)):
        raise typer.Exit(FAILURE)


def _check(job: Job) -> None:
    """End the command if its arguments contradict each other."""
    for recording in job.recordings:
        if recording != STDIN and recording.is_dir():
            fail(f"{recording} is a directory; name its files: {recording / '*'}")
        if recording != STDIN and not recording.exists():
            fail(f"there is no file {recording}")
    if job.recordings.count(STDIN) > 1:
        fail("standard input (-) can be read only once")
    if job.stream and (job.format != "text" or job.directory):
        fail("--stream prints text as it is decoded; omit --format and --output-dir")
    if len(job.recordings) > 1 and job.format in SUBTITLES and not job.directory:
        fail(f"{job.format} of several recordings needs a file each; add --output-dir DIR")
    targets = [job.target(recording) for recording in job.recordings]
    for target in targets:
        if target and targets.count(target) > 1:
            fail(f"several recordings would be written to {target}; rename them, or transcribe them separately")


async def _transcribe_all(client: AsyncClient, job: Job, piped: bytes, at_once: int) -> bool:
    """Transcribe the recordings, of which ``piped`` came from standard input; return whether all succeeded."""
    places = asyncio.Semaphore(at_once)
    outcomes = []
    async with client:
        with _progress(job) as progress:

            async def transcribe_one(recording: Path) -> str:
                async with places:
                    audio = io.BytesIO(piped) if recording == STDIN else recording
                    return await _transcribe(client, job, recording.name, audio, progress)

            tasks = [asyncio.create_task(transcribe_one(recording)) for recording in job.recordings]
            try:
                for recording, task in zip(job.recordings, tasks, strict=True):
                    outcomes.append(await _report(job, recording, task))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    return all(outcomes)


async def _transcribe(client: AsyncClient, job: Job, name: str, audio: Audio, progress: Progress) -> str:
    """Return a recording's transcript in the job's format; nothing of what was printed as it came."""
    shown = progress.add_task(name, total=None)

    def show(sent: int, size: int) -> None:
        progress.update(shown, completed=sent, total=size)

    def print_segment(segment: Segment) -> None:
        typer.echo(segment.text)

    try:
        if job.stream:
            await client.transcribe(audio, model=job.model, on_segment=print_segment, on_progress=show)
            return ""
        return await client.transcribe(audio, model=job.model, format=job.format, on_progress=show)
    finally:
        progress.remove_task(shown)


async def _report(job: Job, recording: Path, task: asyncio.Task[str]) -> bool:
    """Print or write a recording's transcript, or why there is none; return whether there is one."""
    target = job.target(recording)
    try:
        text = await task
        if target:
            target.write_text(text, encoding="utf-8")
    except (RequestError, OSError) as error:
        if isinstance(error, RequestError) and error.code == "unreachable":
            fail(f"{error}\namira: {START_A_SERVER}", FAILURE)
        warn(f"{recording}: {error}" if len(job.recordings) > 1 else str(error))
        return False
    if not target:
        typer.echo(text, nl=bool(text) and not text.endswith("\n"))
    return True


@contextmanager
def _progress(job: Job) -> Iterator[Progress]:
    """Show the progress of each upload, on a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=job.stream or not console.is_terminal) as progress:
        yield progress
