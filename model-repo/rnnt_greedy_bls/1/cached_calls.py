"""Inputs and results of a cached encoder's call; plain numpy, so that tests and measurements make the same calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from batching import Encoded
from greedy import Floats
from windows import Cache, Carried


def cached_inputs(
    features: Floats, carried: Sequence[Carried], cache_size: int, element: npt.DTypeLike
) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs of a call by name.

    Args:
        features: of the windows' audio [B, F, T].
        carried: of each window.
        cache_size: values of a cache, S.
        element: type of these values.
    """
    rows = len(carried)
    signal = np.zeros((rows, features.shape[1], carried[0].size), np.float32)
    for b, window in enumerate(carried):
        real = window.length - window.zeros
        signal[b, :, window.zeros : window.length] = features[b, :, window.skip : window.skip + real]
    inputs: dict[str, npt.NDArray[Any]] = {
        "audio_signal": signal,
        "length": np.array([window.length for window in carried], np.int64),
        "cache": _stack([window.cache for window in carried], cache_size, element),
    }
    if carried[0].prompt is not None:
        inputs["prompt_index"] = np.array([window.prompt for window in carried], np.int64)
    return inputs


def cached_results(
    frames: Floats, encoded: npt.NDArray[np.int64], caches: npt.NDArray[Any], carried: Sequence[Carried]
) -> list[Encoded]:
    """Return the results of a call.

    Args:
        frames: encoder frames [B, D, T].
        encoded: number of frames of each row [B].
        caches: next caches [B, S].
        carried: of each window.
    """
    alone = len(carried) == 1
    return [
        # A view would keep the caches of the whole batch in memory.
        Encoded(frames[b, :, : encoded[b]], window.length, caches[b] if alone else caches[b].copy())
        for b, window in enumerate(carried)
    ]


def _stack(caches: Sequence[Cache | None], size: int, element: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return caches as one array [B, S]; a single one without a copy."""
    if len(caches) == 1 and caches[0] is not None:
        return caches[0][None]
    stacked = np.zeros((len(caches), size), element)
    for row, cache in zip(stacked, caches, strict=True):
        if cache is not None:
            row[:] = cache
    return stacked
