"""Measure word error rates on labelled speech: whole recordings over REST, and the same as live streams over WebSocket.

    python -m perf.evaluate DIR [--url URL] [--repository DIR] [--model NAME]

DIR has recordings and a tab-separated ``manifest.tsv`` with the columns file and text, and set or source for rates by origin.
Without a URL, a server is started on free ports. Texts are compared in lower case without punctuation.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import re
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import jiwer
import numpy as np
import numpy.typing as npt
import orjson
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from websockets.asyncio.client import connect

from amira.client.exchange import DEFAULT_MODEL
from amira.engine.errors import EngineError
from amira.engine.service import service
from amira.models.configs import ModelError
from amira.paths import MODEL_REPOSITORY
from amira.ports import LOOPBACK, PortError, Ports, free_ports
from gateway.audio import RATE
from gateway.audio.files import decode_audio
from gateway.config.settings import Settings
from gateway.logs import configure_logging
from perf.recogniser import choose

FRAME_SAMPLES = 3200
CONCURRENCY = 4


class Recording(NamedTuple):
    """A labelled recording.

    Attributes:
        name: name of the file.
        body: bytes of the file.
        samples: 16 kHz audio [n].
        text: normalised transcript.
        set: its set or source.
    """

    name: str
    body: bytes
    samples: npt.NDArray[np.int16]
    text: str
    set: str


def read_speech(directory: Path) -> list[Recording]:
    """Read the labelled recordings of a directory with a manifest."""
    recordings = []
    with (directory / "manifest.tsv").open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines, delimiter="\t"):
            body = (directory / row["file"]).read_bytes()
            samples = decode_audio(body, "application/octet-stream", max_secs=3600)
            origin = row.get("set") or row.get("source") or directory.name
            recordings.append(Recording(row["file"], body, samples, normalise(row["text"]), origin))
    return recordings


def normalise(text: str) -> str:
    """Return a text in lower case, with words and apostrophes only."""
    return " ".join(re.sub(r"[^\w' ]", " ", text.lower()).split())


async def batch(url: str, model: str, recording: Recording) -> str:
    """Return the transcript of a recording sent in one request."""
    async with httpx.AsyncClient(timeout=60) as client:
        answer = await client.post(
            f"{url}/v2/decode/batch/{model}", content=recording.body, headers={"Content-Type": "application/octet-stream"}
        )
        text: str = answer.raise_for_status().json()["text"]
        return text


async def stream(url: str, model: str, recording: Recording) -> str:
    """Return the transcript of a recording sent as a stream, as fast as the server accepts it."""
    async with connect(f"{url.replace('http', 'ws', 1)}/v2/decode/stream/{model}", compression=None) as socket:
        for start in range(0, len(recording.samples), FRAME_SAMPLES):
            await socket.send(recording.samples[start : start + FRAME_SAMPLES].tobytes())
        await socket.send(b"\x00")
        async for data in socket:
            message = orjson.loads(data)
            if message["type"] == "final":
                return str(message["text"])
            if message["type"] == "error":
                raise RuntimeError(message["error"]["message"])
    raise ConnectionError(f"{recording.name}: the stream was closed without a final")


@contextlib.asynccontextmanager
async def server(url: str | None, repository: Path, model: str | None) -> AsyncIterator[tuple[str, str]]:
    """Yield the URL of the server to measure and the public name of its model; start a server unless there is a URL.

    Args:
        url: base URL of a running server; None: start one.
        repository: model repository of the server that is started.
        model: public name at the URL, or an ensemble of the repository; None: the default, or the only one.
    """
    if url:
        yield url, model or DEFAULT_MODEL
        return
    name = choose(repository, model).name
    gateway_port, *triton_ports = free_ports(LOOPBACK, 3)
    settings = Settings(server_host=LOOPBACK, server_port=gateway_port, log_level="warning", models={name: name})
    configure_logging(settings)
    async with service(settings, repository, Ports(LOOPBACK, *triton_ports), lambda *_: None) as (running, _):
        yield running.url, name


def rates(recordings: Sequence[Recording], texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Return word and character error rates in percent, for all recordings and, with several sets, for each set."""
    sets = sorted({recording.set for recording in recordings})
    chosen = {"all": sets, **({name: [name] for name in sets} if len(sets) > 1 else {})}
    found = {}
    for name, members in chosen.items():
        references = [recording.text for recording in recordings if recording.set in members]
        hypotheses = [text for recording, text in zip(recordings, texts, strict=True) if recording.set in members]
        found[name] = 100 * jiwer.wer(references, hypotheses), 100 * jiwer.cer(references, hypotheses)
    return found


async def evaluate(directory: Path, url: str | None, repository: Path, model: str | None) -> None:
    """Measure the error rates, and print a table."""
    recordings = read_speech(directory)
    seconds = sum(len(recording.samples) for recording in recordings) / RATE
    console = Console()
    table = Table(title=f"{len(recordings)} recordings, {seconds:.0f} s of {directory}")
    for column in ("", "set", "word error rate %", "character error rate %", "audio seconds per second"):
        table.add_column(column, justify="left" if column in ("", "set") else "right")
    places = asyncio.Semaphore(CONCURRENCY)
    texts: dict[str, list[str]] = {}
    async with server(url, repository, model) as (address, name):
        with Progress(console=console, transient=True) as progress:
            for way, transcribe in (("batch", batch), ("stream", stream)):
                task = progress.add_task(way, total=len(recordings))

                async def one(recording: Recording) -> str:
                    async with places:
                        text = await transcribe(address, name, recording)  # noqa: B023 (awaited within this turn)
                    progress.advance(task)  # noqa: B023
                    return normalise(text)

                began = time.perf_counter()
                texts[way] = list(await asyncio.gather(*map(one, recordings)))
                speed = seconds / (time.perf_counter() - began)
                for origin, (wer, cer) in rates(recordings, texts[way]).items():
                    table.add_row(way, origin, f"{wer:.1f}", f"{cer:.1f}", f"{speed:.0f}" if origin == "all" else "")
    console.print(table)
    difference = 100 * jiwer.wer(texts["batch"], texts["stream"])
    console.print(f"stream against batch as the reference: {difference:.1f} % of the words differ")


def main() -> None:
    """Parse the command line, and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="directory of recordings with a manifest.tsv")
    parser.add_argument("--url", help="base URL of a running server")
    parser.add_argument(
        "--repository", type=Path, default=MODEL_REPOSITORY, help="model repository of the server that is started"
    )
    parser.add_argument(
        "--model", help="public name at the URL, or an ensemble of the repository; optional if there is only one"
    )
    arguments = parser.parse_args()
    try:
        asyncio.run(evaluate(arguments.directory, arguments.url, arguments.repository.resolve(), arguments.model))
    except (ModelError, EngineError, PortError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
