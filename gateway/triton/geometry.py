"""Windows of live streams: which audio a window holds, and when it is due. One geometry for the gateway and the benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

LATENCY_PARAMETERS = {"low": "low_latency_frames", "throughput": "high_throughput_frames"}
"""Parameter of the decoder with the windows of a latency; a model without it has those of ``balanced``."""


class Windows(NamedTuple):
    """Parts of a stream's windows, in samples at 16 kHz. docs/Architecture.md describes them.

    Attributes:
        left: audio before a chunk that its window holds.
        chunk: audio that a window decodes for good.
        right: audio that must follow a chunk before it is decoded.
    """

    left: int
    chunk: int
    right: int

    @property
    def size(self) -> int:
        """Length of a whole window in samples."""
        return self.left + self.chunk + self.right

    def complete(self, samples: int) -> int:
        """Return how many windows are complete in a stream of this many samples."""
        return max(0, samples - self.right) // self.chunk

    def chunk_due(self, chunk: int) -> int:
        """Return how many samples a stream must have before its chunk of this index can be decoded."""
        return (chunk + 1) * self.chunk + self.right

    def due(self, sent: int) -> int:
        """Return how many samples a stream must have for the window after those that ``sent`` samples complete."""
        return self.chunk_due(self.complete(sent))


def read_windows(parameters: Mapping[str, str]) -> dict[str, Windows]:
    """Return the windows of each latency.

    Args:
        parameters: the decoder's, by name.

    Raises:
        KeyError, ValueError: one is missing, or is not a list of whole numbers.
    """
    balanced = ",".join(parameters[f"{part}_frames"] for part in Windows._fields)
    texts = {
        "balanced": balanced,
        **{latency: parameters.get(name) or balanced for latency, name in LATENCY_PARAMETERS.items()},
    }
    frame_samples = int(parameters["frame_samples"])
    return {latency: Windows(*(int(part) * frame_samples for part in text.split(","))) for latency, text in texts.items()}
