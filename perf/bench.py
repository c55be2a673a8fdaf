"""The server against the floor, its peers and its goals: one run, the same graphs, the same recordings.

    python -m perf.bench [SPEECH_DIR] [--quick]

Contenders take turns at the same work, several times over; a figure is the median of its turns, and what counts are the ratios
within the run. The results go to ``perf/results/bench.md`` and ``bench.json``, the pictures to ``docs/``. perf/README.md says
what is measured, and how.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import uvloop
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

from gateway.audio import RATE
from gateway.logs import configure_logging
from gateway.settings import Settings
from launcher.engine import EngineError
from launcher.run import ENGINE_HOME, MODEL_REPOSITORY, ROOT, SPEECH
from perf import alone, endurance
from perf.analyze import FIXED_WINDOWS, RESULTS, STREAM, WARM_UP, WHOLE, command, measure, prepare_tool, run, write_inputs
from perf.clients import GrpcClient, RestClient
from perf.floor import Floor
from perf.load import Contender, Figure, Turn, alternate
from perf.peers import FRAME_SYNCHRONOUS, OnnxAsr, merged_repository
from perf.plots import draw
from perf.processes import Meter
from perf.recogniser import DECODER, Windows, parameters
from perf.report import Goal, Trial, to_markdown
from perf.server import PerfError, Process, Target, amira, cpu_model, read_counters, triton_server
from perf.speech import Samples, audio_secs, cut, join, read_speech, repeat
from perf.streams import Script, most_held, percentile_ms, play, rehearse

OURS_GRPC, OURS_REST, OURS_SOCKET, OURS_ANALYZED = "ours, gRPC", "ours, REST", "ours, WebSocket", "ours, perf_analyzer"
FLOORS = {"floor, 2 threads": (1, 2), "floor, 2 sessions": (2, 1)}
"""Sessions and threads of each."""

ONNX_ASR = "onnx-asr"
AT_ONCE = 8
SHORT_SECS, LONG_SECS = 10.0, 60.0
BATCH_SECS = 30.0
SLACK_MS = 300.0
"""A chunk may take this much longer than it and its right context last."""

ROOM = {"max_concurrent_streams": 2000, "max_concurrent_batches": 200, "max_batch_audio_length_secs": LONG_SECS}
SCRIPTS = 4
TIMEOUT = {"inference_timeout_secs": 60}


class Plan(NamedTuple):
    """How much of everything.

    Attributes:
        alternations: turns of each contender.
        turn_secs: audio of a turn at least.
        levels: further concurrencies of whole recordings.
        analyzed: concurrencies of perf_analyzer, for streams and for whole recordings.
        interval_ms: perf_analyzer's measurement interval.
        hold_secs, proof_secs: how long a number of paced streams is tried, and the largest that held is tried once more.
        precision: of the search for that number.
        crowds: numbers of streams for the gateway alone.
        long_secs: length of the long stream.
        idle_streams: open streams whose memory is measured.
        starts: how often the server is started.
    """

    alternations: int
    turn_secs: float
    levels: tuple[int, ...]
    analyzed: Mapping[str, tuple[int, ...]]
    interval_ms: int
    hold_secs: float
    proof_secs: float
    precision: float
    crowds: tuple[int, ...]
    long_secs: float
    idle_streams: int
    starts: int


FULL = Plan(
    alternations=5,
    turn_secs=300,
    levels=(1, 2, 4, 16, 32, 64),
    analyzed={STREAM.name: (1, 2, 4, 8, 16, 32, 64), WHOLE.name: (1, 2, 4, 8, 16, 32, 64)},
    interval_ms=2000,
    hold_secs=20,
    proof_secs=60,
    precision=0.05,
    crowds=(300, 600),
    long_secs=3600,
    idle_streams=64,
    starts=3,
)
QUICK = Plan(
    alternations=2,
    turn_secs=40,
    levels=(),
    analyzed={STREAM.name: (8,), WHOLE.name: (8,)},
    interval_ms=1000,
    hold_secs=4,
    proof_secs=4,
    precision=0.2,
    crowds=(300,),
    long_secs=240,
    idle_streams=16,
    starts=1,
)


@dataclass
class Bench:
    """What the stages share, and what they find."""

    plan: Plan
    recordings: Sequence[Samples]
    windows: Windows
    triton: Target
    gateway: Process
    grpc: GrpcClient
    rest: RestClient
    figures: list[Figure] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    floor_streams: float = 0.0

    @property
    def limit_ms(self) -> float:
        """What the p95 of partials' latency may be."""
        return (self.windows.chunk + self.windows.right) * 1000 / RATE + SLACK_MS

    def figure(self, contender: str, load: str, concurrency: int) -> Figure:
        """One that was measured before."""
        key = contender, load, concurrency
        return next(figure for figure in self.figures if figure[:3] == key)

    def floor(self, load: str) -> Figure:
        """The faster arrangement of the floor."""
        return max((f for f in self.figures if f.contender in FLOORS and f.load == load), key=lambda f: f.audio_secs_per_sec)

    def add(
        self, name: str, measured: float, must: float | None = None, aim: float | None = None, *, at_least: bool = False
    ) -> None:
        """Add a goal."""
        self.goals.append(Goal(name, round(measured, 3), must, aim, at_least))

    async def calls(self) -> float:
        """Calls of decoder_joint so far."""
        counters = await read_counters(self.triton.metrics_url)
        return counters["nv_inference_request_success_total", "decoder_joint"]

    def roots(self, gateway: bool) -> Mapping[str, int]:
        """The servers' processes."""
        roots = {"triton": self.triton.pid or 0}
        return {**roots, "gateway": self.gateway.pid} if gateway else roots

    def contender(self, name: str) -> Contender:
        """One of those that are served."""
        send = {
            OURS_GRPC: self.grpc.ours,
            FRAME_SYNCHRONOUS: self.grpc.frame_synchronous,
            OURS_REST: self.rest.transcribe,
        }[name]
        return Contender(name, send, self.roots(gateway=name == OURS_REST), self.calls)


