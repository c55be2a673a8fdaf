"""Stages of the benchmark: each measures figures and compares them with goals."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from amira.paths import ENGINE_HOME, MODEL_REPOSITORY
from gateway.audio import RATE
from gateway.triton.geometry import Windows
from perf import alone, endurance
from perf.analyze import FIXED_WINDOWS, STREAM, WARM_UP, WHOLE, command, measure, prepare_tool, run, write_inputs
from perf.clients import GrpcClient, RestClient
from perf.floor import Floor
from perf.load import Contender, Figure, Turn, alternate, percentiles_ms
from perf.peers import FRAME_SYNCHRONOUS, OnnxAsr
from perf.plan import Plan
from perf.processes import Meter
from perf.recogniser import DECODER, parameters
from perf.report import Goal, Trial
from perf.server import COUNTED_SECS, PerfError, Process, Target, read_counters
from perf.speech import Samples, cut, join, repeat
from perf.streams import Script, most_held, play, rehearse

T = TypeVar("T")

CALLS = "nv_inference_request_success_total", "decoder_joint"
OURS_GRPC, OURS_REST, OURS_SOCKET, OURS_ANALYZED = "ours, gRPC", "ours, REST", "ours, WebSocket", "ours, perf_analyzer"
FLOORS = {"floor, 2 threads": (1, 2), "floor, 2 sessions": (2, 1)}
"""Number of sessions, and threads of each session, by contender."""

ONNX_ASR = "onnx-asr"
AT_ONCE = 8
SHORT_SECS, LONG_SECS = 10.0, 60.0
BATCH_SECS = 30.0
SLACK_MS = 300.0
"""Maximum latency of a partial beyond the length of its chunk and right context."""

SCRIPTS = 4


@dataclass
class Bench:
    """Servers, clients and recordings that the stages share, and their results."""

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
        """Maximum p95 of the latency of partials with which a number of streams is held."""
        return (self.windows.chunk + self.windows.right) * 1000 / RATE + SLACK_MS

    def figure(self, contender: str, load: str, concurrency: int) -> Figure:
        """Return a figure that was measured before."""
        key = contender, load, concurrency
        return next(figure for figure in self.figures if figure[:3] == key)

    def floor(self, load: str) -> Figure:
        """Return the figure of the faster layout of the floor."""
        return max((f for f in self.figures if f.contender in FLOORS and f.load == load), key=lambda f: f.audio_secs_per_sec)

    def add(
        self, name: str, measured: float, must: float | None = None, aim: float | None = None, *, at_least: bool = False
    ) -> None:
        """Add a goal."""
        self.goals.append(Goal(name, round(measured, 3), must, aim, at_least))

    async def calls(self) -> float:
        """Return the number of decoder_joint calls so far."""
        counters = await read_counters(self.triton.metrics_url, COUNTED_SECS)
        return counters[CALLS]

    def roots(self, gateway: bool) -> Mapping[str, int]:
        """Return the process ids of the servers by name."""
        roots = {"triton": self.triton.pid or 0}
        return {**roots, "gateway": self.gateway.pid} if gateway else roots

    def contender(self, name: str) -> Contender:
        """Return a contender that runs in a server."""
        send = {
            OURS_GRPC: self.grpc.ours,
            FRAME_SYNCHRONOUS: self.grpc.frame_synchronous,
            OURS_REST: self.rest.transcribe,
        }[name]
        return Contender(name, send, self.roots(gateway=name == OURS_REST), self.calls)


async def whole_recordings(bench: Bench) -> None:
    """Measure all contenders on whole recordings, on 60 s in one request, and on 10 s."""
    plan, me = bench.plan, {"in-process": os.getpid()}
    peer = OnnxAsr(MODEL_REPOSITORY, parameters(MODEL_REPOSITORY))
    onnx_asr = Turn(Contender(ONNX_ASR, peer.transcribe, me, peer.count), 1)
    work = repeat(bench.recordings, plan.turn_secs)
    long, short = join(bench.recordings, LONG_SECS), join(bench.recordings, SHORT_SECS)
    await _check_tokens(bench, peer, [*bench.recordings, short, *([long] if plan.long_turns else [])])
    floors = {name: Floor(MODEL_REPOSITORY, *layout) for name, layout in FLOORS.items()}
    turns = [Turn(Contender(name, floor.encode, me), floor.sessions) for name, floor in floors.items()]
    turns += [onnx_asr, *(Turn(bench.contender(name), AT_ONCE) for name in (OURS_REST, OURS_GRPC, FRAME_SYNCHRONOUS))]
    bench.figures += await alternate(turns, work, plan.alternations, "whole")
    if plan.levels:
        turns = [Turn(bench.contender(name), level) for name in (OURS_REST, FRAME_SYNCHRONOUS) for level in plan.levels]
        bench.figures += await alternate(turns, work, 1, "whole")
    one_at_once = [onnx_asr, *(Turn(bench.contender(name), 1) for name in (OURS_REST, OURS_GRPC, FRAME_SYNCHRONOUS))]
    if plan.long_turns:
        bench.figures += await alternate(one_at_once, [long], plan.long_turns, "60 s")
    bench.figures += await alternate(one_at_once, [short] * 3, 2 * plan.alternations, "10 s")

    rest, peer_rate = bench.figure(OURS_REST, "whole", AT_ONCE), bench.figure(ONNX_ASR, "whole", 1).audio_secs_per_sec
    ours, frame_by_frame = (bench.figure(name, "whole", AT_ONCE) for name in (OURS_GRPC, FRAME_SYNCHRONOUS))
    floor_rate = bench.floor("whole").audio_secs_per_sec
    bench.add(
        "batch by REST, 8 at once: throughput over the floor's", rest.audio_secs_per_sec / floor_rate, 0.75, 0.9, at_least=True
    )
    bench.add(
        "batch by REST, 8 at once: throughput over onnx-asr's in-process",
        rest.audio_secs_per_sec / peer_rate,
        1.3,
        2.0,
        at_least=True,
    )
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
    """Check that all contenders return the same tokens. This also warms them up.

    Raises:
        PerfError: tokens differ.
    """
    for i, samples in enumerate(recordings):
        tokens = await bench.grpc.ours(samples)
        for name, transcribe in (
            (ONNX_ASR, peer.transcribe),
            (FRAME_SYNCHRONOUS, bench.grpc.frame_synchronous),
            (OURS_REST, bench.rest.transcribe),
        ):
            if await transcribe(samples) != tokens:
                raise PerfError(f"recording {i}, {len(samples) / RATE:.2f} s: {name} and {OURS_GRPC} return different tokens")


async def decoder_calls(bench: Bench) -> None:
    """Compare the decoder_joint calls of each whole recording with the number that blocks of frames need."""
    given = parameters(MODEL_REPOSITORY)
    frame_samples, block_frames = int(given["frame_samples"]), int(given.get("block_frames", 32))
    shares, before = [], await bench.calls()
    for samples in bench.recordings:
        tokens = len(await bench.grpc.ours(samples))
        blocks_crossed = len(samples) // frame_samples // block_frames
        after = await bench.calls()
        shares.append((after - before) / (tokens + 1 + blocks_crossed))
        before = after
    bench.add("decoder_joint calls of a window over tokens + 1 + blocks crossed, at most", max(shares), 1.0, 1.0)


async def floor_windows(bench: Bench) -> None:
    """Measure the floor on the windows of a stream; each window gives one chunk."""
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
    """Measure the ensemble with perf_analyzer."""
    tool = prepare_tool(ENGINE_HOME / "perf_analyzer")
    write_inputs(bench.recordings)
    measurement = ("--measurement-interval", str(bench.plan.interval_ms), *FIXED_WINDOWS)
    for load in (STREAM, WHOLE):
        await run(tool, command(bench.triton, load, AT_ONCE, *WARM_UP))
        for concurrency in bench.plan.analyzed[load.name]:
            arguments = command(bench.triton, load, concurrency, *measurement)
            measuring = measure(tool, bench.triton, load, concurrency, arguments)
            level, (_, _, cpu, peak) = await _spending(bench, measuring, gateway=False)
            latencies = level.p50_ms, level.p95_ms, level.p99_ms
            rest = level.decoder_calls_per_audio_sec, cpu, peak
            bench.figures.append(Figure(OURS_ANALYZED, load.name, concurrency, level.audio_secs_per_sec, *latencies, *rest))


class Spent(NamedTuple):
    """Throughput of the decoder, and the last fields of a figure."""

    audio_secs_per_sec: float
    decoder_calls_per_audio_sec: float
    cpu_secs_per_audio_sec: Mapping[str, float]
    peak_rss_mb: float


async def _spending(bench: Bench, work: Awaitable[T], *, gateway: bool) -> tuple[T, Spent]:
    """Await some work, and return its result and what the servers spent per second of audio that the decoder received."""

    async def count() -> tuple[float, float]:
        counters = await read_counters(bench.triton.metrics_url)
        return counters["asr_decoder_audio_seconds_total", DECODER], counters[CALLS]

    meter = Meter(bench.roots(gateway=gateway))
    secs_before, calls_before = await count()
    meter.start()
    began = time.perf_counter()
    result = await work
    wall_secs = time.perf_counter() - began
    usage, (secs_after, calls_after) = meter.stop(), await count()
    secs = secs_after - secs_before
    cpu = {name: round(used / secs, 5) for name, used in usage.cpu_secs.items() if used}
    return result, Spent(
        audio_secs_per_sec=round(secs / wall_secs, 1),
        decoder_calls_per_audio_sec=round((calls_after - calls_before) / secs, 2),
        cpu_secs_per_audio_sec=cpu,
        peak_rss_mb=round(sum(usage.peak_rss_mb.values())),
    )


async def paced_streams(bench: Bench) -> None:
    """Measure the number of live streams that are held, and their latency while recordings are transcribed."""
    plan, tried = bench.plan, dict[int, Figure]()
    scripts = await _scripts(bench, max(plan.hold_secs, plan.proof_secs))

    async def holds(streams: int) -> bool:
        tried[streams] = await _hold(bench, scripts, streams, plan.hold_secs, "paced")
        return tried[streams].p95_ms < bench.limit_ms

    held = await most_held(holds, max(1, round(bench.floor_streams / 2)), plan.precision)
    bench.trials += [Trial(streams, figure.p50_ms, figure.p95_ms) for streams, figure in sorted(tried.items())]
    figure = tried[held] if held else None
    while plan.proof_secs and held:
        figure = await _hold(bench, scripts, held, plan.proof_secs, "paced")
        if figure.p95_ms < bench.limit_ms:
            break
        held -= max(1, round(plan.precision * held))
    if held and figure:
        bench.figures.append(figure)
    bench.add("paced streams held over what the floor's windows allow", held / bench.floor_streams, 0.7, 0.85, at_least=True)

    few = max(1, held // 2)
    recordings = cut(join(bench.recordings, AT_ONCE * BATCH_SECS), round(BATCH_SECS * RATE))
    batches = asyncio.create_task(_forever(bench, recordings))
    figure = await _hold(bench, scripts, few, plan.hold_secs, f"paced, beside {AT_ONCE} of {BATCH_SECS:g} s")
    batches.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await batches
    bench.figures.append(figure)
    bench.add(f"p95 of partials of {few} streams while eight recordings of 30 s are transcribed, ms", figure.p95_ms)


async def _scripts(bench: Bench, hold_secs: float) -> list[Script]:
    """Return scripts of different audio that last for a trial."""
    scripts = []
    for i in range(SCRIPTS):
        first = i * len(bench.recordings) // SCRIPTS
        audio = join([*bench.recordings[first:], *bench.recordings[:first]], _stream_secs(bench.windows, hold_secs))
        scripts.append(await rehearse(bench.grpc, audio, bench.windows))
    return scripts


def _stream_secs(windows: Windows, hold_secs: float) -> float:
    """Return the length of a stream. The part before its window is full costs less, so it is added to the trial."""
    return hold_secs + (windows.size + windows.chunk + windows.right) / RATE


async def _hold(bench: Bench, scripts: Sequence[Script], streams: int, secs: float, load: str) -> Figure:
    """Play `streams` streams, and return their figure."""
    size = round(_stream_secs(bench.windows, secs) * RATE)
    chosen = [scripts[i % len(scripts)].cut(size, bench.windows) for i in range(streams)]
    playing = play(bench.gateway.url, chosen, bench.windows, lead_secs=bench.windows.size / RATE)
    partials, (rate, calls, cpu, peak) = await _spending(bench, playing, gateway=True)
    percentiles = percentiles_ms([partial.latency for partial in partials])
    return Figure(OURS_SOCKET, load, streams, rate, *percentiles, calls, cpu, peak)


async def _forever(bench: Bench, recordings: Sequence[Samples]) -> None:
    while True:
        await asyncio.gather(*map(bench.rest.transcribe, recordings))


async def gateway_alone(bench: Bench) -> None:
    """Measure the gateway with a stand-in for Triton."""
    windows = bench.windows
    added = await alone.added_time(join(bench.recordings, SHORT_SECS), AT_ONCE, 2 * bench.plan.alternations)
    bench.add("gateway: time added to a request, 8 at once, p50 ms", added.p50_ms, 3.0, 1.5)
    bench.add("gateway: time added to a request, 8 at once, p99 ms", added.p99_ms, 15.0)
    for i, streams in enumerate(bench.plan.crowds):
        p99_ms = await alone.crowd(join(bench.recordings, LONG_SECS), windows, streams, bench.plan.hold_secs)
        must, aim = (20.0, None) if i == 0 else (None, 20.0)
        bench.add(f"gateway on one core, {streams} paced streams: p99 added, ms", p99_ms, must, aim)


async def long_stream(bench: Bench) -> None:
    """Measure a long stream to Triton, and one through a gateway with a stand-in; neither is paced."""
    if not bench.plan.long_secs:
        return
    audio = join(bench.recordings, bench.plan.long_secs)
    in_triton = await endurance.long_stream(bench.triton, audio, bench.windows)
    in_gateway = await alone.long_stream(audio, bench.windows)
    name = f"stream of {bench.plan.long_secs / 60:.3g} min, last minute over first"
    bench.add(f"{name}: Triton's time per chunk", in_triton.time, 1.05, 1.0)
    bench.add(f"{name}: the decoder's memory", in_triton.memory, 1.05, 1.0)
    bench.add(f"{name}: the gateway's time per chunk", in_gateway.time, 1.05, 1.0)
    bench.add(f"{name}: the gateway's memory", in_gateway.memory, 1.05, 1.0)


async def memory(bench: Bench) -> None:
    """Measure the memory of open streams on new servers: used servers keep memory of earlier load."""
    if not bench.plan.idle_streams:
        return
    mb = await endurance.memory_a_stream(join(bench.recordings, SHORT_SECS), bench.plan.idle_streams)
    bench.add("memory per live stream, gateway + decoder, MB", mb.gateway + mb.decoder, 1.5, 0.5)
    bench.add("memory per live stream, gateway, MB", mb.gateway)


async def start(bench: Bench) -> None:
    """Measure the time from the command to ready."""
    bench.add("start to ready, s", await endurance.start_secs(bench.plan.starts), 12.0, 6.0)


STAGES: Mapping[str, Callable[[Bench], Awaitable[None]]] = {
    "whole recordings": whole_recordings,
    "decoder calls": decoder_calls,
    "the floor's windows": floor_windows,
    "perf_analyzer": perf_analyzer,
    "paced streams": paced_streams,
    "long stream": long_stream,
    "the gateway alone": gateway_alone,
    "memory of streams": memory,
    "start": start,
}
