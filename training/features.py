"""Features on disk: what the frozen part of the encoder makes of speech, computed once.

A shard is `NAME.npy`, float16 frames [F, 288] of 24 ms, and `NAME.json`, its items. An item is one stretch of speech with its
text, encoded whole or, as live streams are, in windows that cut it anywhere.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from training.config import Data
from training.moonshine import FRAME_SAMPLES, Layers, Stem
from training.speech import Audio

STACK = 4
"""Moonshine frames for each frame of the whole encoder: 96 ms."""
SAMPLES = FRAME_SAMPLES * STACK
_BATCH_SAMPLES = 40 * 16_000


@dataclass(frozen=True)
class Window:
    """Frames of 24 ms as encoded together, and which frames of 96 ms of the outcome are used: [first, stop)."""

    frames: int
    first: int
    stop: int


@dataclass(frozen=True)
class Item:
    """One stretch of speech; its windows lie in the shard one after the other, from frame `offset`."""

    text: str
    set: str
    offset: int
    windows: tuple[Window, ...]

    @property
    def frames(self) -> int:
        """Frames of 24 ms to encode, overlaps counted as often as they occur."""
        return sum(window.frames for window in self.windows)

    @property
    def outputs(self) -> int:
        """Frames of 96 ms that come out."""
        return sum(window.stop - window.first for window in self.windows)


@dataclass(frozen=True)
class Shard:
    """A file of features; `frames` is mapped, not read."""

    items: list[Item]
    frames: NDArray[np.float16]


@dataclass(frozen=True)
class Spoken:
    """Speech that is ready to be encoded."""

    audio: Audio
    text: str
    set: str
    windowed: bool


def read(path: Path) -> Shard:
    """Open the shard whose description is `path` (.json)."""
    items = [
        Item(i["text"], i["set"], i["offset"], tuple(Window(**w) for w in i["windows"])) for i in json.loads(path.read_text())
    ]
    return Shard(items, np.load(path.with_suffix(".npy"), mmap_mode="r"))


class Features:
    """The frozen part of the encoder: the stem and the lower layers."""

    def __init__(self, stem: Stem, lower: Layers, data: Data) -> None:
        self._stem, self._lower, self._data = stem.eval(), lower.eval(), data

    def write(self, spoken: list[Spoken], path: Path) -> None:
        """Encode and write a shard; its description comes last, so that what has one is complete."""
        cuts = [self._windows(one) for one in spoken]
        pairs = zip(spoken, cuts, strict=True)
        pieces = [one.audio[start * SAMPLES : end * SAMPLES] for one, windows in pairs for start, end, _, _ in windows]
        encoded = self._encode(pieces)
        items, at, offset = [], 0, 0
        for one, windows in zip(spoken, cuts, strict=True):
            described = []
            for frames, (start, _, first, stop) in zip(encoded[at : at + len(windows)], windows, strict=True):
                described.append(Window(len(frames), first - start, stop - start))
            items.append(Item(one.text, one.set, offset, tuple(described)))
            at += len(windows)
            offset += items[-1].frames
        np.save(path.with_suffix(".npy"), np.concatenate(encoded))
        scratch = path.with_suffix(".part")
        scratch.write_text(json.dumps([asdict(item) for item in items]))
        scratch.rename(path.with_suffix(".json"))

    def _windows(self, one: Spoken) -> list[tuple[int, int, int, int]]:
        """Return (start, end, first, stop) in frames of 96 ms: [start, end) is encoded, [first, stop) used."""
        frames = -(-len(one.audio) // SAMPLES)
        if not one.windowed:
            return [(0, frames, 0, frames)]
        left, chunk, right = self._data.window_left, self._data.window_chunk, self._data.window_right
        return [
            (max(0, first - left), min(frames, first + chunk + right), first, min(frames, first + chunk))
            for first in range(0, frames, chunk)
        ]

    def _encode(self, pieces: list[Audio]) -> list[NDArray[np.float16]]:
        encoded: list[NDArray[np.float16]] = [np.empty((0, 0), np.float16)] * len(pieces)
        batch: list[int] = []
        for index in sorted(range(len(pieces)), key=lambda i: len(pieces[i])):
            if batch and (len(batch) + 1) * len(pieces[index]) > _BATCH_SAMPLES:
                self._encode_batch(batch, pieces, encoded)
                batch = []
            batch.append(index)
        self._encode_batch(batch, pieces, encoded)
        return encoded

    @torch.inference_mode()
    def _encode_batch(self, batch: list[int], pieces: list[Audio], encoded: list[NDArray[np.float16]]) -> None:
        frames = torch.tensor([-(-len(pieces[i]) // FRAME_SAMPLES) for i in batch])
        samples = torch.zeros(len(batch), int(frames.max()) * FRAME_SAMPLES)
        for row, i in enumerate(batch):
            samples[row, : len(pieces[i])] = torch.from_numpy(pieces[i])
        x = self._lower(self._stem(samples, frames), frames)
        for row, i in enumerate(batch):
            encoded[i] = x[row, : frames[row]].to(torch.float16).numpy()
