"""``amira transcribe``: recordings on a running server."""

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
from amira.commands.options import ApiKey, Language, Model, Url

RETRY_SECS = 10.0
"""Time in which the command tries again to reach a server, or one that is full: a person waits for it."""

TIMEOUT_SECS = 3600.0
"""Longest wait for the transcript of a recording of hours."""

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
    """What the command does.

    Attributes:
        recordings: the files; ``-`` is standard input.
        format: of the transcripts.
        directory: where they are written; None for standard output.
        model: public name of the model.
        language: of the speech; None: the model decides.
        stream: whether segments are printed as they come.
    """

    recordings: Sequence[Path]
    format: exchange.Format
    directory: Path | None
    model: str
    language: str | None
    stream: bool

    def target(self, recording: Path) -> Path | None:
        """Return the file of a recording's transcript; None for standard output."""
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
            help="Write each transcript to a file here, named after its recording; by default all are printed.",
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    url: Url = DEFAULT_BASE_URL,
    api_key: ApiKey = None,
    model: Model = DEFAULT_MODEL,
    language: Language = None,
    jobs: Annotated[int, typer.Option(min=1, max=64, help="Recordings sent at once.")] = 4,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes; only with --format text.")] = False,
) -> None:
    """Transcribe recordings on a running server.

    Transcripts are printed in the order of the recordings. The exit code is 1 if any recording failed; the others are
    transcribed all the same.
    """
    job = Job(recordings, format.value, output_dir, model, language, stream)
    _check(job)
    if output_dir:
        output_dir.mkdir(parents=True, exist_ok=True)
    try:
        client = AsyncClient(url, api_key=api_key, retry_secs=RETRY_SECS, timeout_secs=TIMEOUT_SECS)
    except ValueError as error:
        fail(str(error))
    if not asyncio.run(_transcribe_all(client, job, 1 if stream else jobs)):
        raise typer.Exit(FAILURE)


def _check(job: Job) -> None:
    """End the command if it asks for what can't be."""
    for recording in job.recordings:
        if recording != STDIN and not recording.is_file():
            fail(f"there is no file {recording}")
    if job.stream and (job.format != "text" or job.directory):
        fail("--stream prints text as it comes; leave out --format and --output-dir")
    if len(job.recordings) > 1 and job.format in SUBTITLES and not job.directory:
        fail(f"several recordings as {job.format} would be one file; add --output-dir DIR")
    targets = [job.target(recording) for recording in job.recordings]
    for target in targets:
        if target and targets.count(target) > 1:
            fail(f"several recordings would be written to {target}; rename them, or transcribe them apart")


async def _transcribe_all(client: AsyncClient, job: Job, at_once: int) -> bool:
    """Transcribe the recordings; return whether all succeeded."""
    places = asyncio.Semaphore(at_once)
    outcomes = []
    async with client:
        with _progress(job) as progress:

            async def transcribe_one(recording: Path) -> str:
                async with places:
                    return await _transcribe(client, job, recording, progress)

            tasks = [asyncio.create_task(transcribe_one(recording)) for recording in job.recordings]
            try:
                for recording, task in zip(job.recordings, tasks, strict=True):
                    outcomes.append(await _report(job, recording, task))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
    return all(outcomes)


async def _transcribe(client: AsyncClient, job: Job, recording: Path, progress: Progress) -> str:
    """Return a recording's transcript in the job's format; nothing of what was printed as it came."""
    audio: Audio = io.BytesIO(sys.stdin.buffer.read()) if recording == STDIN else recording
    shown = progress.add_task(recording.name, total=None)

    def show(sent: int, size: int) -> None:
        progress.update(shown, completed=sent, total=size)

    def print_segment(segment: Segment) -> None:
        typer.echo(segment.text)

    try:
        if job.stream:
            await client.transcribe(audio, model=job.model, language=job.language, on_segment=print_segment, on_progress=show)
            return ""
        return await client.transcribe(audio, model=job.model, language=job.language, format=job.format, on_progress=show)
    finally:
        progress.remove_task(shown)


async def _report(job: Job, recording: Path, task: asyncio.Task[str]) -> bool:
    """Print or write a recording's transcript, or why there is none; return whether there is one."""
    try:
        text = await task
        if target := job.target(recording):
            target.write_text(text, encoding="utf-8")
        else:
            typer.echo(text, nl=bool(text) and not text.endswith("\n"))
    except RequestError as error:
        if error.code == "unreachable":
            fail(f"{error}\namira: {START_A_SERVER}", FAILURE)
        reason = str(error)
    except OSError as error:
        reason = str(error)
    else:
        return True
    warn(f"{recording}: {reason}" if len(job.recordings) > 1 else reason)
    return False


@contextmanager
def _progress(job: Job) -> Iterator[Progress]:
    """Show how much of each recording is sent, on a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=job.stream or not console.is_terminal) as progress:
        yield progress
