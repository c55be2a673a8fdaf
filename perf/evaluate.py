"""Measure word error rates on labelled speech: whole recordings over REST, and the same as live streams over WebSocket.

    python -m perf.evaluate DIR [--url URL] [--repository DIR] [--model NAME]
    python -m perf.evaluate DIR --sweep [--phrases FILE] [--beam N]
    python -m perf.evaluate DIR --phrases FILE [--beam N]

DIR has recordings and a tab-separated ``manifest.tsv`` with the columns file and text, and set or source for rates by origin.
Without a URL, a server is started on free ports. Texts are compared in lower case without punctuation. ``--sweep`` and
``--phrases`` decode recordings in this process; see ``perf/sweep.py`` and ``perf/boosting.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import jiwer
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
from gateway.config.settings import Settings
from gateway.logs import configure_logging
from perf import boosting
from perf.labelled import Recording, normalise, read_speech
from perf.recogniser import choose
from perf.server import PerfError
from perf.sweep import Decoding, sweep, to_markdown

FRAME_SAMPLES = 3200
CONCURRENCY = 4
SWEPT_PHRASES = 100
"""Number of phrases of each recording of a sweep."""


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


def evaluate_in_process(arguments: argparse.Namespace, console: Console) -> None:
    """Search parameters or measure phrases on recordings that this process decodes, and print a page in Markdown."""
    recogniser = choose(arguments.repository, arguments.model)
    longest = float(recogniser.parameters["max_whole_secs"]) * RATE
    everything = read_speech(arguments.directory)
    recordings = [recording for recording in everything if len(recording.samples) <= longest]
    if left := len(everything) - len(recordings):
        console.print(f"left out {left} recordings that are longer than max_whole_secs")
    if not recordings:
        raise PerfError(f"{arguments.directory} has no recordings of up to {longest / RATE:g} s")
    phrases = boosting.read_phrases(arguments.phrases) if arguments.phrases else []
    decoding = Decoding(recogniser, recordings, arguments.beam, phrases=bool(phrases))
    if arguments.sweep:
        lists = boosting.choose_lists(recordings, phrases, SWEPT_PHRASES, said=True)
        result = sweep(decoding, lambda recording: lists[recording.name], console)
        page = to_markdown(result, recordings, arguments.directory, recogniser.name)
    else:
        page = boosting.to_markdown(*boosting.prove(decoding, phrases, console), decoding, arguments.directory)
    if arguments.table:
        arguments.table.write_text(page, encoding="utf-8")
    print(page)


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
    parser.add_argument("--sweep", action="store_true", help="find the decoder's weights and bonuses, without a server")
    parser.add_argument("--phrases", type=Path, metavar="FILE", help="measure boosting; with --sweep, find its bonus, too")
    parser.add_argument(
        "--beam", type=int, choices=range(1, 17), metavar="N", help="width of the beam of --sweep and --phrases; 1: greedy"
    )
    parser.add_argument("--table", type=Path, metavar="FILE", help="also write the table of --sweep or --phrases here")
    arguments = parser.parse_args()
    arguments.repository = arguments.repository.resolve()
    try:
        if arguments.sweep or arguments.phrases:
            evaluate_in_process(arguments, Console(stderr=True))
        else:
            asyncio.run(evaluate(arguments.directory, arguments.url, arguments.repository, arguments.model))
    except (ModelError, EngineError, PortError, PerfError, OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
