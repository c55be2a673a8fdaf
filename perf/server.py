"""The servers to measure: an embedded Triton of our own or one that runs, its counters, and a gateway as a process."""

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

from amira.engine.process import Triton
from amira.engine.wheel import Engine
from amira.paths import ENGINE_HOME, MODEL_REPOSITORY, ONNXRUNTIME_BACKEND, ROOT
from amira.ports import LOOPBACK, Ports, free_ports

AMIRA = Path(sys.prefix) / "bin" / "amira"
AMIRA_LOG = ENGINE_HOME / "amira-perf.log"
START_TIMEOUT_SECS = 60.0
READY_POLL_SECS = 0.02
COUNTED_SECS = 0.1  # after which an answered request is in Triton's own counters
REPORTED_SECS = 0.8  # the decoder reports twice a second


class PerfError(RuntimeError):
    """Nothing can be measured; one line that says why."""


class Target(NamedTuple):
    """A Triton: its gRPC endpoint, the URL of its metrics, and its process id where it is ours."""

    endpoint: str
    metrics_url: str
    pid: int | None = None


class Process(NamedTuple):
    """A server of ours as a process: its base URL and its process id."""

    url: str
    pid: int


Counters = Mapping[tuple[str, str], float]
"""Counters by their name and the model they belong to."""


@contextlib.asynccontextmanager
async def triton_server(given: Target | None, repository: Path = MODEL_REPOSITORY) -> AsyncIterator[Target]:
    """The server given, or an embedded Triton of our own."""
    if given:
        yield given
        return
    ports = Ports(LOOPBACK, *free_ports(LOOPBACK, 2))
    engine = Engine.prepare(ENGINE_HOME, ONNXRUNTIME_BACKEND)
    triton = Triton(engine, repository, ports, ENGINE_HOME / "triton-perf.log")
    await triton.start()
    try:
        yield Target(f"{LOOPBACK}:{ports.grpc}", f"http://{LOOPBACK}:{ports.metrics}/metrics", triton.pid)
    finally:
        await triton.stop()


@contextlib.asynccontextmanager
async def amira(command: str, **variables: Any) -> AsyncIterator[Process]:
    """``amira serve`` or ``amira run`` as a process of its own, once it is ready.

    Args:
        command: which of the two.
        variables: settings by their names in lower case; those of the launcher too.

    Raises:
        PerfError: it ended, or was not ready in time.
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
                raise PerfError(
                    f"{AMIRA.name} ended with exit code {process.returncode} while it started; {AMIRA_LOG} says why"
                )
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{url}/health/ready")).is_success:
                    return
            await asyncio.sleep(READY_POLL_SECS)
    raise PerfError(f"{AMIRA.name} was not ready within {START_TIMEOUT_SECS:g} s; {AMIRA_LOG} says why")


async def read_counters(url: str, settle_secs: float = REPORTED_SECS) -> Counters:
    """Triton's counters and the decoder's, once it has reported what it did until now.

    Args:
        url: of Triton's metrics.
        settle_secs: wait so long first; ``COUNTED_SECS`` will do for what Triton counts itself.

    Raises:
        PerfError: there are none at the URL.
    """
    await asyncio.sleep(settle_secs)
    try:
        async with httpx.AsyncClient(timeout=10) as client:
            page = (await client.get(url)).raise_for_status().text
    except httpx.HTTPError as error:
        raise PerfError(f"can't read Triton's metrics at {url} ({error}); say where they are with --metrics-url") from None
    counters: defaultdict[tuple[str, str], float] = defaultdict(float)
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            counters[sample.name, sample.labels.get("model", "")] += sample.value
    return counters


def cpu_model() -> str:
    """The processor's name, as Linux tells it."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE):
            return found[1]
    return platform.machine()
