"""`make train`: learn, phase by phase; stopped by Ctrl-C at any time, it goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jiwer
import numpy as np
import sentencepiece
import torch
import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from training import config as configuration
from training import features, moonshine, start
from training.command import run
from training.config import Config, Phase
from training.data import TOKENS
from training.features import Item, Shard
from training.loss import transducer_loss
from training.model import Transducer, build, collapse, greedy

FRAME_SECS = moonshine.FRAME_SAMPLES / 16_000
_PASS_HOURS = 2.0
"""Audio drawn at once, then sorted to batches of similar lengths."""


@dataclass(frozen=True)
class Example:
    """An item of a shard with its tokens."""

    shard: Shard
    item: Item
    tokens: Tensor

    @property
    def longest(self) -> int:
        """Frames of its longest window."""
        return max(window.frames for window in self.item.windows)

    def pieces(self) -> Iterator[Tensor]:
        """Return each window's features [T, 288]."""
        at = self.item.offset
        for window in self.item.windows:
            yield torch.from_numpy(self.shard.frames[at : at + window.frames].astype(np.float32))
            at += window.frames


@dataclass
class Store:
    """The shards of a directory, which may still grow."""

    directory: Path
    pieces: sentencepiece.SentencePieceProcessor
    speech: list[Example] = field(default_factory=list)
    synthetic: list[Example] = field(default_factory=list)
    _seen: set[Path] = field(default_factory=set)

    def refresh(self) -> None:
        """Read what is new."""
        for path in sorted(set(self.directory.glob("s*.json")) - self._seen):
            self._seen.add(path)
            (self.speech if path.name.startswith("speech") else self.synthetic).extend(self.read(path))

    def read(self, path: Path) -> list[Example]:
        """Return a shard's examples that a transducer can learn: some text, and no more of it than CTC has room for."""
        shard = features.read(path)
        examples = [Example(shard, item, torch.tensor(self.pieces.encode(item.text))) for item in shard.items if item.text]
        return [e for e in examples if _room(e.tokens) <= e.item.outputs]


def _room(tokens: Tensor) -> int:
    """Frames that CTC needs at least: one a token, and a blank between two that are the same."""
    return len(tokens) + int((tokens[1:] == tokens[:-1]).sum())


class Draw:
    """Examples at random, each once before any comes again."""

    def __init__(self, random: np.random.Generator) -> None:
        self._random, self._order, self._count = random, np.array([], int), 0

    def take(self, examples: list[Example], frames: float) -> list[Example]:
        """Take examples until `frames` are reached."""
        taken: list[Example] = []
        while examples and frames > 0:
            if not len(self._order) or len(examples) != self._count:
                self._order, self._count = self._random.permutation(len(examples)), len(examples)
            taken.append(examples[self._order[-1]])
            self._order = self._order[:-1]
            frames -= taken[-1].item.frames
        return taken


def batches(examples: list[Example], most_frames: float, random: np.random.Generator) -> list[list[Example]]:
    """Group examples of similar lengths so that a batch, padding included, has at most `most_frames` of 24 ms."""
    grouped: list[list[Example]] = [[]]
    rows = 0
    for example in sorted(examples, key=lambda e: e.longest + random.uniform(-15, 15)):
        rows += len(example.item.windows)
        if grouped[-1] and rows * max(example.longest, *(e.longest for e in grouped[-1])) > most_frames:
            grouped.append([])
            rows = len(example.item.windows)
        grouped[-1].append(example)
    return [grouped[i] for i in random.permutation(len(grouped))]


def encode(model: Transducer, batch: list[Example], random: np.random.Generator | None = None) -> list[Tensor]:
    """Encode a batch; return each example's frames [T, D], put together from its windows. With `random`, hide some."""
    windows = [piece for example in batch for piece in example.pieces()]
    if random:
        for piece in windows:
            _hide(piece, random)
    encoded, _ = model.encoder(pad_sequence(windows, batch_first=True), torch.tensor([len(w) for w in windows]))
    rows = iter(encoded)
    return [torch.cat([next(rows)[w.first : w.stop] for w in example.item.windows]) for example in batch]


def _hide(piece: Tensor, random: np.random.Generator) -> None:
    """Mask time as SpecAugment does (Park et al., 2019): up to 0.3 s at a time, about once in 2.5 s."""
    for _ in range(random.poisson(len(piece) * FRAME_SECS / 2.5)):
        width = int(random.integers(2, 13))
        start = int(random.integers(max(1, len(piece) - width)))
        piece[start : start + width] = 0


@dataclass
class Progressed:
    """How far the training is."""

    phase: int = 0
    hours: float = 0.0
    step: int = 0
    step_of_phase: int = 0
    total_hours: float = 0.0
    minutes: float = 0.0