async def whole_recordings(bench: Bench) -> None:
    """Everyone on whole recordings, on 60 s in one piece, and on 10 s."""
    plan, me = bench.plan, {"in-process": os.getpid()}
    peer = OnnxAsr(MODEL_REPOSITORY, parameters(MODEL_REPOSITORY))
    onnx_asr = Turn(Contender(ONNX_ASR, peer.transcribe, me, peer.count), 1)
    work = repeat(bench.recordings, plan.turn_secs)
    long, short = join(bench.recordings, LONG_SECS), join(bench.recordings, SHORT_SECS)
    await _check_tokens(bench, peer, [*bench.recordings, long, short])
    floors = {name: Floor(MODEL_REPOSITORY, *layout) for name, layout in FLOORS.items()}
    turns = [Turn(Contender(name, floor.encode, me), floor.sessions) for name, floor in floors.items()]
    turns += [onnx_asr, *(Turn(bench.contender(name), AT_ONCE) for name in (OURS_REST, OURS_GRPC, FRAME_SYNCHRONOUS))]
    bench.figures += await alternate(turns, work, plan.alternations, "whole")
    if plan.levels:
        turns = [Turn(bench.contender(name), level) for name in (OURS_REST, FRAME_SYNCHRONOUS) for level in plan.levels]
        bench.figures += await alternate(turns, work, 1, "whole")
    one_at_once = [onnx_asr, *(Turn(bench.contender(name), 1) for name in (OURS_REST, OURS_GRPC, FRAME_SYNCHRONOUS))]
    bench.figures += await alternate(one_at_once, [long], 2 * plan.alternations, "60 s")
    bench.figures += await alternate(one_at_once, [short] * 3, 2 * plan.alternations, "10 s")

    rest, peer_rate = bench.figure(OURS_REST, "whole", AT_ONCE), bench.figure(ONNX_ASR, "whole", 1).audio_secs_per_sec
    ours, frame_by_frame = (bench.figure(name, "whole", AT_ONCE) for name in (OURS_GRPC, FRAME_SYNCHRONOUS))
    floor_rate = bench.floor("whole").audio_secs_per_sec
    bench.add(
        "batch by REST, 8 at once: throughput over the floor's", rest.audio_secs_per_sec / floor_rate, 0.75, 0.9, at_least=True
    )
    bench.add("the same over onnx-asr's in-process", rest.audio_secs_per_sec / peer_rate, 1.3, 2.0, at_least=True)
    times = [bench.figure(name, "10 s", 1).p50_ms for name in (OURS_REST, ONNX_ASR)]
    bench.add("10 s by REST: time over onnx-asr's in-process", times[0] / times[1], 1.2, 1.0)
    cpu = [
        figure.cpu_secs_per_audio_sec[model] + figure.cpu_secs_per_audio_sec["decoder_joint"]
        for figure, model in ((frame_by_frame, FRAME_SYNCHRONOUS), (ours, DECODER))
    ]
    bench.add("frame-synchronous BLS: CPU time of decoding over ours", cpu[0] / cpu[1], 3.0, 6.0, at_least=True)
    rate = ours.audio_secs_per_sec / frame_by_frame.audio_secs_per_sec
    bench.add("batch by gRPC, 8 at once: throughput over the frame-synchronous BLS's", rate, 2.0, 3.5, at_least=True)


