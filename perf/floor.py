"""The floor: preprocessor and encoder in ONNX Runtime in this process. No server can be faster on the same cores."""

from __future__ import annotations

import asyncio
import queue
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from perf.speech import Samples

Floats = NDArray[np.float32]
Lengths = NDArray[np.int64]


def graph_path(repository: Path, model: str) -> Path:
    """Return the path of a graph in a model repository."""
    return repository / model / "1" / "model.onnx"


def open_graph(path: Path, threads: int) -> Any:
    """Open an ONNX Runtime session with `threads` threads; 0: one per core."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def to_waveforms(samples: Samples) -> tuple[Floats, Lengths]:
    """Return the preprocessor's inputs for a recording: samples [1, n] within -1 … 1, and the length [1]."""
    return samples[None].astype(np.float32) / np.float32(32768), np.array([len(samples)], np.int64)


class FrontEnd:
    """Preprocessor and encoder, each in its own session.

    Args:
        preprocessor, encoder: paths of the graphs.
        threads: threads of each session; 0: one per core.
    """

    def __init__(self, preprocessor: Path, encoder: Path, threads: int) -> None:
        self._preprocessor = open_graph(preprocessor, threads)
        self._encoder = open_graph(encoder, threads)

    def preprocess(self, waveforms: Floats, waveforms_lens: Lengths) -> tuple[Floats, Lengths]:
        """Return features [B, F, T] and their lengths [B]."""
        inputs = {"waveforms": waveforms, "waveforms_lens": waveforms_lens}
        features, lengths = self._preprocessor.run(["features", "features_lens"], inputs)
        return features, lengths

    def encode(self, features: Floats, lengths: Lengths) -> tuple[Floats, Lengths]:
        """Return encoder frames [B, D, T] and their lengths [B]."""
        inputs = {"audio_signal": features, "length": lengths}
        frames, lengths = self._encoder.run(["outputs", "encoded_lengths"], inputs)
        return frames, lengths


class Floor:
    """Front ends that run in parallel.

    Args:
        repository: model repository with the graphs.
        sessions: number of front ends.
        threads: threads of each session.
    """

    def __init__(self, repository: Path, sessions: int, threads: int) -> None:
        self.sessions = sessions
        self._idle: queue.SimpleQueue[FrontEnd] = queue.SimpleQueue()
        graphs = graph_path(repository, "preprocessor"), graph_path(repository, "encoder")
        for _ in range(sessions):
            self._idle.put(FrontEnd(*graphs, threads))

    async def encode(self, samples: Samples) -> None:
        """Encode one recording or window."""
        await asyncio.to_thread(self._encode, samples)

    def _encode(self, samples: Samples) -> None:
        front_end = self._idle.get()
        front_end.encode(*front_end.preprocess(*to_waveforms(samples)))
        self._idle.put(front_end)
