"""The ``amira`` command, a Triton or a gateway for one test, and waiting."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from amira.engine.process import TritonProcess
from amira.engine.wheel import Engine
from amira.paths import ENGINE_HOME, ONNXRUNTIME_BACKEND, ROOT
from amira.ports import LOOPBACK, Ports, free_ports

AMIRA = Path(sys.executable).with_name("amira")
STRANGERS = (sys.executable, Path(__file__).with_name("strangers.py"))
"""Like ``amira``, but its gateway counts loopback clients too."""

SESSION_KEY = "one for all gateways"


def environment(**settings: Any) -> dict[str, str]:
    """Return the environment of a command, with free ports and these settings."""
    gateway, grpc, metrics = free_ports(LOOPBACK, 3)
    ports = {
        "server_host": LOOPBACK,
        "server_port": gateway,
        "triton_grpc_port": grpc,
        "triton_metrics_port": metrics,
    }
    return {**os.environ, **{f"AMIRA_{name.upper()}": str(value) for name, value in {**ports, **settings}.items()}}


async def run_amira(*arguments: str, timeout_secs: float = 60, **settings: Any) -> tuple[int, str, str]:
    """Run a command; return its exit code, standard output and standard error."""
    process = await asyncio.create_subprocess_exec(
        AMIRA, *arguments, env=environment(**settings), cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await asyncio.wait_for(process.communicate(), timeout_secs)
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


async def until(condition: Callable[[], Any], timeout_secs: float = 30) -> None:
    """Poll a condition, a function or a coroutine function, until it is true.

    Raises:
        AssertionError: it was not true in time.
    """
    deadline = asyncio.get_running_loop().time() + timeout_secs
    while True:
        result = condition()
        if await result if asyncio.iscoroutine(result) else result:
            return
        assert asyncio.get_running_loop().time() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.1)


async def until_ready(url: str, timeout_secs: float = 60) -> None:
    """Wait until a gateway, which may still be starting, is ready."""
    async with httpx.AsyncClient(timeout=timeout_secs) as http:

        async def ready() -> bool:
            try:
                return (await http.get(f"{url}/health/ready")).status_code == 200
            except httpx.TransportError:
                return False

        await until(ready, timeout_secs)


@asynccontextmanager
async def gateway_process(
    port: int, triton: Ports, command: Sequence[str | Path] = (AMIRA,), stderr: int = subprocess.DEVNULL, /, **settings: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a gateway in a process of its own until the context is left.

    Args:
        port: port to listen on.
        triton: ports of its Triton.
        command: the program; its argument ``serve`` starts a gateway.
        stderr: where its log goes, as ``subprocess`` names it.
        settings: settings other than those here.
    """
    env = {
        **os.environ,
        "AMIRA_SERVER_HOST": LOOPBACK,
        "AMIRA_SERVER_PORT": str(port),
        "AMIRA_TRITON_ENDPOINT": f"{triton.host}:{triton.grpc}",
        "AMIRA_SESSION_KEY": SESSION_KEY,
        "AMIRA_DRAIN_TIMEOUT_SECS": "0",
        **{f"AMIRA_{name.upper()}": value for name, value in settings.items()},
    }
    process = await asyncio.create_subprocess_exec(*command, "serve", env=env, stderr=stderr)
    try:
        await until_ready(f"http://{LOOPBACK}:{port}")
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@asynccontextmanager
async def triton_with(model_repository: Path) -> AsyncIterator[Ports]:
    """Run a Triton for one test."""
    ports = Ports(LOOPBACK, *free_ports(LOOPBACK, 2))
    server = TritonProcess(
        Engine.prepare(ENGINE_HOME, ONNXRUNTIME_BACKEND),
        model_repository,
        ports,
        ENGINE_HOME / f"triton-tests-{ports.grpc}.log",
    )
    await server.start()
    try:
        yield ports
    finally:
        await server.stop(timeout_secs=0)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