async def _check_tokens(bench: Bench, peer: OnnxAsr, recordings: Sequence[Samples]) -> None:
    """Hold the contenders' tokens against each other; warms everyone up, too.

    Raises:
        PerfError: they differ.
    """
    for i, samples in enumerate(recordings):
        tokens = await bench.grpc.ours(samples)
        for name, transcribe in (
            (ONNX_ASR, peer.transcribe),
            (FRAME_SYNCHRONOUS, bench.grpc.frame_synchronous),
            (OURS_REST, bench.rest.transcribe),
        ):
            if await transcribe(samples) != tokens:
                raise PerfError(f"recording {i}, {len(samples) / RATE:.2f} s: {name} and {OURS_GRPC} give different tokens")


async def decoder_calls(bench: Bench) -> None:
    """Calls of decoder_joint for each whole recording, against what blocks of frames should need."""
    given = parameters(MODEL_REPOSITORY)
    frame_samples, block_frames = int(given["frame_samples"]), int(given.get("block_frames", 32))
    shares = []
    for samples in bench.recordings:
        before = await bench.calls()
        tokens = len(await bench.grpc.ours(samples))
        blocks_crossed = len(samples) // frame_samples // block_frames
        shares.append((await bench.calls() - before) / (tokens + 1 + blocks_crossed))
    bench.add("decoder_joint calls of a window over tokens + 1 + blocks crossed, at most", max(shares), 1.0, 1.0)


async def floor_windows(bench: Bench) -> None:
    """What the floor takes for windows of streams; each gives a chunk."""
    windows = bench.windows
    audio = join(bench.recordings, LONG_SECS)
    starts = range(0, len(audio) - windows.size, windows.chunk)
    work = [audio[start : start + windows.size] for start in starts]
    floors = {name: Floor(MODEL_REPOSITORY, *layout) for name, layout in FLOORS.items()}
    turns = [Turn(Contender(name, floor.encode, {"in-process": os.getpid()}), floor.sessions) for name, floor in floors.items()]
    share = windows.chunk / windows.size
    for figure in await alternate(turns, work, bench.plan.alternations, "windows"):
        cpu = {name: round(secs / share, 5) for name, secs in figure.cpu_secs_per_audio_sec.items()}
        rate = round(figure.audio_secs_per_sec * share, 1)
        bench.figures.append(figure._replace(audio_secs_per_sec=rate, cpu_secs_per_audio_sec=cpu))
    bench.floor_streams = bench.floor("windows").audio_secs_per_sec


async def perf_analyzer(bench: Bench) -> None:
    """The ensemble under Triton's own load generator."""
    tool = prepare_tool(ENGINE_HOME / "perf_analyzer")
    write_inputs(bench.recordings)
    measurement = ("--measurement-interval", str(bench.plan.interval_ms), *FIXED_WINDOWS)
    for load in (STREAM, WHOLE):
        await run(tool, command(bench.triton, load, AT_ONCE, *WARM_UP))
        for concurrency in bench.plan.analyzed[load.name]:
            arguments = command(bench.triton, load, concurrency, *measurement)
            meter = Meter(bench.roots(gateway=False))
            before = await _received_secs(bench)
            meter.start()
            level = await measure(tool, bench.triton, load, concurrency, arguments)
            usage = meter.stop()
            seconds = await _received_secs(bench) - before
            bench.figures.append(
                Figure(
                    OURS_ANALYZED,
                    load.name,
                    concurrency,
                    level.audio_secs_per_sec,
                    level.p50_ms,
                    level.p95_ms,
                    level.p99_ms,
                    level.decoder_calls_per_audio_sec,
                    {name: round(secs / seconds, 5) for name, secs in usage.cpu_secs.items()},
                    round(sum(usage.peak_rss_mb.values())),
                )
            )


