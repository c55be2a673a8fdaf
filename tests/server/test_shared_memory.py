"""A full /dev/shm: recordings that need more of it are refused by name, readiness shows it, and all recovers by itself.

The server runs in a mount namespace with a small /dev/shm of its own.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from amira.engine.process import LOW_SHARED_MEMORY_BYTES, MIN_SHARED_MEMORY_BYTES
from amira.paths import ROOT
from tests.support.commands import AMIRA, environment, until, until_ready

NAMESPACE = ("unshare", "--map-root-user", "--mount", "sh", "-c")
SIZE_MB = (MIN_SHARED_MEMORY_BYTES >> 20) + 8
MOUNT = f"mount -t tmpfs -o size={SIZE_MB}m tmpfs /dev/shm && exec "
LEFT_BYTES = 100_000
NOTICED_SECS = 20.0


def pcm(secs: float) -> bytes:
    return (np.random.default_rng(0).standard_normal(round(secs * 16_000)) * 300).astype("<i2").tobytes()


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    if not shutil.which("unshare") or subprocess.run([*NAMESPACE, f"{MOUNT} true"], check=False).returncode:
        reason = "this user may not mount in a namespace of its own"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)


@asynccontextmanager
async def server_with_small_memory(log: Path) -> AsyncIterator[tuple[str, Path]]:
    """Yield the URL of a server, and its /dev/shm."""
    env = environment(canary_interval_secs=1)
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*NAMESPACE, f"{MOUNT}{AMIRA} run", env=env, cwd=ROOT, stderr=output)
    url = f"http://127.0.0.1:{env['AMIRA_SERVER_PORT']}"
    try:
        await until_ready(url, 120)
        yield url, Path(f"/proc/{process.pid}/root/dev/shm")
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        await asyncio.wait_for(process.wait(), 60)
        psutil.wait_procs(children, 30)


def fill(memory: Path) -> Path:
    """Fill a file system but for ``LEFT_BYTES``; return the file."""
    used = sum(path.stat().st_blocks * 512 for path in memory.iterdir())
    filler = memory / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, (SIZE_MB << 20) - used - LEFT_BYTES)
    return filler


async def test_full_shared_memory_is_named_and_recovers(tmp_path: Path) -> None:
    log = tmp_path / "log"
    async with server_with_small_memory(log) as (url, memory), httpx.AsyncClient(timeout=120) as http:

        async def post(secs: float) -> httpx.Response:
            headers = {"Content-Type": "audio/pcm"}
            return await http.post(f"{url}/v2/decode/batch/amira", content=pcm(secs), headers=headers)

        async def ready() -> int:
            return (await http.get(f"{url}/health/ready")).status_code

        assert (await post(1)).status_code == 200
        filler = fill(memory)
        await until(lambda: b'"event": "shared memory low"' in log.read_bytes(), NOTICED_SECS)
        assert (await post(1)).status_code == 200, "what needs no more memory is served"
        refused = await post(25)
        assert refused.status_code == 503, refused.text
        assert refused.json()["error"]["code"] == "no_capacity"
        assert refused.json()["error"]["message"] == "the recogniser is short of shared memory; please retry"
        assert "Retry-After" in refused.headers
        assert await ready() == 503
        late = await post(25)
        assert (late.status_code, late.json()["error"]["message"]) == (503, refused.json()["error"]["message"])
        await asyncio.sleep(5)
        assert await ready() == 503, "canaries are as long as the recording"
        filler.unlink()

        async def recovered() -> bool:
            return await ready() == 200

        await until(recovered, NOTICED_SECS)
        assert (await post(25)).status_code == 200
    lines = log.read_text(encoding="utf-8")
    for event in ("shared memory low", "shared memory restored", "shared memory exhausted"):
        assert lines.count(f'"event": "{event}"') == 1, event
    assert "triton killed" not in lines, "a new Triton could not load its models"
    assert (SIZE_MB << 20) > LOW_SHARED_MEMORY_BYTES
