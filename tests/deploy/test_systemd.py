"""The systemd units, checked by systemd and compared with the settings."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.main import get_command

from amira.cli import app
from gateway.config.settings import DEFAULT_TRITON_PORT, Settings

Need = Callable[[str], str]

UNITS = ("amira-gateway", "amira-triton")
MOST_EXPOSED = 20
"""Maximum exposure by systemd-analyze security, of 100; a unit without restrictions has 96."""


def entries(deploy: Path, unit: str) -> dict[str, str]:
    """Return the last value of each entry."""
    text = (deploy / "systemd" / f"{unit}.service").read_text().replace("\\\n", " ")
    return dict(re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE))


@pytest.fixture
def units(deploy: Path, tmp_path: Path) -> Path:
    """Return the units, with programs that exist on any machine, and the docker.service that one unit needs."""
    for unit in UNITS:
        text = (deploy / "systemd" / f"{unit}.service").read_text()
        text, replaced = re.subn(r"=(-?)/(?:opt/amira|usr)/bin/(?:amira|docker|curl) ", r"=\1/bin/true ", text)
        assert replaced == len(re.findall(r"^Exec", text, re.MULTILINE))
        (tmp_path / f"{unit}.service").write_text(text)
    (tmp_path / "docker.service").write_text("[Service]\nExecStart=/bin/true\n")
    return tmp_path


@pytest.mark.parametrize("unit", UNITS)
def test_unit_passes_systemd(need: Need, units: Path, unit: str) -> None:
    done = subprocess.run(
        [need("systemd-analyze"), "verify", "--man=no", str(units / f"{unit}.service")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{units}:"},  # and the system's own
    )
    assert done.returncode == 0, done.stderr
    assert unit not in done.stderr


@pytest.mark.parametrize("unit", UNITS)
def test_unit_is_confined(need: Need, deploy: Path, unit: str) -> None:
    path = deploy / "systemd" / f"{unit}.service"
    done = subprocess.run(
        [need("systemd-analyze"), "security", "--offline=true", f"--threshold={MOST_EXPOSED}", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_the_gateway_may_drain(deploy: Path) -> None:
    gateway, defaults = entries(deploy, "amira-gateway"), Settings()
    assert gateway["KillSignal"] == "SIGTERM"
    assert int(gateway["TimeoutStopSec"]) > defaults.drain_timeout_secs + 2 * defaults.inference_timeout_secs + 30
    program, command = gateway["ExecStart"].split()
    assert program.endswith("/amira")
    assert command in get_command(app).commands  # type: ignore[attr-defined]
    assert gateway["ExecStartPost"].endswith(f"http://127.0.0.1:{defaults.server_port}/health/ready")
    assert "MemoryDenyWriteExecute" not in gateway


def test_triton_is_the_one_of_the_compose_file_and_stays_on_this_host(deploy: Path) -> None:
    triton = entries(deploy, "amira-triton")
    assert triton["Environment"].removeprefix("IMAGE=") in (deploy.parent / "docker-compose.yml").read_text()
    assert "--user 1000 --cap-drop ALL --security-opt no-new-privileges" in triton["ExecStart"]
    (first, last) = re.findall(r"--publish 127\.0\.0\.1:(\d+)-(\d+):8000-8002", triton["ExecStart"])[0]
    assert int(first) <= DEFAULT_TRITON_PORT <= int(last)
    (patience,) = re.findall(r"--time (\d+)", triton["ExecStop"])
    assert int(triton["TimeoutStopSec"]) > int(patience)
