"""Compare live streams of model repositories on one machine: streams held, latency, CPU time, memory and word error rate.

    python -m perf.held SPEECH_DIR --repository NAME=DIR [--repository NAME=DIR …] [--latency LATENCY …]
        [--streams N] [--turns T] [--plot FILE]

Each repository has the bundled model's names, and is served by this checkout's gateway. The repositories take turns. A figure
is the median of its turns. The first repository is the reference of the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import NamedTuple

from amira.models.configs import ModelError
from gateway.audio import RATE
from gateway.triton.geometry import Windows, read_windows
from perf import endurance
from perf.bench import ROOM
from perf.clients import GrpcClient
from perf.labelled import Recording, errors, read_speech
from perf.load import percentiles_ms
from perf.networks import Networks, read_parameters
from perf.output import circumstances
from perf.plots import draw_held
from perf.processes import Meter
from perf.recogniser import DECODER, MODEL, choose
from perf.server import PerfError, Process, Target, amira, read_counters, triton_server
from perf.speech import Samples, join
from perf.stages import SLACK_MS
from perf.streams import Script, most_held, play, rehearse
from perf.windows import transcribe, variants

LEAD_SECS = 5.0
"""Length of the audio at a stream's start that does not count: windows are full, and caches are filled, behind it."""

SCRIPTS = 4
PRECISION = 0.05
MEMORY_STREAMS, MEMORY_SECS = 48, 30.0
"""Number of open streams whose memory is measured, and the audio that each has sent."""


class Level(NamedTuple):
    """A number of streams in real time.

    Attributes:
        p50_ms, p95_ms: latency of partials.
        cpu_secs: CPU time per second of audio, by process.
    """

    p50_ms: float
    p95_ms: float
    cpu_secs: Mapping[str, float]


@dataclass
class Tally:
    """Results of one repository and latency, by turn.

    Attributes:
        wer: word error rate of streams in percent.
        held: number of streams held.
        levels: at the fixed number of streams.
    """

    wer: float
    held: list[int] = field(default_factory=list)
    levels: list[Level] = field(default_factory=list)

    def medians(self) -> tuple[float, float, float, float]:
        """Return streams held, p50 and p95 in ms, and CPU time of all processes in ms per audio second."""
        cpu = 1000 * median(sum(level.cpu_secs.values()) for level in self.levels)
        p50, p95 = (median(values) for values in zip(*((level.p50_ms, level.p95_ms) for level in self.levels), strict=True))
        return median(self.held), p50, p95, cpu


@dataclass(frozen=True)
class Served:
    """A repository behind a gateway; ``latency`` selects the windows of its streams."""

    triton: Target
    gateway: Process
    grpc: GrpcClient
    latency: str
    windows: Windows

    @property
    def limit_ms(self) -> float:
        """Maximum p95 of the latency of partials with which a number of streams is held, as in ``perf.bench``."""
        return (self.windows.chunk + self.windows.right) * 1000 / RATE + SLACK_MS

    async def scripts(self, recordings: Sequence[Samples], secs: float) -> list[Script]:
        """Return scripts of different audio that last for a trial."""
        found = []
        for i in range(SCRIPTS):
            first = i * len(recordings) // SCRIPTS
            audio = join([*recordings[first:], *recordings[:first]], secs + LEAD_SECS)
            found.append(await rehearse(self.grpc, audio, self.windows, self.latency))
        return found

    async def play(self, scripts: Sequence[Script], streams: int) -> Level:
        """Play this many streams."""
        meter = Meter({"triton": self.triton.pid or 0, "gateway": self.gateway.pid})
        chosen = [scripts[i % len(scripts)] for i in range(streams)]
        before = await self._audio_secs()
        meter.start()
        partials = await play(self.gateway.url, chosen, self.windows, LEAD_SECS, self.latency)
        usage = meter.stop()
        secs = await self._audio_secs() - before
        p50, p95, _ = percentiles_ms([partial.latency for partial in partials])
        return Level(p50, p95, {name: used / secs for name, used in usage.cpu_secs.items()})

    async def _audio_secs(self) -> float:
        counters = await read_counters(self.triton.metrics_url)
        return counters["asr_decoder_audio_seconds_total", DECODER]


@contextlib.asynccontextmanager
async def serve(repository: Path, latency: str) -> AsyncIterator[Served]:
    """Start the servers of a repository."""
    windows = read_windows(choose(repository, MODEL).parameters)[latency]
    async with triton_server(None, repository) as triton, amira("serve", triton_endpoint=triton.endpoint, **ROOM) as gateway:
        grpc = GrpcClient(triton.endpoint)
        try:
            yield Served(triton, gateway, grpc, latency, windows)
        finally:
            await grpc.close()


