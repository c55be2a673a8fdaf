"""A server in a process of its own: these tests run in another environment, which has not its packages."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import soxr

ROOT = Path(__file__).parents[2]
AMIRA = ROOT / ".venv" / "bin" / "amira"
KEY = "a-key-of-tests"
RATE = 24_000
READY_SECS = 180.0

Samples = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Server:
    """Where the server is, and the key for it."""

    url: str
    key: str = KEY

    @property
    def openai(self) -> str:
        return f"{self.url}/v1"


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    gateway, grpc, metrics = free_ports(3)
    url = f"http://127.0.0.1:{gateway}"
    settings = {
        "SERVER_HOST": "127.0.0.1",
        "SERVER_PORT": gateway,
        "TRITON_GRPC_PORT": grpc,
        "TRITON_METRICS_PORT": metrics,
        "API_KEYS": f'["{KEY}"]',
    }
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [AMIRA, "run"],
            cwd=ROOT,
            env={**os.environ, **{f"AMIRA_{name}": str(value) for name, value in settings.items()}},
            stdout=output,
            stderr=output,
        )
    try:
        deadline = time.monotonic() + READY_SECS
        while not ready(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"the server is not ready after {READY_SECS:g} s: {log.read_text()}"
            time.sleep(0.5)
        yield Server(url)
    finally:
        process.terminate()
        process.wait(60)


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=5) as answer:  # noqa: S310 (ours)
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="session")
def speech() -> Samples:
    """Two utterances between pauses, 24 kHz."""
    parts = [np.zeros(RATE, np.int16)]
    for name in ("jfk", "2033-164914-0000"):
        samples, rate = soundfile.read(ROOT / "tests" / "speech" / f"{name}.flac", dtype="int16", always_2d=True)
        mixed = samples[: 4 * rate].mean(axis=1).astype(np.int16)
        parts += [soxr.resample(mixed, rate, RATE), np.zeros(3 * RATE // 2, np.int16)]
    return np.concatenate(parts)
