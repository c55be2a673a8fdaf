"""What a server holds: memory and descriptors of every process, shared memory, sequences, tasks of the event loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
from chaos import Backend
from clients import decoder_metric, gateway_metrics

STUB = "triton_python_backend_stub"
BLOCK_BYTES = 512
"""Unit of ``st_blocks`` (stat(2))."""


class Memory(NamedTuple):
    """Of one process, in MB: what is resident, and its proportional share of that (proc_pid_smaps(5))."""

    rss: float
    pss: float


class Footprint(NamedTuple):
    """What was held at one moment.

    Attributes:
        secs: of time.monotonic.
        memory: by process; a stub of Triton is named after its model.
        descriptors: by process.
        shm_mb: in /dev/shm, of this Triton.
        sequences: in the decoder.
        tasks: of the gateway's event loop.
    """

    secs: float
    memory: Mapping[str, Memory]
    descriptors: Mapping[str, int]
    shm_mb: float
    sequences: int
    tasks: int


def growth(before: Footprint, after: Footprint) -> Mapping[str, float]:
    """By how many MB the resident memory of each process, and the shared memory, grew."""
    grown = {name: after.memory[name].rss - memory.rss for name, memory in before.memory.items()}
    return {**grown, "shared memory": after.shm_mb - before.shm_mb}


async def look(backend: Backend, gateway_url: str, gateway_pid: int) -> Footprint:
    """The footprint of a Triton and the gateway before it, each a process of its own."""
    named = [*_processes(backend, gateway_pid)]
    memory, descriptors = {}, {}
    for name, process in named:
        full = process.memory_full_info()
        memory[name] = Memory(full.rss / 2**20, full.pss / 2**20)
        descriptors[name] = process.num_fds()
    return Footprint(
        time.monotonic(),
        memory,
        descriptors,
        _shm_mb(backend.shm_prefix),
        int(await decoder_metric(backend.ports, "asr_decoder_sequences")),
        int((await gateway_metrics(gateway_url))["asr_event_loop_tasks", ()]),
    )


def _processes(backend: Backend, gateway_pid: int) -> Iterator[tuple[str, psutil.Process]]:
    yield "gateway", psutil.Process(gateway_pid)
    triton = psutil.Process(backend.triton.pid)
    yield "tritonserver", triton
    for child in triton.children():
        command = child.cmdline()
        if command and Path(command[0]).name == STUB:
            yield command[-2].rsplit("_", 2)[0], child  # its instance, as encoder_0_0


def _shm_mb(prefix: str) -> float:
    total = 0
    for path in Path("/dev/shm").glob(f"{prefix}*"):  # noqa: S108
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * BLOCK_BYTES
    return total / 2**20