def word_error_rates(repository: Path, latencies: Sequence[str], recordings: Sequence[Recording]) -> dict[str, float]:
    """Return the word error rate of each latency in percent; each recording is a stream."""
    recogniser = choose(repository, MODEL)
    p = read_parameters(recogniser)
    networks, words = Networks(recogniser, p), sum(len(recording.text.split()) for recording in recordings)
    found: dict[str, float] = {}
    for variant in variants(recogniser, p, quick=True):
        names = set(variant.latencies.split(", ")) & {*latencies}
        if names:
            texts = asyncio.run(transcribe(networks, variant, recordings, lambda: None))
            found |= dict.fromkeys(names, 100 * float(errors(recordings, texts).sum()) / words)
    return found


async def take_turn(repository: Path, latency: str, recordings: Sequence[Samples], options: argparse.Namespace) -> Tally:
    """Measure one repository with one latency, and return a tally of this turn."""
    tally = Tally(0.0)
    async with serve(repository, latency) as served:
        scripts = await served.scripts(recordings, options.secs)
        tally.levels.append(await served.play(scripts, options.streams))

        async def holds(streams: int) -> bool:
            return (await served.play(scripts, streams)).p95_ms < served.limit_ms

        tally.held.append(await most_held(holds, options.streams, PRECISION))
    return tally


async def measure(options: argparse.Namespace, tallies: Mapping[tuple[str, str], Tally], speech: Sequence[Samples]) -> None:
    """Let all repositories take their turns."""
    for turn in range(options.turns):
        for (name, latency), tally in tallies.items():
            began = time.perf_counter()
            found = await take_turn(options.repository[name], latency, speech, options)
            tally.held += found.held
            tally.levels += found.levels
            print(f"turn {turn + 1}, {name}, {latency}: {found}, {time.perf_counter() - began:.0f} s", flush=True)


def to_markdown(tallies: Mapping[tuple[str, str], Tally], streams: int) -> str:
    """Return a table; ratios are to the first repository with the same latency."""
    lines = [
        f"| | latency | WER % | streams held | p50 of {streams} ms | p95 ms | CPU ms per audio second |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    first = next(iter(tallies))[0]
    for (name, latency), tally in tallies.items():
        reference = tallies[first, latency].medians()
        held, p50, p95, cpu = (
            f"{value:{form}} ({value / base:.2f})" if base else f"{value:{form}}"
            for value, base, form in zip(tally.medians(), reference, (".0f", ".0f", ".0f", ".1f"), strict=True)
        )
        lines.append(f"| {name} | {latency} | {tally.wer:.1f} | {held} | {p50} | {p95} | {cpu} |")
    return "\n".join(lines)


def _named(text: str) -> tuple[str, Path]:
    name, separator, directory = text.partition("=")
    if not separator or not Path(directory).is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with a directory")
    return name, Path(directory).resolve()


def main() -> None:
    """Parse the command line, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="SPEECH_DIR", help="directory of recordings with a manifest.tsv")
    parser.add_argument(
        "--repository", type=_named, action="append", required=True, metavar="NAME=DIR", help="model repository"
    )
    parser.add_argument(
        "--latency", choices=("low", "balanced", "throughput"), action="append", help="of the streams; default: balanced"
    )
    parser.add_argument("--streams", type=int, default=16, help="number of streams whose latency and CPU time are compared")
    parser.add_argument("--secs", type=float, default=20.0, help="length of a trial")
    parser.add_argument("--turns", type=int, default=3, help="turns of each repository")
    parser.add_argument("--plot", type=Path, help="picture of error rates against streams held")
    options = parser.parse_args()
    options.repository = dict(options.repository)
    latencies = options.latency or ["balanced"]
    recordings = read_speech(options.directory)
    try:
        tallies: dict[tuple[str, str], Tally] = {}
        for name, repository in options.repository.items():
            wers = word_error_rates(repository, latencies, recordings)
            tallies |= {(name, latency): Tally(wers[latency]) for latency in latencies}
        speech = [recording.samples for recording in recordings]
        asyncio.run(measure(options, tallies, speech))
        print(to_markdown(tallies, options.streams))
        for name, repository in options.repository.items():
            mb = asyncio.run(endurance.memory_a_stream(join(speech, MEMORY_SECS), MEMORY_STREAMS, repository))
            print(f"{name}: {mb.gateway + mb.decoder:.2f} MB a live stream, of which the gateway has {mb.gateway:.2f}")
    except (ModelError, PerfError) as error:
        parser.error(str(error))
    if options.plot:
        points = {key: (tally.medians()[0], tally.wer) for key, tally in tallies.items()}
        draw_held(points, circumstances(), options.plot)


if __name__ == "__main__":
    main()
