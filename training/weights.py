"""Read and write averaged weights: in the checkpoint of a training, or as smaller 16-bit copies."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

_COPY_BYTES = 14_000_000
"""Maximum size of one file of a copy, in bytes."""


def copies(average: dict[str, Tensor], directory: Path) -> None:
    """Write averaged weights as float16, in files of at most `_COPY_BYTES`."""
    directory.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Tensor]] = [{}]
    for name, tensor in average.items():
        value = tensor.to(torch.float16 if tensor.is_floating_point() else tensor.dtype).cpu()
        if parts[-1] and sum(t.numel() * t.element_size() for t in [*parts[-1].values(), value]) > _COPY_BYTES:
            parts.append({})
        parts[-1][name] = value
    for number, part in enumerate(parts):
        torch.save(part, directory / f"average-{number}.pt")


def averaged(work: Path) -> dict[str, Tensor]:
    """Return the averaged weights from a checkpoint or from copies.

    Raises:
        FileNotFoundError: both are missing.
    """
    if (checkpoint := work / "checkpoint.pt").exists():
        average: dict[str, Tensor] = torch.load(checkpoint, weights_only=True, map_location="cpu")["average"]
        return average
    parts = sorted(work.glob("average-*.pt"))
    if not parts:
        raise FileNotFoundError(f"no checkpoint.pt and no average-*.pt in {work}: run make train first")
    return {n: t.float() for path in parts for n, t in torch.load(path, weights_only=True).items()}
