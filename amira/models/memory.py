"""Measure the memory of an encoder window as a function of its length, by running the graphs.

The decoder limits its windows by this growth (``WindowMemory`` in its ``parameters.py``). It cannot measure the growth: a model
may not call other models while it loads.
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
"""Lengths of the windows that are run in one process. ONNX Runtime's arena keeps memory from shorter windows, which counts too.
The last length is run twice: the arena plans its memory at the second run."""

MARGIN = 1.2
"""Factor on the measured growth. After windows of many lengths, or one of 90 s, the bundled encoder took up to 17 % more than
in this measurement (2026-11-27)."""

TOLERANCE = 0.8
"""Smallest accepted ratio of the declared to the measured growth, which differs by processor and thread count."""

TIMEOUT_SECS = 900.0
"""Timeout of a measurement, in seconds."""


@dataclass(frozen=True)
class Growth:
    """Growth of a window's memory: s seconds take ``bytes_per_sec`` s + ``bytes_per_sec_squared`` s² bytes."""

    bytes_per_sec: int
    bytes_per_sec_squared: int

    @property
    def parameters(self) -> dict[str, str]:
        """Parameters of the decoder that declare this growth."""
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
        """Return the memory of a window of this length in bytes."""
        return self.bytes_per_sec * secs + self.bytes_per_sec_squared * secs**2

    def covers(self, measured: Growth) -> bool:
        """Return whether this declared growth is large enough for the measured one."""
        secs = WINDOW_SECS[-1]
        return self.window_bytes(secs) >= TOLERANCE * measured.window_bytes(secs)

    @classmethod
    def fit(cls, secs: Sequence[float], peaks: Sequence[float]) -> Growth:
        """Return the growth that fits measured peaks and is not below any of them, times ``MARGIN``.

        Args:
            secs: lengths of windows.
            peaks: peak memory in bytes after each window.
        """
        lengths, sizes = np.array(secs, np.float64), np.array(peaks, np.float64)
        terms = np.stack((lengths, lengths**2), axis=1)
        weights = 1 / lengths**2  # minimise the relative error
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
    """Measure the growth of a window's memory in a separate process, on the CPU even for a GPU model.

    Raises:
        ModelError: the graphs cannot be run on these windows.
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
    """Encode windows of growing length, and print the peak memory since loading after each."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    sessions = [ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in (preprocessor, encoder)]
    noise = np.random.default_rng(0)
    _encode(sessions, 0.1 * noise.standard_normal((1, SAMPLE_RATE), np.float32))
    with contextlib.suppress(OSError):  # if this is not allowed, the peak of loading counts too
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
    """Return a size from the status of this process in bytes (proc_pid_status(5))."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    _run_windows(*sys.argv[1:])
