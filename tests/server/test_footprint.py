"""The check of ``make soak``, on processes that leak and one that does not."""

from __future__ import annotations

import asyncio
import sys
import time

import psutil
import pytest

from tests.support.footprint import Footprint, Memory, measure, problems

SAMPLES, INTERVAL_SECS = 40, 0.05

PROGRAM = """
import os, sys, time
kept, leak = [], sys.argv[1]
steady = bytearray(os.urandom(1 << 20) * 10)
for _ in range(200):
    if leak == "memory":
        kept.append(os.urandom(1 << 20) * 2)  # 2 MB, written
    elif leak == "descriptors":
        kept.append(os.open("/dev/null", os.O_RDONLY))
    else:
        bytes(steady)  # comes and goes
    time.sleep(0.02)
    if len(kept) == 1 or not _:
        print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("leak", "named"), [("memory", "process: rss grew by"), ("descriptors", "descriptors afterwards"), ("none", "")]
)
async def test_planted_leak_is_found(leak: str, named: str) -> None:
    program = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, leak, stdout=asyncio.subprocess.PIPE)
    assert program.stdout
    await program.stdout.readline()
    samples = []
    for _ in range(SAMPLES):
        samples.append(Footprint(time.monotonic(), *measure({"process": psutil.Process(program.pid)}), 10.0, 0, 5))
        await asyncio.sleep(INTERVAL_SECS)
    program.kill()
    await program.wait()
    found = problems(samples[0], samples, samples[-1])
    assert any(named in problem for problem in found) if named else not found, found


def sample(**changed: object) -> Footprint:
    return Footprint(0.0, {"gateway": Memory(100.0, 80.0)}, {"gateway": 20}, 10.0, 0, 5)._replace(**changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("after", "named"),
    [
        ({"sequences": 1}, "1 sequences afterwards, 0 before"),
        ({"tasks": 9}, "9 tasks afterwards, 5 before"),
        ({"memory": {}}, "processes came or went: gateway"),
    ],
)
def test_leftovers_are_found(after: dict[str, object], named: str) -> None:
    good = sample()
    assert problems(good, [good] * 10, good) == []
    assert problems(good, [good] * 10, sample(**after)) == [named]


def test_shared_memory_that_grows_is_found() -> None:
    growing = [sample(shm_mb=float(size)) for size in range(0, 100, 2)]
    assert problems(growing[0], growing, growing[-1]) == ["shared memory grew by 46 MB in the second half"]
    once = [sample(shm_mb=100.0 if number > 10 else 0.0) for number in range(50)]  # a pool that is filled in the first half
    assert problems(once[0], once, once[-1]) == []
