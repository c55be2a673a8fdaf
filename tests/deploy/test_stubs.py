"""A Triton that lost a Python model's process goes on, and calls itself ready: whatever runs its container must notice."""

from __future__ import annotations

import asyncio
import re
import shlex
import subprocess
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
import yaml

from amira.engine.service import ENGINE_HOME, LOOPBACK, MODEL_REPOSITORY, ONNXRUNTIME_BACKEND, ROOT
from amira.engine.triton import Engine, Ports, Triton, free_ports

EVERYONE = "/proc/[0-9]*/stat"
"""In a container these are Triton and what it started; here there are others, so a test looks at its own Triton's."""


class Victim(NamedTuple):
    """A Triton that may be broken."""

    triton: Triton
    http_port: int

    @property
    def stubs(self) -> list[psutil.Process]:
        return list(psutil.Process(self.triton.pid).children())

    def run(self, check: str) -> int:
        """Exit status of a container's check, here."""
        assert EVERYONE in check
        check = check.replace(EVERYONE, " ".join(f"/proc/{stub.pid}/stat" for stub in self.stubs))
        check = check.replace("localhost:8000", f"{LOOPBACK}:{self.http_port}")
        return subprocess.run(["sh", "-c", check], check=False, stdout=subprocess.DEVNULL).returncode

    async def lose_a_stub(self) -> None:
        stub = self.stubs[0]
        stub.kill()
        while stub.status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.01)


@pytest.fixture
async def victim(need: Callable[[str], str]) -> AsyncIterator[Victim]:
    need("curl")  # the checks call it
    ports = Ports(LOOPBACK, *free_ports(LOOPBACK, 3))
    engine = Engine.prepare(ENGINE_HOME, ONNXRUNTIME_BACKEND)
    triton = Triton(engine, MODEL_REPOSITORY, ports, ENGINE_HOME / "triton-stubs.log")
    await triton.start()
    yield Victim(triton, ports.http)
    await triton.stop()


def of_compose() -> str:
    triton: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["triton"]
    shell, check = triton["healthcheck"]["test"]
    assert shell == "CMD-SHELL"
    assert triton["init"] is True
    assert triton["restart"] == "unless-stopped"
    return str(check).replace("$$", "$")


def of_systemd() -> str:
    unit = (ROOT / "deploy/systemd/amira-triton.service").read_text()
    (command,) = re.findall(r"^ExecStart=(.*)$", unit.replace("\\\n", " "), re.MULTILINE)
    words = shlex.split(command)
    assert "--init" in words
    assert "Restart=always" in unit
    return words[words.index("--health-cmd") + 1].replace("$$", "$")


def of_kubernetes() -> str:
    triton, *_ = yaml.safe_load_all((ROOT / "deploy/kubernetes/base/triton.yaml").read_text())
    (container,) = triton["spec"]["template"]["spec"]["containers"]
    *shell, check = container["livenessProbe"]["exec"]["command"]
    assert shell == ["sh", "-c"]
    return str(check)


@pytest.mark.parametrize("check", [of_compose(), of_systemd()], ids=["compose", "systemd"])
async def test_docker_ends_it(victim: Victim, check: str) -> None:
    assert victim.run(check) == 0
    assert victim.triton.pid
    await victim.lose_a_stub()
    victim.run(check)
    for _ in range(100):
        if victim.triton.pid is None:
            return
        await asyncio.sleep(0.05)
    pytest.fail("Triton still runs")


async def test_kubernetes_takes_it_for_dead(victim: Victim, http: httpx.AsyncClient) -> None:
    assert victim.run(of_kubernetes()) == 0
    await victim.lose_a_stub()
    assert victim.run(of_kubernetes()) == 1
    answer = await http.get(f"http://{LOOPBACK}:{victim.http_port}/v2/health/ready")
    assert answer.status_code == 200, "this Triton tells by itself; does it need the check still?"
