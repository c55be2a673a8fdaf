"""Memory of an encoder window: how it grows with the window's length, measured by running the graphs.

The decoder bounds its windows by this growth (``WindowMemory`` of its ``parameters.py``). It can't measure it itself: a model
may not call others while it loads.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from amira.models.configs import ModelError

SAMPLE_RATE = 16_000
WINDOW_SECS = (15, 30, 60, 60)
"""Windows run one after the other in one process, so that what ONNX Runtime's arena keeps from shorter ones counts; the last
twice, since it plans the memory of a length when it comes again."""

MARGIN = 1.2
"""The bundled encoder took up to 17 % more than here after windows of many lengths, or with one of 90 s (2026-11-27)."""

TOLERANCE = 0.8
"""A declared growth is accepted down to this part of the measured one, which differs by processor and thread count."""

TIMEOUT_SECS = 900.0


@dataclass(frozen=True)
class Growth:
    """Bytes that a window of s seconds takes: ``bytes_per_sec`` s + ``bytes_per_sec_squared`` s²."""

    bytes_per_sec: int
    bytes_per_sec_squared: int

    @property
    def parameters(self) -> dict[str, str]:
        """The decoder's parameters that declare this growth."""
        return {
            "window_bytes_per_sec": str(self.bytes_per_sec),
            "window_bytes_per_sec_squared": str(self.bytes_per_sec_squared),
        }

    @classmethod
    def declared(cls, parameters: Mapping[str, str]) -> Growth | None:
        """Return the growth that a decoder's parameters declare, or None."""
        linear, square = (parameters.get(name, "") for name in cls(0, 0).parameters)
        return cls(int(linear), int(square)) if linear.isdecimal() and square.isdecimal() else None

    def window_bytes(self, secs: float) -> float:
        """Return how much a window of this length takes."""
        return self.bytes_per_sec * secs + self.bytes_per_sec_squared * secs**2

    def covers(self, measured: Growth) -> bool:
        """Whether declaring this growth bounds the windows of an encoder for which that one was measured."""
        secs = WINDOW_SECS[-1]
        return self.window_bytes(secs) >= TOLERANCE * measured.window_bytes(secs)

    @classmethod
    def fit(cls, secs: Sequence[float], peaks: Sequence[float]) -> Growth:
        """Return the growth closest to peaks in bytes after windows of these lengths that is below none, with ``MARGIN``."""
        lengths, sizes = np.array(secs, np.float64), np.array(peaks, np.float64)
        terms = np.stack((lengths, lengths**2), axis=1)
        weights = 1 / lengths**2  # what matters is the part of the size by which a bound is off
        fits = []
        for used in ([0, 1], [0], [1]):
            growth = np.zeros(2)
            growth[used] = np.linalg.lstsq(terms[:, used] * weights[:, None], sizes * weights, rcond=None)[0]
            if (growth >= 0).all() and growth.any():
                growth *= MARGIN * max(1.0, float((sizes / (terms @ growth)).max()))
                fits.append((float(np.square((terms @ growth - sizes) * weights).sum()), growth))
        if not fits:
            return cls(0, 0)
        linear, square = min(fits, key=lambda fit: fit[0])[1]
        return cls(int(np.ceil(linear)), int(np.ceil(square)))


def measure_growth(preprocessor: Path, encoder: Path) -> Growth:
    """Measure how the memory of a window grows, by the peak of a process of its own; on the CPU, whatever the model is for.

    Raises:
        ModelError: the graphs can't be run on these windows.
    """
    return _measure(*((path, path.stat().st_mtime_ns) for path in (preprocessor, encoder)))


@functools.cache
def _measure(preprocessor: tuple[Path, int], encoder: tuple[Path, int]) -> Growth:
    graphs = [str(path) for path, _ in (preprocessor, encoder)]
    command = [sys.executable, "-m", __name__, *graphs]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise ModelError(f"{graphs[1]}: windows of {WINDOW_SECS} s took longer than {TIMEOUT_SECS:g} s") from None
    if process.returncode:
        last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}; is there memory for it?"])[-1]
        raise ModelError(f"{graphs[1]} can't encode windows of up to {WINDOW_SECS[-1]} s: {last}")
    return Growth.fit(WINDOW_SECS, [float(line) for line in process.stdout.split()])


def _run_windows(preprocessor: str, encoder: str) -> None:
    """Encode windows of growing length, and print after each how much the process has taken at most since it was loaded."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    sessions = [ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in (preprocessor, encoder)]
    noise = np.random.default_rng(0)
    _encode(sessions, 0.1 * noise.standard_normal((1, SAMPLE_RATE), np.float32))
    with contextlib.suppress(OSError):  # where it is not allowed, the peak of loading counts too
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM (proc_pid_clear_refs(5))
    loaded = _status("VmRSS")
    for secs in WINDOW_SECS:
        _encode(sessions, 0.1 * noise.standard_normal((1, int(secs * SAMPLE_RATE)), np.float32))
        print(_status("VmHWM") - loaded)  # noqa: T201


def _encode(sessions: Sequence[ort.InferenceSession], waveforms: npt.NDArray[np.float32]) -> None:
    lengths = np.array([waveforms.shape[1]], np.int64)
    features, lengths = sessions[0].run(["features", "features_lens"], {"waveforms": waveforms, "waveforms_lens": lengths})
    sessions[1].run(["outputs", "encoded_lengths"], {"audio_signal": features, "length": lengths})


def _status(field: str) -> int:
    """Return a size in bytes from this process's status (proc_pid_status(5))."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    _run_windows(*sys.argv[1:])
