"""Compare the server with the floor, its peers and its goals, with the same graphs and recordings.

    python -m perf.bench [SPEECH_DIR] [--quick]

Contenders alternate on the same work. A figure is the median of its turns; only ratios within one run are comparable. The
results are written to ``perf/results/bench.md`` and ``bench.json``, the plots to ``docs/``. perf/README.md defines all figures.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

from amira.engine.errors import EngineError
from amira.paths import MODEL_REPOSITORY, ROOT, SPEECH
from gateway.audio import RATE
from gateway.config.settings import Settings
from gateway.logs import configure_logging
from perf.clients import GrpcClient, RestClient
from perf.output import circumstances, publish
from perf.peers import merged_repository
from perf.plan import FULL, QUICK, Plan
from perf.plots import draw
from perf.recogniser import windows_of
from perf.report import to_markdown
from perf.server import PerfError, amira, triton_server
from perf.speech import audio_secs, cut, read_speech, repeat
from perf.stages import LONG_SECS, STAGES, Bench

ROOM = {
    "max_concurrent_streams": 2000,
    "max_connects_per_address": 100_000,
    "max_concurrent_batches": 200,
    "max_batch_audio_length_secs": LONG_SECS,
    "inference_timeout_secs": 60,
}
"""Settings of the gateway that keep its limits above the benchmark's load."""


@contextlib.asynccontextmanager
async def prepare(directory: Path, plan: Plan) -> AsyncIterator[Bench]:
    """Start the servers, and yield them with their clients."""
    recordings = [part for samples in read_speech(directory) for part in cut(samples, round(LONG_SECS * RATE))]
    recordings = recordings[: len(repeat(recordings, plan.recordings_secs))]
    with merged_repository() as repository:
        async with (
            triton_server(None, repository) as triton,
            amira("serve", triton_endpoint=triton.endpoint, **ROOM) as gateway,
        ):
            grpc, rest = GrpcClient(triton.endpoint), RestClient(gateway.url)
            try:
                yield Bench(plan, recordings, windows_of(MODEL_REPOSITORY), triton, gateway, grpc, rest)
            finally:
                await grpc.close()
                await rest.close()


async def measure_all(directory: Path, quick: bool) -> dict[str, Any]:
    """Run every stage, and return the report.

    Args:
        directory: the recordings.
        quick: whether to measure less, in about three minutes.
    """
    plan, stage_secs = QUICK if quick else FULL, dict[str, float]()
    columns = (SpinnerColumn(), *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("starting the servers", total=len(STAGES))
        async with prepare(directory, plan) as bench:
            for name, stage in STAGES.items():
                progress.update(task, description=name)
                if not progress.console.is_terminal:  # no bar is drawn
                    progress.console.print(name)
                began = time.monotonic()
                await stage(bench)
                stage_secs[name] = round(time.monotonic() - began, 1)
                progress.advance(task)
    return {
        **circumstances(),
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
        "stage_secs": stage_secs,
        "goals": [goal._asdict() for goal in bench.goals],
        "figures": [figure._asdict() for figure in bench.figures],
        "trials": [trial._asdict() for trial in bench.trials],
    }


def main() -> None:
    """Parse the command line, measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "directory", type=Path, nargs="?", default=SPEECH, metavar="SPEECH_DIR", help="default: bundled recordings"
    )
    parser.add_argument("--quick", action="store_true", help="measure less, in about three minutes")
    arguments = parser.parse_args()
    configure_logging(Settings(log_level="error"))
    try:
        report = uvloop.run(measure_all(arguments.directory.resolve(), arguments.quick))
    except (PerfError, EngineError, OSError) as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    page = to_markdown(report)
    publish("bench", report, page)
    draw(report, ROOT / "docs")
    print(page)


if __name__ == "__main__":
    main()
