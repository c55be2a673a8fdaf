"""Servers to measure: an embedded or a running Triton, its counters, and a gateway process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import re
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from amira.engine.process import TritonProcess
from amira.engine.wheel import Engine
from amira.paths import ENGINE_HOME, MODEL_REPOSITORY, ONNXRUNTIME_BACKEND, ROOT
from amira.ports import LOOPBACK, Ports, free_ports

AMIRA = Path(sys.prefix) / "bin" / "amira"
AMIRA_LOG = ENGINE_HOME / "amira-perf.log"
START_TIMEOUT_SECS = 60.0
READY_POLL_SECS = 0.02
COUNTED_SECS = 0.1
"""Maximum delay until Triton's own counters include an answered request."""

REPORTED_SECS = 0.8
"""Maximum delay until the decoder's counters include an answered request; the decoder reports twice a second."""


class PerfError(RuntimeError):
    """A measurement is not possible; the message is one line with the reason."""


class Target(NamedTuple):
    """A Triton server: gRPC endpoint, URL of its metrics, and process id if it was started here."""

    endpoint: str
    metrics_url: str
    pid: int | None = None


class Process(NamedTuple):
    """A server process: base URL and process id."""

    url: str
    pid: int


Counters = Mapping[tuple[str, str], float]
"""Values of counters by name and model."""


@contextlib.asynccontextmanager
async def triton_server(given: Target | None, repository: Path = MODEL_REPOSITORY) -> AsyncIterator[Target]:
    """Yield the given server, or start an embedded Triton."""
    if given:
        yield given
        return
    ports = Ports(LOOPBACK, *free_ports(LOOPBACK, 2))
    engine = Engine.prepare(ENGINE_HOME, ONNXRUNTIME_BACKEND)
    triton = TritonProcess(engine, repository, ports, ENGINE_HOME / "triton-perf.log")
    await triton.start()
    try:
        yield Target(f"{LOOPBACK}:{ports.grpc}", f"http://{LOOPBACK}:{ports.metrics}/metrics", triton.pid)
    finally:
        await triton.stop()


@contextlib.asynccontextmanager
async def amira(command: str, **variables: Any) -> AsyncIterator[Process]:
    """Run ``amira serve`` or ``amira run`` in a process, and yield the process when it is ready.

    Args:
        command: ``serve`` or ``run``.
        variables: environment variables in lower case, without ``AMIRA_``.

    Raises:
        PerfError: the process ended, or was not ready in time.
    """
    (port,) = free_ports(LOOPBACK, 1)
    given = {"server_host": LOOPBACK, "server_port": port, "log_level": "error", **variables}
    environment = {**os.environ, **{f"AMIRA_{name.upper()}": str(value) for name, value in given.items()}}
    with AMIRA_LOG.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            AMIRA, command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        url = f"http://{LOOPBACK}:{port}"
        await _ready(url, process)
        yield Process(url, process.pid)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


async def _ready(url: str, process: asyncio.subprocess.Process) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECS
    async with httpx.AsyncClient(timeout=5) as client:
        while time.monotonic() < deadline:
            if process.returncode is not None:
                raise PerfError(f"{AMIRA.name} ended with exit code {process.returncode} during start-up; see {AMIRA_LOG}")
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{url}/health/ready")).is_success:
                    return
            await asyncio.sleep(READY_POLL_SECS)
    raise PerfError(f"{AMIRA.name} was not ready within {START_TIMEOUT_SECS:g} s; see {AMIRA_LOG}")


async def read_counters(url: str, settle_secs: float = REPORTED_SECS) -> Counters:
    """Read the counters of Triton and the decoder after they include all answered requests.

    Args:
        url: URL of Triton's metrics.
        settle_secs: wait before the request; ``COUNTED_SECS`` is enough for Triton's own counters.

    Raises:
        PerfError: the metrics cannot be read.
    """
    await asyncio.sleep(settle_secs)
    try:
        async with httpx.AsyncClient(timeout=10) as client:
            page = (await client.get(url)).raise_for_status().text
    except httpx.HTTPError as error:
        raise PerfError(f"cannot read Triton's metrics at {url} ({error}); pass their URL with --metrics-url") from None
    counters: defaultdict[tuple[str, str], float] = defaultdict(float)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            counters[sample.name, sample.labels.get("model", "")] += sample.value
    return counters


def cpu_model() -> str:
    """Return the name of the processor from ``/proc/cpuinfo``."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE):
            return found[1]
    return platform.machine()
