"""Measure CPU time and memory of server processes."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import psutil

STUB = "triton_python_backend_stub"
FILE_WORKER = "gateway.audio.worker"
"""Module of the processes that decode files."""

RESET_PEAK = "5"
"""Value for ``/proc/PID/clear_refs`` that resets the peak of the resident set (proc(5))."""


class Usage(NamedTuple):
    """Resource use over an interval, by the name of the process.

    Attributes:
        cpu_secs: user and system time; processes that have ended are missing.
        peak_rss_mb: largest resident set; shared memory counts in each process.
    """

    cpu_secs: Mapping[str, float]
    peak_rss_mb: Mapping[str, float]


class Meter:
    """Measures processes with all their descendants. Of this process only itself is measured: the servers are its children.

    Args:
        roots: process ids by name. A stub of Triton's Python backend counts under the name of its model, and the processes
            that decode files count under "file decoding".
    """

    def __init__(self, roots: Mapping[str, int]) -> None:
        self._roots = roots
        self._before: Mapping[str, float] = {}

    def start(self) -> None:
        """Start an interval."""
        for _, process in self._processes():
            with contextlib.suppress(OSError):
                Path(f"/proc/{process.pid}/clear_refs").write_text(RESET_PEAK, encoding="ascii")
        self._before = self._cpu_secs()

    def stop(self) -> Usage:
        """Return the use since the start of the interval."""
        after = self._cpu_secs()
        peaks: defaultdict[str, float] = defaultdict(float)
        for name, process in self._processes():
            peaks[name] += _peak_rss_mb(process.pid)
        return Usage({name: after[name] - self._before.get(name, 0.0) for name in after}, peaks)

    def rss_mb(self) -> Mapping[str, float]:
        """Return the current resident memory by name, in MB."""
        sizes: defaultdict[str, float] = defaultdict(float)
        for name, process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                sizes[name] += process.memory_info().rss / 2**20
        return sizes

    def _cpu_secs(self) -> Mapping[str, float]:
        seconds: defaultdict[str, float] = defaultdict(float)
        for name, process in self._processes():
            times = process.cpu_times()
            seconds[name] += times.user + times.system
        return seconds

    def _processes(self) -> Iterator[tuple[str, psutil.Process]]:
        for name, pid in self._roots.items():
            root = psutil.Process(pid)
            yield name, root
            for child in root.children(recursive=True) if pid != os.getpid() else ():
                try:
                    command = child.cmdline()
                except psutil.NoSuchProcess:  # it decoded a file, and has ended
                    continue
                yield _name(command) or name, child


def _name(command: list[str]) -> str | None:
    """Return the name under which a descendant counts; None for that of its root."""
    if command and Path(command[0]).name == STUB:
        return _stub_model(command)
    return "file decoding" if FILE_WORKER in command else None


def _stub_model(command: list[str]) -> str:
    """Return the model of a stub. Its last argument but one names the instance: ``encoder_0_1`` is the encoder's second."""
    return command[-2].rsplit("_", 2)[0]


def _peak_rss_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    return 0.0