async def _received_secs(bench: Bench) -> float:
    counters = await read_counters(bench.triton.metrics_url)
    return counters["asr_decoder_audio_seconds_total", DECODER]


async def paced_streams(bench: Bench) -> None:
    """How many live streams are held, and how they fare while recordings are transcribed."""
    plan, windows = bench.plan, bench.windows
    lead_secs = windows.size / RATE  # until its window is full a stream costs less
    longest = lead_secs + max(plan.hold_secs, plan.proof_secs) + (windows.chunk + windows.right) / RATE
    scripts = []
    for i in range(SCRIPTS):
        first = i * len(bench.recordings) // SCRIPTS
        audio = join([*bench.recordings[first:], *bench.recordings[:first]], longest)
        scripts.append(await rehearse(bench.triton.endpoint, audio, windows))

    async def hold(streams: int, secs: float, load: str) -> Trial:
        size = round((lead_secs + secs + (windows.chunk + windows.right) / RATE) * RATE)
        chosen = [_cut_script(scripts[i % SCRIPTS], size, windows) for i in range(streams)]
        meter, calls = Meter(bench.roots(gateway=True)), await bench.calls()
        before = await _received_secs(bench)
        meter.start()
        partials = await play(bench.gateway.url, chosen, windows, lead_secs)
        usage, seconds = meter.stop(), await _received_secs(bench) - before
        latencies = [partial.latency for partial in partials]
        p50, p95, p99 = (round(percentile_ms(latencies, percent), 1) for percent in (50, 95, 99))
        bench.figures = [figure for figure in bench.figures if figure[:3] != (OURS_SOCKET, load, streams)]
        bench.figures.append(
            Figure(
                OURS_SOCKET,
                load,
                streams,
                float(streams),
                p50,
                p95,
                p99,
                round((await bench.calls() - calls) / seconds, 2),
                {name: round(secs / seconds, 5) for name, secs in usage.cpu_secs.items()},
                round(sum(usage.peak_rss_mb.values())),
            )
        )
        return Trial(streams, p50, p95)

    async def holds(streams: int) -> bool:
        trial = await hold(streams, plan.hold_secs, "paced")
        bench.trials.append(trial)
        return trial.p95_ms < bench.limit_ms

    held = await most_held(holds, max(1, round(bench.floor_streams / 4)), plan.precision)
    while held and not (await hold(held, plan.proof_secs, "paced")).p95_ms < bench.limit_ms:
        held -= max(1, round(plan.precision * held))
    bench.figures = [f for f in bench.figures if f.load != "paced" or f.concurrency == held]
    bench.add("paced streams held over what the floor's windows allow", held / bench.floor_streams, 0.7, 0.85, at_least=True)

    few = max(1, held // 2)
    await hold(few, plan.hold_secs, "paced, half")
    recordings = cut(join(bench.recordings, AT_ONCE * BATCH_SECS), round(BATCH_SECS * RATE))
    batches = asyncio.create_task(_forever(bench, recordings))
    trial = await hold(few, plan.hold_secs, "paced, half, and 8 recordings of 30 s")
    batches.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await batches
    bench.add(f"p95 of partials of {few} streams while eight recordings of 30 s are transcribed, ms", trial.p95_ms)


async def _forever(bench: Bench, recordings: Sequence[Samples]) -> None:
    while True:
        await asyncio.gather(*map(bench.rest.transcribe, recordings))


def _cut_script(script: Script, size: int, windows: Windows) -> Script:
    """The beginning of a script."""
    complete = windows.complete(size)
    return Script(script.samples[:size], [chunk for chunk in script.chunks if chunk < complete])


async def gateway_alone(bench: Bench) -> None:
    """The gateway before a stand-in for Triton."""
    windows = bench.windows
    added = await alone.added_time(join(bench.recordings, SHORT_SECS), AT_ONCE, 3 * bench.plan.alternations)
    bench.add("gateway: time added to a request, 8 at once, p50 ms", added.p50_ms, 3.0, 1.5)
    bench.add("gateway: the same, p99 ms", added.p99_ms, 15.0)
    for i, streams in enumerate(bench.plan.crowds):
        p99_ms = await alone.crowd(join(bench.recordings, LONG_SECS), windows, streams, bench.plan.hold_secs)
        must, aim = (20.0, None) if i == 0 else (None, 20.0)
        bench.add(f"gateway on one core, {streams} paced streams: p99 added, ms", p99_ms, must, aim)
    growth = await alone.long_stream(join(bench.recordings, bench.plan.long_secs), windows)
    name = f"stream of {bench.plan.long_secs / 60:g} min, last minute over first"
    bench.add(f"{name}: the gateway's time a chunk", growth.time, 1.05, 1.0)
    bench.add(f"{name}: the gateway's memory", growth.memory, 1.05, 1.0)


async def long_stream(bench: Bench) -> None:
    """One stream straight to Triton, each chunk as soon as the last is answered."""
    audio = join(bench.recordings, bench.plan.long_secs)
    growth = await endurance.long_stream(bench.triton, audio, bench.windows)
    name = f"stream of {bench.plan.long_secs / 60:g} min, last minute over first"
    bench.add(f"{name}: Triton's time a chunk", growth.time, 1.05, 1.0)
    bench.add(f"{name}: the decoder's memory", growth.memory, 1.05, 1.0)


async def memory(bench: Bench) -> None:
    """Memory of open streams, on servers of their own: those above have kept what they once needed."""
    mb = await endurance.memory_a_stream(join(bench.recordings, SHORT_SECS), bench.plan.idle_streams)
    bench.add("memory a live stream, gateway + decoder, MB", mb, 1.5, 0.5)


async def start(bench: Bench) -> None:
    """From the command to ready."""
    bench.add("start to ready, s", await endurance.start_secs(bench.plan.starts), 12.0, 6.0)


STAGES: Mapping[str, Callable[[Bench], Awaitable[None]]] = {
    "whole recordings": whole_recordings,
    "decoder calls": decoder_calls,
    "the floor's windows": floor_windows,
    "perf_analyzer": perf_analyzer,
    "paced streams": paced_streams,
    "long stream": long_stream,
    "the gateway alone": gateway_alone,
    "memory a stream": memory,
    "start": start,
}


@contextlib.asynccontextmanager
async def prepare(directory: Path, plan: Plan) -> AsyncIterator[Bench]:
    """The servers and their clients."""
    recordings = [part for samples in read_speech(directory) for part in cut(samples, round(LONG_SECS * RATE))]
    with merged_repository() as repository:
        async with (
            triton_server(None, repository) as triton,
            amira("serve", triton_endpoint=triton.endpoint, **ROOM, **TIMEOUT) as gateway,
        ):
            grpc, rest = GrpcClient(triton.endpoint), RestClient(gateway.url)
            try:
                yield Bench(plan, recordings, Windows.of(MODEL_REPOSITORY), triton, gateway, grpc, rest)
            finally:
                await grpc.close()
                await rest.close()


async def measure_all(directory: Path, quick: bool) -> dict[str, Any]:
    """Run every stage.

    Returns:
        The report.
    """
    plan = QUICK if quick else FULL
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("starting the servers", total=len(STAGES))
        async with prepare(directory, plan) as bench:
            for name, stage in STAGES.items():
                progress.update(task, description=name)
                await stage(bench)
                progress.advance(task)
    return {
        "date": datetime.now(timezone.utc).isoformat(" ", "minutes"),
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "quick": quick,
        "recordings": {
            "name": "bundled" if directory == SPEECH else directory.name,
            "count": len(bench.recordings),
            "seconds": round(audio_secs(bench.recordings), 1),
        },
        "windows_secs": [part / RATE for part in bench.windows],
        "alternations": plan.alternations,
        "latency_limit_ms": bench.limit_ms,
        "floor_streams": bench.floor_streams,
        "goals": [goal._asdict() for goal in bench.goals],
        "figures": [figure._asdict() for figure in bench.figures],
        "trials": [trial._asdict() for trial in bench.trials],
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=SPEECH, metavar="SPEECH_DIR", help="by default the bundled")
    parser.add_argument("--quick", action="store_true", help="less of everything, in about two minutes")
    arguments = parser.parse_args()
    configure_logging(Settings(log_level="error"))
    try:
        report = uvloop.run(measure_all(arguments.directory.resolve(), arguments.quick))
    except (PerfError, EngineError, OSError) as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    page = to_markdown(report)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bench.md").write_text(page, encoding="utf-8")
    (RESULTS / "bench.json").write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    draw(report, ROOT / "docs")
    print(page)


if __name__ == "__main__":
    main()