class Trainer:
    """The model, what it was on average, and the optimiser, in one checkpoint."""

    def __init__(self, config: Config, work: Path, begin: Path | None = None) -> None:
        self._config, self._work = config, work
        if not (work / TOKENS).exists():
            raise FileNotFoundError(f"no {TOKENS} in {work}: run make data first")
        self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(work / TOKENS))
        torch.manual_seed(config.seed)
        self.model, self.average = build(config), build(config)
        self.at = Progressed()
        if begin and not self._checkpoint.exists():
            start.load(self.model, begin)
            self.at.phase = next(i for i, p in enumerate(config.train.phases) if p.loss == "transducer")
        self.average.load_state_dict(self.model.state_dict())
        self.average.eval().requires_grad_(False)
        upper = {id(p) for p in self.model.encoder.upper.parameters()}
        self._optimiser = torch.optim.AdamW(
            [
                {"params": [p for p in self.model.parameters() if id(p) not in upper], "scale": 1.0},
                {"params": list(self.model.encoder.upper.parameters()), "scale": config.train.moonshine_rate},
            ],
            betas=(0.9, 0.98),
            weight_decay=config.train.weight_decay,
        )
        self._store = Store(work / "features", self._pieces)
        self._choose = {
            name: self._store.read(path)
            for name in ("whole", "windows")
            if (path := work / "features" / f"choose-{name}.json").exists()
        }
        if self._checkpoint.exists():
            kept = torch.load(self._checkpoint, weights_only=True)
            self.model.load_state_dict(kept["model"])
            self.average.load_state_dict(kept["average"])
            self._optimiser.load_state_dict(kept["optimiser"])
            self.at = Progressed(**kept["at"])
        self._random = np.random.default_rng([config.seed, self.at.step])
        torch.manual_seed(config.seed + self.at.step)
        self._draws = Draw(self._random), Draw(self._random)

    @property
    def _checkpoint(self) -> Path:
        return self._work / "checkpoint.pt"

    def run(self, progress: Progress) -> None:
        """Train to the end of the last phase, or until Ctrl-C; a checkpoint is kept in either case."""
        try:
            self._run(progress)
        except KeyboardInterrupt:  # the step that it broke may be half done: a step is little
            self._keep()
            raise

    def _run(self, progress: Progress) -> None:
        phases = self._config.train.phases
        bar = progress.add_task("", total=sum(p.hours for p in phases))
        checked = started = time.monotonic()
        before = self.at.minutes
        losses: list[dict[str, float]] = []
        while self.at.phase < len(phases):
            phase = phases[self.at.phase]
            for batch in self._pass():
                losses.append(self._step(phase, batch))
                self.at.minutes = before + (time.monotonic() - started) / 60
                progress.update(bar, completed=self.at.total_hours, description=f"{phase.name} {_mean(losses[-50:])}")
                if time.monotonic() - checked > 60 * self._config.train.check_minutes:
                    progress.console.print(self.check(losses))
                    losses, checked = [], time.monotonic()
                if self.at.hours >= phase.hours:
                    self.at.phase, self.at.hours, self.at.step_of_phase = self.at.phase + 1, 0.0, 0
                    break
        progress.console.print(self.check(losses))

    def _pass(self) -> list[list[Example]]:
        """Draw some hours of audio in the configured mixture, as batches."""
        self._store.refresh()
        if not (self._store.speech or self._store.synthetic):
            raise FileNotFoundError(f"no features in {self._store.directory}: run make data first")
        share = self._config.train.speech_share if self._store.speech else 0.0
        share = share if self._store.synthetic else 1.0
        frames = _PASS_HOURS * 3600 / FRAME_SECS
        speech, synthetic = self._draws
        drawn = speech.take(self._store.speech, frames * share) + synthetic.take(self._store.synthetic, frames * (1 - share))
        return batches(drawn, self._config.train.batch_secs / FRAME_SECS, self._random)

    def _step(self, phase: Phase, batch: list[Example]) -> dict[str, float]:
        settings = self._config.train
        done = min(1.0, self.at.hours / phase.hours)
        rate = phase.rate + (phase.final_rate - phase.rate) * done
        rate *= min(1.0, (self.at.step_of_phase + 1) / max(1, settings.warm_up_steps))
        for group in self._optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        self.model.train()
        layers = self.model.encoder.upper.layers
        self.model.encoder.upper.requires_grad_(phase.moonshine_layers > 0)
        for index, layer in enumerate(layers):
            layer.requires_grad_(index >= len(layers) - phase.moonshine_layers)
        losses = self._losses(phase, batch)
        self._optimiser.zero_grad()
        torch.autograd.backward(list(losses.values()))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        if norm.isfinite():
            self._optimiser.step()
        self.at.step += 1
        self.at.step_of_phase += 1
        self._follow()
        hours = sum(e.item.frames for e in batch) * FRAME_SECS / 3600
        self.at.hours += hours
        self.at.total_hours += hours
        return {"rate": rate, "norm": float(norm)} | {name: float(value.detach()) for name, value in losses.items()}

    def _losses(self, phase: Phase, batch: list[Example]) -> dict[str, Tensor]:
        """Return the losses a token; CTC's (Graves et al., 2006) has its weight once the transducer's is there."""
        blank, targets = self.model.blank, [e.tokens for e in batch]
        count = sum(len(t) for t in targets)
        # With AVX2 alone oneDNN has no LSTM in bfloat16 and refuses the call.
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.cpu.get_cpu_capability() == "AVX512"):
            encoded = encode(self.model, batch, self._random)
            ctc = functional.ctc_loss(
                self.model.ctc(pad_sequence(encoded)).float().log_softmax(-1),
                torch.cat(targets),
                torch.tensor([len(e) for e in encoded]),
                torch.tensor([len(t) for t in targets]),
                blank=blank,
                reduction="sum",
                zero_infinity=True,
            )
            if phase.loss == "ctc":
                return {"ctc": ctc / count}
            history = pad_sequence([functional.pad(t, (1, 0), value=blank) for t in targets], batch_first=True)
            wrong = torch.rand(history.shape) < self._config.train.wrong_tokens
            history = torch.where(wrong & (history != blank), torch.randint(blank, history.shape), history)
            predicted, _ = self.model.predictor(history)
            rows = [p[: len(t) + 1] for p, t in zip(predicted, targets, strict=True)]
            loss = transducer_loss(self.model.joint, encoded, rows, targets, blank)
        return {"transducer": loss.sum() / count, "ctc": self._config.train.ctc_weight * ctc / count}

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average after the weights (Polyak and Juditsky, 1992)."""
        keep = min(self._config.train.average, (self.at.step + 1) / (self.at.step + 10))
        theirs, ours = list(self.model.state_dict().values()), list(self.average.state_dict().values())
        torch._foreach_lerp_(ours, theirs, 1 - keep)

    def check(self, losses: list[dict[str, float]]) -> str:
        """Measure the average on what was held out, write it to the log, keep a checkpoint; return the log's line."""
        transducer = self._config.train.phases[min(self.at.phase, len(self._config.train.phases) - 1)].loss == "transducer"
        measured = {name: self._errors(examples, transducer) for name, examples in self._choose.items()}
        line = json.dumps({"at": self.at.__dict__, "losses": _mean_of(losses), "errors": measured})
        with (self._work / "log.jsonl").open("a") as file:
            file.write(line + "\n")
        self._keep()
        return line

    def _keep(self) -> None:
        """Write the checkpoint."""
        kept: dict[str, Any] = {"model": self.model.state_dict(), "average": self.average.state_dict()}
        kept |= {"optimiser": self._optimiser.state_dict(), "at": dict(self.at.__dict__)}
        scratch = self._checkpoint.with_suffix(".part")
        torch.save(kept, scratch)
        scratch.rename(self._checkpoint)

    @torch.inference_mode()
    def _errors(self, examples: list[Example], transducer: bool) -> dict[str, float]:
        """Return the word error rate in percent, of each set and of all."""
        pairs: dict[str, list[tuple[str, str]]] = {}
        for batch in batches(examples, 200 / FRAME_SECS, np.random.default_rng(0)):
            encoded = encode(self.average, batch)
            decode = greedy if transducer else collapse
            tokens = decode(self.average, pad_sequence(encoded, batch_first=True), torch.tensor([len(e) for e in encoded]))
            for example, hypothesis in zip(batch, tokens, strict=True):
                pair = example.item.text, self._pieces.decode(hypothesis)
                pairs.setdefault(example.item.set, []).append(pair)
                pairs.setdefault("all", []).append(pair)
        return {
            name: round(100 * jiwer.wer([text for text, _ in pair], [hypothesis for _, hypothesis in pair]), 2)
            for name, pair in sorted(pairs.items())
        }


def _mean_of(losses: list[dict[str, float]]) -> dict[str, float]:
    names = losses[-1] if losses else {}
    return {name: round(float(np.mean([one[name] for one in losses if name in one])), 5) for name in names}


def _mean(losses: list[dict[str, float]]) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in _mean_of(losses).items() if name in {"ctc", "transducer"})


def main(
    work: Annotated[Path, typer.Option(help="Where `make data` put the features; checkpoints and the log go there too")],
    begin: Annotated[Path | None, typer.Option(help="Model repository to start from, at the first transducer phase")] = None,
    config: Annotated[Path, typer.Option(help="The configuration")] = configuration.DEFAULT,
) -> None:
    """Train the transducer; go on from the checkpoint if there is one."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        Trainer(configuration.load(config), work, begin).run(progress)


if __name__ == "__main__":
    run(main)
