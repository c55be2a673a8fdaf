"""Measuring a model that was imported, as docs/Models.md says."""

from __future__ import annotations

import asyncio
import shutil
import sys
from pathlib import Path

import orjson
import pytest

from amira.models.importing import import_model
from amira.paths import ROOT, SPEECH
from tests.support.published import imported


@pytest.fixture(scope="module")
def repository(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with one imported model."""
    repository = tmp_path_factory.mktemp("measured") / "models"
    import_model(str(sources["rnnt"]), "mine", repository)
    return repository


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    """A directory with one short labelled recording."""
    header, _, line, _ = (SPEECH / "manifest.tsv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "manifest.tsv").write_text(f"{header}\n{line}\n", encoding="utf-8")
    shutil.copy(SPEECH / line.partition("\t")[0], tmp_path)
    return tmp_path


async def measure(module: str, *arguments: str | Path) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", module, *arguments, cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await asyncio.wait_for(process.communicate(), 300)
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def test_error_rates_of_an_imported_model(repository: Path, speech: Path) -> None:
    code, output, errors = await measure("perf.evaluate", speech, "--repository", repository)
    assert code == 0, errors
    assert "1 recordings, 5 s" in output
    rates = {cells[1].strip(): float(cells[3]) for line in output.splitlines() if len(cells := line.split("│")) > 4}
    assert rates.keys() == {"batch", "stream"}
    assert min(rates.values()) > 50, "the weights are random"


async def test_windows_of_an_imported_model(repository: Path, speech: Path) -> None:
    results = ROOT / "perf" / "results" / "windows.md"
    before = results.read_bytes()
    code, output, errors = await measure("perf.windows", speech, "--quick", "--repository", repository, "--model", "mine")
    assert code == 0, errors
    (balanced,) = (line for line in output.splitlines() if line.startswith("| balanced |"))
    left, chunk, right = (float(cell) for cell in balanced.split("|")[2:5])
    assert chunk < left
    assert right > 0
    assert results.read_bytes() == before, "those are the bundled model's"


async def test_latencies_of_a_cached_model(speech: Path) -> None:
    """Those that the model has, with quick and without: a graph fixes its chunk."""
    repository = imported("several")
    code, output, errors = await measure("perf.windows", speech, "--repository", repository)
    assert code == 0, errors
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("| ")]
    measured = {row[0]: [float(cell) for cell in row[1:4]] for row in rows[1:]}
    assert measured == {"low": [0.11, 0.08, 0.02], "balanced, throughput": [0.11, 0.56, 0.02]}
    assert all(float(row[7]) > 0 and float(row[8]) > 0 for row in rows[1:])


@pytest.mark.slow
async def test_costs_of_caches() -> None:
    code, output, errors = await measure("perf.caches", "--quick")
    assert code == 0, errors
    encoders, carried = output.split("\n\n")[1:]
    rows = [line.split("|") for line in encoders.splitlines()[2:]]
    assert [row[1].strip() for row in rows] == ["windows", *["frames cached"] * 3, *["keys and values cached"] * 3]
    assert all(float(row[4]) > 0 for row in rows)
    assert len(carried.splitlines()) == 4


@pytest.mark.slow
async def test_long_recordings_in_short(speech: Path, tmp_path: Path) -> None:
    """A minute instead of hours, by the command that measures those."""
    code, output, errors = await measure(
        "perf.long_recordings", speech, "--hours", "0.005", "--streams", "2", "--results", tmp_path
    )
    assert code == 0, errors
    report = orjson.loads((tmp_path / "long.json").read_bytes())
    assert orjson.loads(output) == report
    assert list(report["files"]) == ["0.005 h flac", "0.005 h mp3", "0.005 h m4a", "0.02 h flac"]
    assert all(file["segments"] and {"gateway", "encoder"} <= file["peak_rss_mb"].keys() for file in report["files"].values())
    assert 0 < report["beside"]["before_p95_ms"] < 10_000
    assert report["beside"]["recordings"] == 8
    assert (tmp_path / "long-recordings.png").stat().st_size > 10_000


@pytest.mark.parametrize("module", ["perf.evaluate", "perf.windows"])
async def test_unknown_model_is_named(repository: Path, speech: Path, module: str) -> None:
    code, _, errors = await measure(module, speech, "--repository", repository, "--model", "other")
    assert code == 2
    assert errors.endswith(f"{repository} has no ensemble other; it has mine: choose one by --model\n")
