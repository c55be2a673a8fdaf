"""The programs in examples/ run as the documentation shows them."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import soundfile

from amira import AsyncClient, Transcript
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


async def run_example(name: str, *arguments: str, program: Sequence[str | Path] = (sys.executable,)) -> list[str]:
    """Return the lines that an example prints."""
    process = await asyncio.create_subprocess_exec(
        *program, str(ROOT / "examples" / name), *arguments, stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    assert process.returncode == 0
    return printed.decode().splitlines()


@pytest.fixture(scope="module")
async def transcript(gateway: Gateway, recording: Path) -> Transcript:
    async with AsyncClient(gateway.url) as client:
        return await client.transcribe(recording)


async def test_stream_prints_partials_and_the_final(gateway: Gateway, recording: Path) -> None:
    *partials, final = await run_example("stream.py", str(recording), gateway.stream_url())
    assert partials
    assert all(" ms partial " in line for line in partials)
    assert final.split()[2] == "final"
    assert final.endswith("|"), "all of a final is stable"


async def test_ensemble_prints_segments_and_their_concatenation(triton: Ports, recording: Path) -> None:
    whole, *answers, joined = await run_example("ensemble.py", str(recording.with_suffix(".pcm")), f"127.0.0.1:{triton.grpc}")
    assert whole.startswith("(")
    assert whole.endswith(", 0, 1)")
    finals = [line.split(" ", 2)[2] for line in answers if line.split(" ")[1] == "1"]
    assert joined == "".join(text[1:-1] for text in finals)


async def test_transcribe_prints_segments_and_words(gateway: Gateway, recording: Path, transcript: Transcript) -> None:
    segment, *words = await run_example("transcribe.py", str(recording), gateway.url)
    assert segment.endswith(f"] {transcript.text}")
    assert [line.split()[-1] for line in words] == [word.text for word in transcript.words]


async def test_resume_prints_the_stream(gateway: Gateway, recording: Path) -> None:
    *partials, final, lost = await run_example("resume.py", str(recording), gateway.url)
    assert partials
    assert " ms final   " in final
    assert lost == "0 connections were lost"


async def test_openai_client_prints_text_words_and_subtitles(gateway: Gateway, recording: Path, transcript: Transcript) -> None:
    printed = await run_example("openai_client.py", str(recording), f"{gateway.url}/v1")
    check_openai(printed, transcript)


@pytest.fixture(scope="module")
def node_packages() -> None:
    """Install the example's packages, if they are not there."""
    folder = ROOT / "examples" / "node"
    if not shutil.which("npm"):
        pytest.skip("no npm")
    if not (folder / "node_modules" / "openai").exists():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=folder, check=True, capture_output=True)


@pytest.mark.usefixtures("node_packages")
async def test_node_client_prints_the_same(gateway: Gateway, recording: Path, transcript: Transcript) -> None:
    check_openai(await run_example("node/transcribe.js", str(recording), f"{gateway.url}/v1", program=["node"]), transcript)


def check_openai(printed: list[str], transcript: Transcript) -> None:
    text, *timed = printed
    assert text == transcript.text
    words = timed[: len(transcript.words)]
    assert [line.split()[-1] for line in words] == [word.text for word in transcript.words]
    number, times, *rows = timed[len(words) :]
    assert (number, " --> " in times) == ("1", True)
    assert " ".join(rows).split()[: len(words)][0] == transcript.words[0].text


async def test_curl_example_runs_each_request(gateway: Gateway, recording: Path, transcript: Transcript) -> None:
    printed = await run_example("transcribe.sh", str(recording), gateway.url, program=["sh"])
    assert printed[1].startswith(f'{{"text":"{transcript.text}",')
    assert printed[3] == transcript.text
    assert [line.partition('"type":')[2].split('"')[1] for line in printed[4:] if line] == [
        "transcript.text.delta",
        "transcript.text.done",
    ]


async def test_load_test_prints_percentiles_and_plots_them(gateway: Gateway, recording: Path, tmp_path: Path) -> None:
    page = tmp_path / "load.html"
    options = ["--url", gateway.stream_url(), "--streams", "3", "--spread", "0.5", "--plot", str(page)]
    done, header, lag, final = await run_example("load_test_websocket.py", str(recording), *options)
    assert done.startswith("3 of 3 streams of ")
    assert header.split() == ["ms", "p50", "p90", "p95", "p99", "max"]
    for name, line in (("lag", lag), ("final", final)):
        title, *values = line.split()
        assert title == name
        assert 0 < int(values[0]) <= int(values[-1]) < 60_000
        assert list(map(int, values)) == sorted(map(int, values))
    assert page.read_text().count("<polyline") == 2
