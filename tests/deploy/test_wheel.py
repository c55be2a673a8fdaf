"""The wheel, installed into a fresh environment and used in an empty folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest

from amira.paths import ROOT
from amira.ports import LOOPBACK, free_ports
from tests.support.environments import fresh_environment, site_packages

TRANSCRIPT = "ask not what your country can do for you"


def build(source: Path, into: Path, target: str) -> Path:
    subprocess.run([Path(sys.executable).with_name("hatchling"), "build", "-t", target, "-d", into], cwd=source, check=True)
    (built,) = into.iterdir()
    return built


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="session")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment with only the base package."""
    return fresh_environment(tmp_path_factory.mktemp("base") / "venv", wheel, ())


@pytest.fixture(scope="session")
def server(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment with the gateway, as in the Dockerfile: without the wheel's models and recordings."""
    venv = fresh_environment(tmp_path_factory.mktemp("server") / "venv", wheel, ("server", "tracing"))
    shutil.rmtree(site_packages(venv) / "amira" / "data")
    return venv


@pytest.fixture(scope="session")
def engine(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment with the gateway and the embedded Triton."""
    return fresh_environment(tmp_path_factory.mktemp("engine") / "venv", wheel, ("server", "engine"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an empty folder to work in."""
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    """Return a user's environment variables: a new cache, and nothing of this checkout."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return {**kept, "XDG_CACHE_HOME": str(tmp_path / "cache"), **variables}


def run(command: Sequence[str | Path], folder: Path, **variables: str) -> tuple[int, str, str]:
    env = environment(folder.parent, **variables)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_wheel_and_source_distribution_have_all_that_is_tracked(wheel: Path, tmp_path: Path) -> None:
    """Even if the checkout has a prepared engine, which links to the backend."""
    directories = ["amira", "gateway", "model-repo", "backends", "tests/speech"]
    command = ["git", "ls-files", "-z", *directories]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.rstrip("\0").split("\0")
    with tarfile.open(build(ROOT, tmp_path / "source", "sdist")) as archive:
        assert set(tracked) <= {name.partition("/")[2] for name in archive.getnames()}
    moved = {"model-repo": "amira/data/model-repo", "backends": "amira/data/backends", "tests": "amira/data"}
    expected = {"/".join([moved.get(top, top), rest]) for top, _, rest in (path.partition("/") for path in tracked)}
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


def test_base_package_has_the_clients(base: Path, folder: Path) -> None:
    names = "AsyncClient, Client, LiveStream, Segment, StreamError, SyncLiveStream, Transcript, Word"
    program = f"from amira import {names}; Client().close()"
    assert run([base / "bin" / "python", "-W", "error", "-c", program], folder) == (0, "", "")
    assert (site_packages(base) / "amira" / "py.typed").exists()
    code, output, _ = run([base / "bin" / "amira", "version"], folder)
    assert (code, output) == (0, f"{version('amira-asr')}\n")


@pytest.mark.parametrize(
    ("command", "extras"),
    [
        (["run"], "server,engine"),
        (["demo"], "server,engine"),
        (["serve"], "server"),
        (["config", "show"], "server"),
        (["models", "list"], "server,models"),
    ],
)
def test_missing_extra_is_named_in_one_line(base: Path, folder: Path, command: list[str], extras: str) -> None:
    code, output, errors = run([base / "bin" / "amira", *command], folder)
    assert (code, output) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith("amira: ")
    assert line.endswith(f"is not installed; this command needs pip install 'amira-asr[{extras}]'")


@contextmanager
def started(command: Sequence[str | Path], folder: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Run a command in the background; its exit code must be 0."""
    env = environment(folder.parent, **variables)
    with subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
        finally:
            process.kill()


def test_server_extra_serves(server: Path, folder: Path) -> None:
    program = "import opentelemetry.sdk.trace, opentelemetry.exporter.otlp.proto.http"
    assert run([server / "bin" / "python", "-c", program], folder) == (0, "", "")
    code, _, errors = run([server / "bin" / "amira", "run"], folder)
    assert code == 2
    assert errors.endswith("pip install 'amira-asr[server,engine]'\n")
    (port,) = free_ports(LOOPBACK, 1)
    variables = {"AMIRA_SERVER_HOST": LOOPBACK, "AMIRA_SERVER_PORT": str(port), "AMIRA_TRITON_ENDPOINT": "localhost:1"}
    with started([server / "bin" / "amira", "serve"], folder, **variables):
        transport = httpx.HTTPTransport(retries=8)  # for 15 s, while no client listens
        with httpx.Client(transport=transport) as http:
            assert http.get(f"http://{LOOPBACK}:{port}/health/live").status_code == 200
    assert list(folder.iterdir()) == []


def test_run_and_demo_work_in_an_empty_folder(engine: Path, folder: Path) -> None:
    """With the engine in the user's cache; nothing is written to the folder or beside the packages."""
    installed = files(site_packages(engine))
    gateway_port, *triton_ports = map(str, free_ports(LOOPBACK, 3))
    variables = {"AMIRA_SERVER_HOST": LOOPBACK, "AMIRA_SERVER_PORT": gateway_port}
    names = [f"AMIRA_TRITON_{name}_PORT" for name in ("GRPC", "METRICS")]
    amira, speech = engine / "bin" / "amira", site_packages(engine) / "amira" / "data" / "speech"
    with started([amira, "run"], folder, **variables, **dict(zip(names, triton_ports, strict=True))) as process:
        assert process.stderr
        shown = ""
        for line in process.stderr:  # it ends with the process
            shown += line
            if line == "Ctrl-C stops it.\n":
                break
        assert f"--data-binary @{speech}/jfk.flac" in shown, shown
        command: list[str | Path] = [amira, "transcribe", speech / "jfk.flac"]
        code, output, errors = run(command, folder, AMIRA_BASE_URL=f"http://{LOOPBACK}:{gateway_port}")
        assert (code, errors) == (0, "")
        assert TRANSCRIPT in output
    code, output, errors = run([amira, "demo"], folder)
    assert code == 0, errors
    assert output.count("real-time factor") == 3
    assert output.split().count("final") == 3
    assert all(path.name in output for path in speech.glob("*.flac"))
    assert TRANSCRIPT in " ".join(output.split())
    (home,) = (folder.parent / "cache" / "amira-asr").iterdir()
    assert (home / "backends" / "python").is_dir()
    assert list(folder.iterdir()) == []
    assert files(site_packages(engine)) == installed


def files(directory: Path) -> set[Path]:
    return {path for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("variables", "uname", "line"),
    [
        (["PYTHON=3.13"], "Linux x86_64", "make: PYTHON=3.13 is no Python 3.10, 3.11 or 3.12, which the embedded Triton needs"),
        (["PYTHON=/bin/true"], "Darwin arm64", "make: the embedded Triton needs x86-64 Linux, this is Darwin arm64; "),
    ],
)
def test_setup_names_requirements(tmp_path: Path, variables: list[str], uname: str, line: str) -> None:
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "uname").write_text(f"#!/bin/sh\necho {uname}\n")
    (tmp_path / "uname").chmod(0o755)
    # The tests may run below make, whose variables would change the prefix of its messages.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    command = ["make", "setup", *variables]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    first, *rest = done.stderr.splitlines()
    assert first.startswith(line)
    assert all(other.startswith("make: ***") for other in rest)
    assert not (tmp_path / ".venv").exists()


@pytest.mark.slow
def test_installation_from_the_registry(wheel: Path, folder: Path) -> None:
    """pip resolves and downloads the requirements of the extras."""
    venv = folder.parent / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    subprocess.run([venv / "bin" / "pip", "install", "--quiet", f"{wheel}[server,engine]"], check=True)
    subprocess.run([venv / "bin" / "pip", "check"], check=True)
    code, output, errors = run([venv / "bin" / "amira", "demo"], folder)
    assert code == 0, errors
    assert output.count("real-time factor") == 3
