"""Resources of a server: memory and descriptors of every process, shared memory, sequences, tasks of the event loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import psutil

from tests.support.chaos import Backend
from tests.support.clients import decoder_metric, gateway_metrics

STUB = "triton_python_backend_stub"
BLOCK_BYTES = 512
"""Unit of ``st_blocks`` (stat(2))."""


class Memory(NamedTuple):
    """Memory of one process in MB: resident, and proportional share (proc_pid_smaps(5))."""

    rss: float
    pss: float


class Footprint(NamedTuple):
    """Resources at one moment.

    Attributes:
        secs: time in seconds of ``time.monotonic``.
        memory: memory by process; a stub of Triton is named after its model.
        descriptors: number of descriptors by process.
        shm_mb: size of this Triton's files in /dev/shm.
        sequences: number of sequences in the decoder.
        tasks: number of tasks in the gateway's event loop.
    """

    secs: float
    memory: Mapping[str, Memory]
    descriptors: Mapping[str, int]
    shm_mb: float
    sequences: int
    tasks: int


def growth(before: Footprint, after: Footprint) -> Mapping[str, float]:
    """Return the growth of each process's resident memory, and of shared memory, in MB."""
    grown = {name: after.memory[name].rss - memory.rss for name, memory in before.memory.items()}
    return {**grown, "shared memory": after.shm_mb - before.shm_mb}


def measure(processes: Mapping[str, psutil.Process]) -> tuple[Mapping[str, Memory], Mapping[str, int]]:
    """Return memory and descriptors of processes."""
    memory, descriptors = {}, {}
    for name, process in processes.items():
        full = process.memory_full_info()
        memory[name] = Memory(full.rss / 2**20, full.pss / 2**20)
        descriptors[name] = process.num_fds()
    return memory, descriptors


async def look(backend: Backend, gateway_url: str, gateway_pid: int) -> Footprint:
    """Return the footprint of a Triton and a gateway, each in a process of its own."""
    return Footprint(
        time.monotonic(),
        *measure(dict(_processes(backend, gateway_pid))),
        _shm_mb(backend.shm_prefix),
        int(await decoder_metric(backend.ports, "asr_decoder_sequences")),
        int((await gateway_metrics(gateway_url))["asr_event_loop_tasks", ()]),
    )


MAX_GROWTH_MB = 20.0
EDGE_SHARE = 0.1
"""Share of the samples at either end whose means are compared: a single sample may be an outlier."""


def problems(before: Footprint, under_load: Sequence[Footprint], after: Footprint) -> list[str]:
    """Return the leaks of a server.

    Args:
        before: idle, after it has served every kind of request once.
        under_load: in order, at equal intervals; memory is compared in their second half, when every pool is full.
        after: idle again.
    """
    second_half = under_load[len(under_load) // 2 :]
    found = [
        f"{name}: {what} grew by {grown:.0f} MB in the second half"
        for name in before.memory
        for what in Memory._fields
        if (grown := _rise([getattr(one.memory[name], what) for one in second_half if name in one.memory])) >= MAX_GROWTH_MB
    ]
    if (grown := _rise([one.shm_mb for one in second_half])) >= MAX_GROWTH_MB:
        found.append(f"shared memory grew by {grown:.0f} MB in the second half")
    found += [
        f"{name}: {after.descriptors.get(name, 0)} descriptors afterwards, {count} before"
        for name, count in before.descriptors.items()
        if after.descriptors.get(name, 0) > count
    ]
    for what in ("sequences", "tasks"):
        if getattr(after, what) > getattr(before, what):
            found.append(f"{getattr(after, what)} {what} afterwards, {getattr(before, what)} before")
    if gone := {name for one in (*under_load, after) for name in before.memory.keys() ^ one.memory.keys()}:
        found.append(f"processes came or went: {', '.join(sorted(gone))}")
    return found


def _rise(values: Sequence[float]) -> float:
    """Return the rise from the first values to the last; NaN without values."""
    edge = max(1, int(len(values) * EDGE_SHARE))
    return fmean(values[-edge:]) - fmean(values[:edge]) if values else float("nan")


def _processes(backend: Backend, gateway_pid: int) -> Iterator[tuple[str, psutil.Process]]:
    yield "gateway", psutil.Process(gateway_pid)
    triton = psutil.Process(backend.triton.pid)
    yield "tritonserver", triton
    for child in triton.children():
        command = child.cmdline()
        if command and Path(command[0]).name == STUB:
            yield command[-2].rsplit("_", 2)[0], child  # the instance, such as encoder_0_0


def _shm_mb(prefix: str) -> float:
    total = 0
    for path in Path("/dev/shm").glob(f"{prefix}*"):  # noqa: S108
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * BLOCK_BYTES
    return total / 2**20
