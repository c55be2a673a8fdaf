"""Store shards of labelled speech on disk, and draw batches from them.

A shard is `NAME.npy`, 16-bit samples [N] at 16 kHz, and `NAME.json`, the items whose samples it concatenates. The JSON file is
written last, so a shard with a JSON file is complete, and a training can start while other shards are still written.
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
"""Number of batches drawn at once and then grouped by length."""


@dataclass(frozen=True)
class Item:
    """One piece of speech.

    Attributes:
        text: normalised transcript.
        set: name of its set or voice.
        samples: length in samples.
    """

    text: str
    set: str
    samples: int


def write(items: Iterable[tuple[Audio, str, str]], path: Path) -> None:
    """Write a shard.

    Args:
        items: samples within -1 … 1, text and set of each item.
        path: the shard's JSON file.
    """
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
    """An item with its tokens, and its samples as 16-bit integers on the device."""

    item: Item
    tokens: list[int]
    samples: Tensor

    @property
    def room(self) -> int:
        """Minimum number of 96 ms frames for CTC: one per token, and a blank between equal neighbours."""
        return len(self.tokens) + sum(a == b for a, b in zip(self.tokens, self.tokens[1:], strict=False))


def read(path: Path, pieces: sentencepiece.SentencePieceProcessor, device: torch.device) -> list[Example]:
    """Return the examples with text of the shard whose JSON file is `path`."""
    items = [Item(**item) for item in json.loads(path.read_text())]
    samples: NDArray[np.int16] = np.load(path.with_suffix(".npy"))
    parts = torch.from_numpy(samples).to(device).split([item.samples for item in items])
    return [Example(i, pieces.encode(i.text), part) for i, part in zip(items, parts, strict=True) if i.text]


@dataclass
class Pool:
    """Examples of one kind, drawn evenly: those drawn least often come first, in random order."""

    random: np.random.Generator
    examples: list[Example] = field(default_factory=list)
    hours: float = 0.0
    _drawn: list[int] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, examples: list[Example]) -> None:
        """Add examples; thread-safe."""
        with self._lock:
            self.examples.extend(examples)
            self._drawn.extend([0] * len(examples))
            self.hours += sum(e.item.samples for e in examples) / RATE / 3600

    def take(self, secs: float) -> list[Example]:
        """Draw examples with `secs` seconds of audio in total."""
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
    """The shards of a directory. New ones may appear at any time."""

    directory: Path
    pieces: sentencepiece.SentencePieceProcessor
    device: torch.device
    speech: Pool
    synthetic: Pool
    _seen: set[Path] = field(default_factory=set)

    def refresh(self) -> None:
        """Read the new shards."""
        for path in sorted(set(self.directory.glob("s*.json")) - self._seen):
            self._seen.add(path)
            pool = self.speech if path.name.startswith("speech") else self.synthetic
            pool.add([e for e in read(path, self.pieces, self.device) if _learnable(e)])

    def batches(self, batch_secs: float, speech_share: float) -> list[list[Example]]:
        """Draw batches from recordings and synthetic speech.

        Args:
            batch_secs: maximum audio of a batch, padding included.
            speech_share: share of the audio that comes from recordings.
        """
        share = speech_share if self.speech.examples else 0.0
        share = share if self.synthetic.examples else 1.0
        secs = _POOL_BATCHES * batch_secs
        drawn = self.speech.take(secs * share) + self.synthetic.take(secs * (1 - share))
        return grouped(drawn, batch_secs, self.synthetic.random)


def _learnable(example: Example) -> bool:
    """Return whether the text fits into the frames at any speed that augmentation may choose."""
    return example.room * 1.2 <= example.item.samples / _OUTPUT_SAMPLES


def grouped(examples: list[Example], most_secs: float, random: np.random.Generator) -> list[list[Example]]:
    """Group examples of similar length into batches of at most `most_secs` of audio, padding included."""
    groups: list[list[Example]] = [[]]
    for example in sorted(examples, key=lambda e: e.item.samples * random.uniform(0.97, 1.03)):
        longest = max((e.item.samples for e in [*groups[-1][-8:], example]), default=0) / RATE
        if groups[-1] and (len(groups[-1]) + 1) * longest > most_secs:
            groups.append([])
        groups[-1].append(example)
    return [groups[i] for i in random.permutation(len(groups))]


@dataclass(frozen=True)
class Batch:
    """A padded batch of examples.

    Attributes:
        samples: within -1 … 1, zero after the end of each row [B, 384 T].
        lengths: number of samples of each row [B].
        targets: tokens, zero after the end of each row [B, U].
        counts: number of tokens of each row [B].
        samples_of_rows: `lengths` on the host, readable without a synchronisation.
        tokens_of_rows: `counts` on the host.
    """

    samples: Tensor
    lengths: Tensor
    targets: Tensor
    counts: Tensor
    samples_of_rows: list[int]
    tokens_of_rows: list[int]

    @property
    def frames(self) -> Tensor:
        """Number of 24 ms frames of each row [B]."""
        return (self.lengths + FRAME_SAMPLES - 1) // FRAME_SAMPLES


def collate(examples: list[Example], device: torch.device, speeds: list[float] | None = None) -> Batch:
    """Pad examples to one batch. Resample each example by its factor if `speeds` are given."""
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
