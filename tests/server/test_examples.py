"""The programs in examples/ run as the documentation shows them."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
import soundfile

from amira.paths import ROOT
from amira.ports import Ports
from gateway.audio import RATE
from tests.support.servers import Gateway, Recordings


@pytest.fixture(scope="module")
def recording(recordings: Recordings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a WAV file, with the same samples as raw PCM beside it."""
    path = tmp_path_factory.mktemp("examples") / "speech.wav"
    samples = recordings["2609-156975-0001"]
    soundfile.write(path, samples, RATE)
    path.with_suffix(".pcm").write_bytes(samples.tobytes())
    return path


async def run_example(name: str, *arguments: str) -> list[str]:
    """Return the lines that an example prints."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "examples" / name), *arguments, stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    assert process.returncode == 0
    return printed.decode().splitlines()


async def test_stream_prints_partials_and_the_final(gateway: Gateway, recording: Path) -> None:
    *partials, final = await run_example("stream.py", str(recording), gateway.stream_url())
    assert partials
    assert all(" ms partial " in line for line in partials)
    assert final.split()[2] == "final"
    assert final.endswith("|"), "all of a final is stable"


async def test_ensemble_prints_the_stream_that_its_segments_join_to(triton: Ports, recording: Path) -> None:
    whole, *answers, joined = await run_example("ensemble.py", str(recording.with_suffix(".pcm")), f"127.0.0.1:{triton.grpc}")
    assert whole.startswith("(")
    assert whole.endswith(", 0, 1)")
    finals = [line.split(" ", 2)[2] for line in answers if line.split(" ")[1] == "1"]
    assert joined == "".join(text[1:-1] for text in finals)
