"""Public models by name: downloaded, imported and served by one command."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import pytest

from amira.models import known
from amira.models.configs import ModelError
from amira.models.importing import ImportOptions
from amira.models.known import KNOWN, KnownModel, ensure_imported
from amira.models.repository import recognisers
from amira.ports import LOOPBACK, free_ports
from tests.support.commands import AMIRA, environment, run_amira, until
from tests.support.hub import hub_with
from tests.support.servers import Recordings
from tests.support.streaming_models import IcefallShape, NemoShape, build_icefall, build_nemo_cached


class Public(NamedTuple):
    """A hub, and the requests that it received."""

    url: str
    requests: list[str]


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Public]:
    root = tmp_path_factory.mktemp("hub")
    build_icefall(root / "zipformer", IcefallShape(seed=1, blank_bias=8.0))
    for name, right in (("80", 0), ("560", 6)):
        build_nemo_cached(root / name, NemoShape(seed=2, blank_bias=6.0, right=right), external=True)
    requests: list[str] = []
    with hub_with({f"owner/{path.name}": path for path in root.iterdir()}, requests) as url:
        yield Public(url, requests)


@pytest.fixture
def on_hub(public: Public, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Public:
    monkeypatch.setenv("HF_ENDPOINT", public.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", public.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    public.requests.clear()
    return public


def test_model_is_downloaded_once(on_hub: Public, tmp_path: Path) -> None:
    repository, name = ensure_imported("owner/zipformer", tmp_path / "models")
    assert (repository, name) == (tmp_path / "models" / "owner_zipformer", "zipformer")
    assert [recogniser.name for recogniser in recognisers(repository)] == ["zipformer"]
    assert any(path.endswith("/encoder.onnx") for path in on_hub.requests)
    on_hub.requests.clear()
    assert ensure_imported("owner/zipformer", tmp_path / "models") == (repository, name)
    assert on_hub.requests == []


@pytest.mark.usefixtures("on_hub")
def test_short_name_imports_its_latencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ImportOptions(latencies={"low": "owner/80"})
    monkeypatch.setitem(KNOWN, "mine", KnownModel("owner/560", "MIT", "none", "cached", 1, 1, options))
    repository, name = ensure_imported("mine", tmp_path / "models")
    (recogniser,) = recognisers(repository)
    assert name == recogniser.name == "mine"
    assert "cached, chunks of balanced 560 ms, low 80 ms" in recogniser.describe()


@pytest.mark.usefixtures("on_hub")
def test_interrupted_import_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(known, "import_model", stop)
        with pytest.raises(KeyboardInterrupt):
            ensure_imported("owner/zipformer", tmp_path / "models")
    assert list((tmp_path / "models").iterdir()) == []
    repository, _ = ensure_imported("owner/zipformer", tmp_path / "models")
    assert recognisers(repository)


@pytest.mark.usefixtures("on_hub")
def test_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(ModelError, match=r"has 0\.0 GB of free space; the model needs about 0\.0 GB"):
        ensure_imported("owner/zipformer", tmp_path / "models")


def test_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model 'parakeet' is unknown; expected parakeet-tdt-0.6b-v2, .*owner/name"):
        ensure_imported("parakeet", tmp_path)


async def test_known_models_are_listed() -> None:
    code, output, errors = await run_amira("models", "known")
    assert code == 0, errors
    lines = output.splitlines()
    assert len(lines) == len(KNOWN) + 1
    assert "zipformer-streaming-en" in output
    assert "csukuangfj/sherpa-onnx-streaming-zipformer-en-2023-06-26" in output


async def test_offline_start_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"http://{LOOPBACK}:{free_ports(LOOPBACK, 1)[0]}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    code, _, errors = await run_amira("run", "--model", "owner/other", models_home=tmp_path / "models", log_level="warning")
    assert code == 2
    (line,) = errors.splitlines()
    assert line.startswith("amira: owner/other is no directory here, and can't be had from Hugging Face: ")


@pytest.mark.usefixtures("on_hub")
async def test_one_command_serves_a_public_model(tmp_path: Path, recordings: Recordings) -> None:
    variables = environment(models_home=tmp_path / "models", log_level="warning")
    process = await asyncio.create_subprocess_exec(
        AMIRA, "run", "--model", "owner/zipformer", env=variables,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://{variables['AMIRA_SERVER_HOST']}:{variables['AMIRA_SERVER_PORT']}"
    try:
        async with httpx.AsyncClient(timeout=60) as http:

            async def ready() -> bool:
                assert process.returncode is None
                try:
                    return (await http.get(f"{url}/health/ready")).status_code == 200
                except httpx.HTTPError:
                    return False

            await until(ready, timeout_secs=90)
            headers = {"Content-Type": "application/octet-stream"}
            body = recordings["jfk"].tobytes()
            answer = await http.post(f"{url}/v2/decode/batch/amira", content=body, headers=headers)
        assert answer.status_code == 200
        assert len(answer.json()["tokens"]) > 100
    finally:
        process.terminate()
        await process.wait()
