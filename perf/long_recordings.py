"""Measure long recordings: time, memory and error rate, and what live streams notice of eight of them.

    python -m perf.long_recordings SPEECH_DIR [--hours H] [--streams N] [--results DIR]

1. The recordings of the directory, labelled by its ``manifest.tsv``, are sent one by one.
2. They are joined to an hour, as FLAC, MP3 and M4A, and to four hours, as FLAC. Each file is sent by one ``curl`` while the
   resident memory of every process is read once per second. Its word error rate is compared with that of the first step.
3. Ten live streams are played alone, and then beside eight uploads of the hour.

The results are ``perf/results/long.json`` and the plot ``docs/long-recordings.png``. All of it takes about half an hour on two
cores.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import jiwer
import numpy as np
import orjson
import soundfile
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from amira.paths import MODEL_REPOSITORY, ROOT
from gateway.audio import RATE
from gateway.triton.geometry import Windows, read_windows
from perf.clients import PATH, GrpcClient
from perf.evaluate import batch
from perf.labelled import Recording, normalise, read_speech
from perf.load import percentiles_ms
from perf.plots import draw_memory
from perf.processes import Meter
from perf.recogniser import parameters
from perf.server import PerfError, amira, cpu_model, triton_server
from perf.speech import Samples
from perf.streams import Script, play, rehearse

REPORT, PICTURE = "long.json", "long-recordings.png"
FORMATS = ("flac", "mp3", "m4a")
LONGEST, LONGEST_FORMAT = 4, "flac"
"""Length of the longest recording relative to the others, and its format."""

AT_ONCE = 8
STREAM_SECS = 30.0
ALONE_AT_ONCE = 2
LINE_BYTES = 2**26
"""Maximum length of a line of an answer; the last one has all tokens."""

PATIENT = {"inference_timeout_secs": 60}
"""Settings of the gateway: a machine with other work should not end an hour's measurement."""

Advance = Callable[[float], None]
"""Called with the seconds of a recording that are transcribed."""


class Trace(NamedTuple):
    """Memory over time.

    Attributes:
        secs: time since the start.
        rss_mb: resident memory by process, a value for each time.
    """

    secs: list[float]
    rss_mb: dict[str, list[float]]


class Transcript(NamedTuple):
    """Answer to a recording."""

    text: str
    segments: int


class Joined(NamedTuple):
    """Recordings that are joined to a long one.

    Attributes:
        samples: 16 kHz audio [n].
        text: what is said.
    """

    samples: Samples
    text: str

    @property
    def secs(self) -> float:
        """Length in seconds."""
        return len(self.samples) / RATE


def join(recordings: Sequence[Recording], secs: float) -> Joined:
    """Return whole recordings of at least ``secs`` seconds, joined; they repeat if they are too short."""
    chosen: list[Recording] = []
    samples = 0
    for recording in itertools.cycle(recordings):
        if samples >= secs * RATE:
            break
        chosen.append(recording)
        samples += len(recording.samples)
    return Joined(np.concatenate([one.samples for one in chosen]), " ".join(one.text for one in chosen))


def write(path: Path, samples: Samples) -> None:
    """Write samples in the format of the file name's suffix."""
    if path.suffix != ".m4a":
        soundfile.write(path, samples, RATE)
        return
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=RATE, layout="mono")
        for at in range(0, len(samples), RATE):
            frame = av.AudioFrame.from_ndarray(samples[None, at : at + RATE], format="s16", layout="mono")
            frame.sample_rate = RATE
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


