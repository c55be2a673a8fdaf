"""Speech on disk and on the device: shards of labelled speech, and batches drawn from them.

A shard is `NAME.npy`, 16-bit samples [N] at 16 kHz, and `NAME.json`, its items, which lie in it one after the other. The
description is written last, so a shard that has one is complete, and a training can begin while others are still spoken.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from training.distort import resample
from training.moonshine import FRAME_SAMPLES
from training.speech import RATE, Audio

_OUTPUT_SAMPLES = 4 * FRAME_SAMPLES
_POOL_BATCHES = 8
"""Batches drawn at once, then sorted to batches of similar lengths."""


@dataclass(frozen=True)
class Item:
    """One stretch of speech: its text, which set or voice it is of, and its length in samples."""

    text: str
    set: str
    samples: int


def write(items: Iterable[tuple[Audio, str, str]], path: Path) -> None:
    """Write a shard of (samples between -1 and 1, text, set)."""
    described, parts = [], []
    for audio, text, name in items:
        described.append(Item(text, name, len(audio)))
        parts.append(np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16))
    np.save(path.with_suffix(".npy"), np.concatenate(parts) if parts else np.zeros(0, np.int16))
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps([asdict(item) for item in described]))
    scratch.rename(path.with_suffix(".json"))


@dataclass(frozen=True)
class Example:
    """An item with its tokens and its samples (16-bit integers) on the device."""

    item: Item
    tokens: list[int]
    samples: Tensor

    @property
    def room(self) -> int:
        """Frames of 96 ms that CTC needs at least: one a token, and a blank between two that are the same."""
        return len(self.tokens) + sum(a == b for a, b in zip(self.tokens, self.tokens[1:], strict=False))


def read(path: Path, pieces: sentencepiece.SentencePieceProcessor, device: torch.device) -> list[Example]:
    """Return the examples of the shard whose description is `path` that have a text."""
    items = [Item(**item) for item in json.loads(path.read_text())]
    samples: NDArray[np.int16] = np.load(path.with_suffix(".npy"))
    parts = torch.from_numpy(samples).to(device).split([item.samples for item in items])
    return [Example(i, pieces.encode(i.text), part) for i, part in zip(items, parts, strict=True) if i.text]


@dataclass
class Pool:
    """Examples of one kind, drawn evenly: each once before any comes again, new ones first."""

    random: np.random.Generator
    examples: list[Example] = field(default_factory=list)
    hours: float = 0.0
    _drawn: list[int] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, examples: list[Example]) -> None:
        """Take in more examples, from any thread."""
        with self._lock:
            self.examples.extend(examples)
            self._drawn.extend([0] * len(examples))
            self.hours += sum(e.item.samples for e in examples) / RATE / 3600

    def take(self, secs: float) -> list[Example]:
        """Draw examples until `secs` of audio are reached."""
        taken: list[Example] = []
        with self._lock:
            order = np.argsort(np.array(self._drawn) + self.random.random(len(self._drawn)))
            for index in order:
                if secs <= 0:
                    break
                self._drawn[index] += 1
                taken.append(self.examples[index])
                secs -= taken[-1].item.samples / RATE
        return taken


@dataclass
class Store:
    """The shards of a directory, which may still grow."""

    directory: Path
    pieces: sentencepiece.SentencePieceProcessor
    device: torch.device
    speech: Pool
    synthetic: Pool
    _seen: set[Path] = field(default_factory=set)

    def refresh(self) -> None:
        """Read what is new."""
        for path in sorted(set(self.directory.glob("s*.json")) - self._seen):
            self._seen.add(path)
            pool = self.speech if path.name.startswith("speech") else self.synthetic
            pool.add([e for e in read(path, self.pieces, self.device) if _learnable(e)])

    def batches(self, batch_secs: float, speech_share: float) -> list[list[Example]]:
        """Draw some batches in the given mixture of real and synthetic speech."""
        share = speech_share if self.speech.examples else 0.0
        share = share if self.synthetic.examples else 1.0
        secs = _POOL_BATCHES * batch_secs
        drawn = self.speech.take(secs * share) + self.synthetic.take(secs * (1 - share))
        return grouped(drawn, batch_secs, self.synthetic.random)


def _learnable(example: Example) -> bool:
    """Say whether there is as much time as text, at any speed that it is played at."""
    return example.room * 1.2 <= example.item.samples / _OUTPUT_SAMPLES


def grouped(examples: list[Example], most_secs: float, random: np.random.Generator) -> list[list[Example]]:
    """Group examples of similar lengths so that a batch, padding included, has at most `most_secs`."""
    groups: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda e: e.item.samples * random.uniform(0.97, 1.03)):
        longest = max((e.item.samples for e in [*groups[-1][-8:], example]), default=0) / RATE
        if groups[-1] and (len(groups[-1]) + 1) * longest > most_secs:
            groups.append([])
        groups[-1].append(example)
    return [groups[i] for i in random.permutation(len(groups))]


@dataclass(frozen=True)
class Batch:
    """Examples side by side.

    Attributes:
        samples: Between -1 and 1, zero behind a row's length [B, 384 T].
        lengths: In samples [B].
        targets: Tokens, zero behind a row's count [B, U].
        counts: Tokens of each row [B].
        samples_of_rows: The lengths once more, to be read without waiting for the device.
        tokens_of_rows: The counts likewise.
    """

    samples: Tensor
    lengths: Tensor
    targets: Tensor
    counts: Tensor
    samples_of_rows: list[int]
    tokens_of_rows: list[int]

    @property
    def frames(self) -> Tensor:
        """Frames of 24 ms of each row [B]."""
        return (self.lengths + FRAME_SAMPLES - 1) // FRAME_SAMPLES


def collate(examples: list[Example], device: torch.device, speeds: list[float] | None = None) -> Batch:
    """Put examples side by side, each played faster by its factor if `speeds` are given."""
    given = [e.item.samples for e in examples]
    samples = torch.zeros(len(examples), max(given), device=device)
    for row, example in zip(samples, examples, strict=True):
        row[: example.item.samples] = example.samples
    samples /= 32768
    lengths = [int(n / s) for n, s in zip(given, speeds, strict=True)] if speeds else given
    size = -(-max(lengths) // FRAME_SAMPLES) * FRAME_SAMPLES
    on_device = torch.tensor(lengths, device=device)
    if speeds:
        samples = resample(samples, torch.tensor(speeds, device=device), size)
        samples *= torch.arange(size, device=device) < on_device[:, None]
    else:
        samples = functional.pad(samples, (0, size - samples.shape[1]))
    counts = [len(e.tokens) for e in examples]
    targets = torch.zeros(len(examples), max(counts), dtype=torch.long)
    for row, example in zip(targets, examples, strict=True):
        row[: len(example.tokens)] = torch.tensor(example.tokens)
    return Batch(samples, on_device, targets.to(device), torch.tensor(counts, device=device), lengths, counts)
