"""Long recordings: time, memory and error rate of an hour sent by curl, and what live streams notice of eight of them.

    python -m perf.long_recordings SPEECH_DIR [--hours H] [--streams N]

The recordings of the directory, labelled by its ``manifest.tsv``, are joined to the length, as FLAC, MP3 and M4A. Each file is
sent by one ``curl`` while the resident memory of every process is read once per second. The word error rate of the whole is
compared with that of the recordings sent one by one. Then eight of the files are sent at once beside live streams.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import av
import jiwer
import orjson
import soundfile

from amira.paths import MODEL_REPOSITORY, ROOT
from gateway.audio import RATE
from gateway.triton.geometry import Windows, read_windows
from perf.clients import PATH, GrpcClient
from perf.evaluate import Recording, batch, normalise, read_speech
from perf.load import percentiles_ms
from perf.plots import draw_memory
from perf.processes import Meter
from perf.recogniser import parameters
from perf.server import PerfError, amira, cpu_model, triton_server
from perf.speech import Samples, join
from perf.streams import Script, play, rehearse

RESULT = ROOT / "perf" / "results" / "long.json"
PICTURE = ROOT / "docs" / "long-recordings.png"
FORMATS = ("flac", "mp3", "m4a")
AT_ONCE = 8
STREAM_SECS = 30.0
ALONE_AT_ONCE = 2
PATIENT = {"inference_timeout_secs": 60}
"""Settings of the gateway: a machine that does other things too should not end an hour's measurement."""


class Trace(NamedTuple):
    """Memory over time.

    Attributes:
        secs: since the start.
        rss_mb: resident memory by process, a value for each time.
    """

    secs: list[float]
    rss_mb: dict[str, list[float]]


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


async def curl(url: str, path: Path) -> dict[str, Any]:
    """Send a file, without holding it in memory, and return the answer.

    Raises:
        PerfError: it is an error.
    """
    command = ("curl", "-sS", "-X", "POST", "-H", "Content-Type: application/octet-stream", "-T", str(path), f"{url}{PATH}")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    answer: dict[str, Any] = orjson.loads(output)
    if "error" in answer:
        raise PerfError(f"{path.name}: {answer['error']['message']}")
    return answer


async def traced(work: Awaitable[Any], meter: Meter) -> tuple[Any, float, Trace]:
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


async def texts_alone(url: str, recordings: Sequence[Recording]) -> list[str]:
    """Return the transcripts of the recordings, sent one by one."""
    places = asyncio.Semaphore(ALONE_AT_ONCE)

    async def one(recording: Recording) -> str:
        async with places:
            return normalise(await batch(url, "amira", recording))

    return await asyncio.gather(*map(one, recordings))


async def beside(url: str, path: Path, scripts: Sequence[Script], windows: Windows) -> dict[str, float]:
    """Return p95 of partials in milliseconds before and while recordings are decoded, and how long these took, in seconds."""
    before = await play(url, scripts, windows, windows.size / RATE)
    began = time.perf_counter()
    posts = asyncio.gather(*(curl(url, path) for _ in range(AT_ONCE)))
    during = []
    while not posts.done():
        during += await play(url, scripts, windows, windows.size / RATE)
    await posts
    return {
        "before_p95_ms": percentiles_ms([partial.latency for partial in before])[1],
        "during_p95_ms": percentiles_ms([partial.latency for partial in during])[1],
        "secs": round(time.perf_counter() - began, 1),
    }


async def measure(directory: Path, hours: float, streams: int) -> None:
    """Measure, print, and write the results and the picture."""
    recordings = read_speech(directory)
    samples = join([recording.samples for recording in recordings], hours * 3600)
    spoken = itertools.cycle(recordings)
    said = [next(spoken)]
    while sum(len(recording.samples) for recording in said) < len(samples):
        said.append(next(spoken))
    reference = " ".join(recording.text for recording in said)
    windows = read_windows(parameters(MODEL_REPOSITORY))["balanced"]
    report: dict[str, Any] = {
        "cpu": cpu_model(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hours": hours,
        "files": {},
    }
    traces = {}
    async with triton_server(None) as target, amira("serve", triton_endpoint=target.endpoint, **PATIENT) as gateway:
        meter = Meter({"triton": target.pid or 0, "gateway": gateway.pid})
        alone = await texts_alone(gateway.url, recordings)
        report["alone_wer"] = round(100 * jiwer.wer([one.text for one in recordings], alone), 2)
        with tempfile.TemporaryDirectory() as folder:
            for kind in FORMATS:
                path = Path(folder, f"joined.{kind}")
                write(path, samples)
                answer, secs, traces[kind] = await traced(curl(gateway.url, path), meter)
                report["files"][kind] = {
                    "mb": round(path.stat().st_size / 1e6, 1),  # noqa: ASYNC240 (nothing else runs here)
                    "secs": round(secs, 1),
                    "audio_secs_per_sec": round(len(samples) / RATE / secs, 1),
                    "segments": len(answer["segments"]),
                    "wer": round(100 * jiwer.wer(reference, normalise(answer["text"])), 2),
                    "peak_rss_mb": {name: round(max(values)) for name, values in traces[kind].rss_mb.items()},
                }
                print(kind, orjson.dumps(report["files"][kind]).decode(), flush=True)
            if streams:
                client = GrpcClient(target.endpoint)
                script = await rehearse(client, samples[: round(STREAM_SECS * RATE)], windows)
                await client.close()
                report["beside"] = await beside(gateway.url, Path(folder, "joined.mp3"), [script] * streams, windows)
    RESULT.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
    draw_memory({kind: trace._asdict() for kind, trace in traces.items()}, report, PICTURE)
    print(orjson.dumps(report, option=orjson.OPT_INDENT_2).decode())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="recordings and their manifest.tsv")
    parser.add_argument("--hours", type=float, default=1.0, help="length of the joined recording")
    parser.add_argument("--streams", type=int, default=10, help="live streams beside eight recordings; 0: none")
    arguments = parser.parse_args()
    try:
        asyncio.run(measure(arguments.directory, arguments.hours, arguments.streams))
    except PerfError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