async def curl(url: str, path: Path, advance: Advance) -> Transcript:
    """Send a file by ``curl``, which reads it from disk, and return the transcript.

    Raises:
        PerfError: the answer is an error, or is incomplete.
    """
    command = ("curl", "-sSN", "-X", "POST", "-H", "Content-Type: application/octet-stream", "-T", str(path))
    process = await asyncio.create_subprocess_exec(
        *command, f"{url}{PATH}?format=ndjson", stdout=asyncio.subprocess.PIPE, limit=LINE_BYTES
    )
    assert process.stdout  # noqa: S101 (a pipe)
    segments, text = 0, None
    async for line in process.stdout:
        part: dict[str, Any] = orjson.loads(line)
        if "error" in part:
            raise PerfError(f"{path.name}: {part['error']['message']}")
        if part["type"] == "segment":
            segments += 1
            advance(part["end"])
        else:
            text = part["text"]
    code = await process.wait()
    if text is None:
        raise PerfError(f"{path.name}: the answer ends after {segments} segments; curl ended with exit code {code}")
    return Transcript(text, segments)


async def traced(work: Awaitable[Transcript], meter: Meter) -> tuple[Transcript, float, Trace]:
    """Return the result of work, the seconds it took, and the memory of the servers meanwhile."""
    began, secs, rss_mb = time.perf_counter(), list[float](), defaultdict[str, list[float]](list)
    task = asyncio.ensure_future(work)
    while not task.done():
        secs.append(time.perf_counter() - began)
        now = meter.rss_mb()
        for name in now.keys() | rss_mb.keys():
            rss_mb[name] += [0.0] * (len(secs) - 1 - len(rss_mb[name])) + [now.get(name, 0.0)]
        await asyncio.wait({task}, timeout=1)
    return await task, time.perf_counter() - began, Trace(secs, dict(rss_mb))


async def texts_alone(url: str, recordings: Sequence[Recording], advance: Advance) -> list[str]:
    """Return the transcripts of the recordings, sent one by one."""
    places, done = asyncio.Semaphore(ALONE_AT_ONCE), itertools.count(1)

    async def one(recording: Recording) -> str:
        async with places:
            text = normalise(await batch(url, "amira", recording))
        advance(next(done))
        return text

    return await asyncio.gather(*map(one, recordings))


async def beside(
    url: str, path: Path, scripts: Sequence[Script], windows: Windows, advance: Callable[[int, float], None]
) -> dict[str, float]:
    """Return p95 of partials in milliseconds before and while recordings are decoded, and how long these took, in seconds.

    Args:
        url: of the gateway.
        path: of the recording, which is sent ``AT_ONCE`` times.
        scripts: one per stream.
        windows: geometry of the recogniser's windows.
        advance: called with the number of an upload, and the seconds of it that are transcribed.
    """
    lead_secs = windows.size / RATE
    before = await play(url, scripts, windows, lead_secs)
    began = time.perf_counter()
    posts = asyncio.gather(*(curl(url, path, partial(advance, number)) for number in range(AT_ONCE)))
    during = []
    while not posts.done():
        during += await play(url, scripts, windows, lead_secs)
    await posts
    return {
        "streams": len(scripts),
        "recordings": AT_ONCE,
        "before_p95_ms": percentiles_ms([partial.latency for partial in before])[1],
        "during_p95_ms": percentiles_ms([partial.latency for partial in during])[1],
        "secs": round(time.perf_counter() - began, 1),
    }


