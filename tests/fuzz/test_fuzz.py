"""``make fuzz``: run each fuzzer for ``MINUTES``. Findings stay in ``.fuzz`` and are tried first in the next run."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from amira.paths import ROOT
from amira.ports import LOOPBACK, free_ports
from gateway.config.settings import Settings
from tests.support.chaos import Backend, backends
from tests.support.clients import decoder_metric
from tests.support.commands import gateway_process
from tests.support.dialogue import Server, converse_until, transcriber
from tests.support.servers import read_recordings

SECS = float(os.environ.get("MINUTES") or 10) * 60
HOME = ROOT / ".fuzz"
HERE = Path(__file__).parent
SLOWEST_SECS = 10
"""Maximum time of a response, and of one input of a fuzzer."""

SLOWEST_FILE_SECS = 60
"""The same for a file, which may take seconds of CPU time in a process of its own."""

PATIENT = {"max_connects_per_address": "100000", "stream_timeout_secs": "600"}
"""Settings of the gateway: on a busy machine a client may be silent for longer than the 30 s that are usual."""

LARGEST_INPUT_BYTES = 2**15
MEMORY_MB = 2048


@pytest.fixture(scope="module")
async def backend() -> AsyncIterator[Backend]:
    async with backends(1) as (running,):
        yield running
        assert await decoder_metric(running.ports, "asr_decoder_sequences") == 0


@pytest.fixture
async def url(backend: Backend) -> AsyncIterator[str]:
    """A new gateway for each fuzzer, which must still run afterwards."""
    (port,) = free_ports(LOOPBACK, 1)
    async with gateway_process(port, backend.ports, **PATIENT) as process:
        yield f"http://{LOOPBACK}:{port}"
        assert process.returncode is None


def run(directory: Path, *command: str | Path) -> int:
    """Run a fuzzer in its own directory; its output is shown."""
    directory.mkdir(parents=True, exist_ok=True)
    return subprocess.run(command, cwd=directory, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode


@pytest.mark.skipif(sys.version_info < (3, 11), reason="this Schemathesis needs Python 3.11")
async def test_rest(url: str) -> None:
    """Schemathesis; ``schemathesis replay`` with the printed argument repeats a failure."""
    config = ("--config-file", HERE / "schemathesis.toml")
    command = (Path(sys.executable).with_name("schemathesis"), *config, "fuzz", f"{url}/openapi.json")
    options = ("--max-time", f"{SECS:g}", "--max-response-time", str(SLOWEST_SECS), "--warnings", "off")
    assert await asyncio.to_thread(run, HOME / "rest", *command, *options) == 0


async def test_websocket(url: str) -> None:
    """Hypothesis; a failure is stored as a program and tried first in the next run."""
    speech = np.concatenate([*read_recordings().values()])
    server = Server(url, Settings().max_frame_bytes, speech, transcriber(url, speech))
    await asyncio.to_thread(converse_until, time.monotonic() + SECS, server, HOME / "websocket")


@pytest.mark.parametrize("target", ["audio", "containers", "frames"])
def test_coverage_guided(target: str) -> None:
    """Atheris; the printed file repeats a crash: ``python tests/fuzz/TARGET.py FILE``."""
    directory = HOME / target
    corpus = directory / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    options = (
        f"-max_total_time={SECS:.0f}",
        f"-timeout={SLOWEST_FILE_SECS if target == 'containers' else SLOWEST_SECS}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-max_len={LARGEST_INPUT_BYTES}",
        f"-artifact_prefix={directory}/",
        "-print_final_stats=1",
    )
    assert run(directory, sys.executable, HERE / f"{target}.py", corpus, *options) == 0
