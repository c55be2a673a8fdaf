"""Geometry of the windows of live streams, for the gateway and the benchmark: the audio of a window, and when it is due."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

LATENCY_PARAMETERS = {"low": "low_latency_frames", "throughput": "high_throughput_frames"}
"""Parameters of the decoder with the windows of latencies. Without its parameter, a latency has the windows of ``balanced``."""


class Windows(NamedTuple):
    """Parts of a stream's windows, in samples at 16 kHz. docs/Architecture.md describes them.

    Attributes:
        left: audio of the window before its chunk.
        chunk: audio that the window decodes for good.
        right: audio of the window after its chunk.
    """

    left: int
    chunk: int
    right: int

    @property
    def size(self) -> int:
        """Length of a whole window in samples."""
        return self.left + self.chunk + self.right

    def complete(self, samples: int) -> int:
        """Return the number of complete windows in a stream of this many samples."""
        return max(0, samples - self.right) // self.chunk

    def chunk_due(self, chunk: int) -> int:
        """Return the number of samples after which the chunk of this index can be decoded."""
        return (chunk + 1) * self.chunk + self.right

    def due(self, sent: int) -> int:
        """Return the number of samples that complete the next window after ``sent`` samples."""
        return self.chunk_due(self.complete(sent))


CACHED_PREFIXES = {"low": "low_latency", "throughput": "high_throughput"}
"""Prefix of the decoder's parameters for the cached encoder of a latency."""


def _cached_windows(parameters: Mapping[str, str]) -> dict[str, Windows]:
    """Return the windows of encoders that carry their context in a cache."""
    hop, edge = int(parameters["hop_samples"]), int(parameters["edge_features"])
    balanced = f"{parameters['window_features']},{parameters['chunk_features']}"
    windows = {}
    for latency in ("balanced", *CACHED_PREFIXES):
        text = parameters.get(f"{CACHED_PREFIXES.get(latency, '')}_features") or balanced
        window, chunk = (int(part) for part in text.split(",")[:2])
        before = window - chunk if parameters.get("fresh_features", "zeros") == "zeros" else 0
        windows[latency] = Windows((before + edge) * hop, chunk * hop, (window - before - chunk + edge) * hop)
    return windows


def read_windows(parameters: Mapping[str, str]) -> dict[str, Windows]:
    """Return the windows of each latency.

    Args:
        parameters: parameters of the decoder by name.

    Raises:
        KeyError, ValueError: a parameter is missing, or is not a list of whole numbers.
    """
    if parameters.get("encoder_kind") == "cached":
        return _cached_windows(parameters)
    balanced = ",".join(parameters[f"{part}_frames"] for part in Windows._fields)
    texts = {
        "balanced": balanced,
        **{latency: parameters.get(name) or balanced for latency, name in LATENCY_PARAMETERS.items()},
    }
    frame_samples = int(parameters["frame_samples"])
    return {latency: Windows(*(int(part) * frame_samples for part in text.split(","))) for latency, text in texts.items()}