class Measurement:
    """One run.

    Args:
        url: of the gateway.
        meter: of the servers.
        progress: shows what is done.
        folder: for the files.

    Attributes:
        files: results by format.
        traces: memory over time by format.
    """

    def __init__(self, url: str, meter: Meter, progress: Progress, folder: Path) -> None:
        self._url = url
        self._meter = meter
        self._progress = progress
        self._folder = folder
        self.files: dict[str, Mapping[str, Any]] = {}
        self.traces: dict[str, Mapping[str, Any]] = {}

    async def alone(self, recordings: Sequence[Recording]) -> float:
        """Return the word error rate of recordings that are sent one by one, in percent."""
        advance = self._step(f"{len(recordings)} recordings one by one", len(recordings))
        texts = await texts_alone(self._url, recordings, advance)
        return round(100 * jiwer.wer([one.text for one in recordings], texts), 2)

    async def send(self, name: str, joined: Joined, suffix: str) -> Path:
        """Write and send a recording, and return its path."""
        path = self._folder / f"{name.replace(' ', '-')}.{suffix}"
        written = self._step(f"writing {name}", 1)
        await asyncio.to_thread(write, path, joined.samples)
        written(1)
        advance = self._step(f"decoding {name}", joined.secs)
        transcript, secs, trace = await traced(curl(self._url, path, advance), self._meter)
        advance(joined.secs)
        self.traces[name] = trace._asdict()
        self.files[name] = {
            "mb": round(path.stat().st_size / 1e6, 1),
            "secs": round(secs, 1),
            "audio_secs": round(joined.secs, 1),
            "audio_secs_per_sec": round(joined.secs / secs, 1),
            "segments": transcript.segments,
            "wer": round(100 * jiwer.wer(joined.text, normalise(transcript.text)), 2),
            "first_rss_mb": {process: round(values[len(values) // 10]) for process, values in trace.rss_mb.items()},
            "peak_rss_mb": {process: round(max(values)) for process, values in trace.rss_mb.items()},
        }
        self._progress.console.print(f"{name}: {orjson.dumps(self.files[name]).decode()}", soft_wrap=True)
        return path

    async def beside(self, path: Path, joined: Joined, scripts: Sequence[Script], windows: Windows) -> dict[str, float]:
        """Return what streams notice of recordings beside them; see ``beside``."""
        advance = self._step(f"{len(scripts)} streams beside {AT_ONCE} recordings", AT_ONCE * joined.secs)
        done = [0.0] * AT_ONCE

        def advance_one(number: int, secs: float) -> None:
            done[number] = secs
            advance(sum(done))

        return await beside(self._url, path, scripts, windows, advance_one)

    def _step(self, name: str, total: float) -> Advance:
        """Show a step, and return what moves it on."""
        task = self._progress.add_task(name, total=total)
        return lambda done: self._progress.update(task, completed=done)


async def measure(directory: Path, hours: float, streams: int, results: Path, pictures: Path) -> None:
    """Measure, print, and write the results and the plot."""
    recordings = read_speech(directory)
    windows = read_windows(parameters(MODEL_REPOSITORY))["balanced"]
    report: dict[str, Any] = {
        "cpu": cpu_model(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hours": hours,
    }
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
    async with triton_server(None) as target, amira("serve", triton_endpoint=target.endpoint, **PATIENT) as gateway:
        meter = Meter({"triton": target.pid or 0, "gateway": gateway.pid})
        with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=Console(stderr=True)) as progress:
            run = Measurement(gateway.url, meter, progress, Path(folder))
            report["alone_wer"] = await run.alone(recordings)
            joined = join(recordings, hours * 3600)
            paths = {kind: await run.send(f"{hours:g} h {kind}", joined, kind) for kind in FORMATS}
            longest = hours * LONGEST
            await run.send(f"{longest:g} h {LONGEST_FORMAT}", join(recordings, longest * 3600), LONGEST_FORMAT)
            if streams:
                client = GrpcClient(target.endpoint)
                script = await rehearse(client, joined.samples[: round(STREAM_SECS * RATE)], windows)
                await client.close()
                report["beside"] = await run.beside(paths["mp3"], joined, [script] * streams, windows)
    report["files"] = run.files
    for path in (results, pictures):
        path.mkdir(parents=True, exist_ok=True)
    (results / REPORT).write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    draw_memory(run.traces, report, pictures / PICTURE)
    print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="recordings and their manifest.tsv")
    parser.add_argument("--hours", type=float, default=1.0, help=f"length of the joined recording; the longest has {LONGEST} ×")
    parser.add_argument("--streams", type=int, default=10, help="live streams beside eight recordings; 0: none")
    parser.add_argument("--results", type=Path, help="directory for the results and the plot, instead of the repository's")
    arguments = parser.parse_args()
    results, pictures = arguments.results or ROOT / "perf" / "results", arguments.results or ROOT / "docs"
    try:
        asyncio.run(measure(arguments.directory, arguments.hours, arguments.streams, results, pictures))
    except PerfError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
