"""Short, reproducible forms of ``make fuzz``."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from amira.paths import ROOT
from gateway.config.settings import Settings
from tests.support.dialogue import Server, converse, transcriber
from tests.support.servers import Gateway, Recordings

pytestmark = pytest.mark.usefixtures("no_sequence_left")


@pytest.mark.parametrize("examples", [4, pytest.param(12, marks=pytest.mark.slow)])
async def test_dialogues(gateway: Gateway, recordings: Recordings, examples: int) -> None:
    speech = np.concatenate([*recordings.values()])
    server = Server(gateway.url, Settings().max_frame_bytes, speech, transcriber(gateway.url, speech))
    chosen = {"max_examples": examples, "stateful_step_count": 12, "derandomize": True, "database": None}
    await asyncio.to_thread(converse, server, **chosen)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="this Schemathesis needs Python 3.11")
@pytest.mark.parametrize("examples", [20, pytest.param(100, marks=pytest.mark.slow)])
async def test_answers_are_those_of_the_openapi(gateway: Gateway, tmp_path: Path, examples: int) -> None:
    process = await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("schemathesis"),
        "--no-color",
        "--config-file",
        ROOT / "tests" / "fuzz" / "schemathesis.toml",
        "run",
        f"{gateway.url}/openapi.json",
        "--generation-deterministic",
        f"--max-examples={examples}",
        "--warnings=off",
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert b"11 selected / 11 total" in output
