"""A Triton that lost a Python model's process reports itself ready: the container's health check must detect this."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
import yaml

from amira.engine.process import TritonProcess
from amira.engine.wheel import Engine
from amira.paths import ENGINE_HOME, ONNXRUNTIME_BACKEND, ROOT
from amira.ports import LOOPBACK, Ports, free_ports
from tests.support.repositories import served_repository

SCRIPT = ROOT / "deploy" / "kubernetes" / "base" / "triton-health.sh"


class Victim(NamedTuple):
    """A Triton that tests may break."""

    triton: TritonProcess
    http_port: int
    metrics_port: int
    folder: Path

    @property
    def stubs(self) -> list[psutil.Process]:
        return list(psutil.Process(self.triton.pid).children())

    @property
    def well(self) -> bool:
        """Whether it runs with all processes of its models."""
        ended = (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
        return self.triton.pid is not None and not any(stub.status() in ended for stub in self.stubs)

    def check(self, *options: str) -> int:
        """Run the containers' check on this Triton, and return its exit status."""
        assert self.triton.pid
        pids = (self.triton.pid, *(stub.pid for stub in self.stubs))
        environment = {
            **os.environ,
            "STATS": " ".join(f"/proc/{pid}/stat" for pid in pids),  # in a container there are no other processes
            "URL": f"http://{LOOPBACK}:{self.http_port}",
            "METRICS": f"http://{LOOPBACK}:{self.metrics_port}/metrics",
            "FAILURES": str(self.folder / "failures"),
        }
        return subprocess.run(["sh", str(SCRIPT), *options], check=False, env=environment).returncode

    async def ended(self) -> bool:
        for _ in range(100):
            if self.triton.pid is None:
                return True
            await asyncio.sleep(0.05)
        return False

    async def lose_a_stub(self) -> None:
        stub = self.stubs[0]
        stub.kill()
        while stub.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
async def running(need: Callable[[str], str]) -> AsyncIterator[Victim]:
    need("curl")  # the checks call it
    ports = Ports(LOOPBACK, *free_ports(LOOPBACK, 3))
    engine = Engine.prepare(ENGINE_HOME, ONNXRUNTIME_BACKEND)
    triton = TritonProcess(engine, served_repository(warm=False), ports, ENGINE_HOME / "triton-stubs.log")
    assert ports.http
    yield Victim(triton, ports.http, ports.metrics, Path())
    await triton.stop(timeout_secs=0)


@pytest.fixture
async def victim(running: Victim, tmp_path: Path) -> Victim:
    """Return a healthy Triton; it is restarted if the test before broke it."""
    if not running.well:
        await running.triton.stop(timeout_secs=0)
        await running.triton.start()
    return running._replace(folder=tmp_path)


def of_compose() -> list[str]:
    triton: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["triton"]
    assert triton["init"] is True, "nothing in a container can kill its process 1"
    assert triton["restart"] == "unless-stopped"
    assert f"./{SCRIPT.relative_to(ROOT)}:/triton-health.sh:ro" in triton["volumes"]
    how, *command = triton["healthcheck"]["test"]
    assert how == "CMD"
    return [str(word) for word in command]


def of_systemd() -> list[str]:
    unit = (ROOT / "deploy/systemd/amira-triton.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", unit.replace("\\\n", " "), re.MULTILINE)
    words = shlex.split(command)
    assert "--init" in words
    assert "Restart=always" in unit
    assert "/srv/amira/triton-health.sh:/triton-health.sh:ro" in words
    return words[words.index("--health-cmd") + 1].split()


def of_kubernetes() -> list[str]:
    triton, *_ = yaml.safe_load_all((ROOT / "deploy/kubernetes/base/triton.yaml").read_text())
    pod = triton["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {"name": "health", "configMap": {"name": "amira-triton-health"}} in pod["volumes"]
    kustomization = yaml.safe_load((SCRIPT.parent / "kustomization.yaml").read_text())
    assert {"name": "amira-triton-health", "files": [SCRIPT.name]} in kustomization["configMapGenerator"]
    return [str(word) for word in container["livenessProbe"]["exec"]["command"]]


@pytest.mark.parametrize("command", [of_compose(), of_systemd()], ids=["compose", "systemd"])
def test_docker_runs_the_check_that_ends_triton(command: list[str]) -> None:
    assert command == ["sh", "/triton-health.sh", "--kill"]


def test_kubernetes_runs_the_check() -> None:
    assert of_kubernetes() == ["sh", "/health/triton-health.sh"]


async def test_check_says_nothing_of_another_ensemble(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENSEMBLE", "no_such_ensemble")
    assert victim.check("--kill") == 0


async def test_check_fails_without_triton_and_ends_nothing(victim: Victim) -> None:
    """Triton does not listen while models load."""
    nowhere = victim._replace(http_port=1)
    for _ in range(4):
        assert nowhere.check("--kill") == 1
    assert victim.triton.pid


async def test_docker_ends_a_triton_after_three_failed_canaries(victim: Victim) -> None:
    (stub,) = (stub for stub in victim.stubs if "decoder_joint_0" in " ".join(stub.cmdline()))
    assert victim.check("--kill") == 0
    stub.suspend()
    assert victim.check("--kill") == 1
    assert victim.check("--kill") == 1
    assert victim.triton.pid, "it may only be slow"
    assert victim.check("--kill") == 1
    assert await victim.ended()


async def test_lost_process_fails_the_check(victim: Victim, http: httpx.AsyncClient) -> None:
    """In Kubernetes the check only fails; in Docker it ends Triton."""
    assert victim.check() == 0
    await victim.lose_a_stub()
    assert victim.check() == 1
    answer = await http.get(f"http://{LOOPBACK}:{victim.http_port}/v2/health/ready")
    assert answer.status_code == 200, "this Triton tells by itself; does it need the check still?"
    assert victim.check("--kill") == 1
    assert await victim.ended()
