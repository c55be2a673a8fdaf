"""`make train`: train a language model of the text, then the transducer. Ctrl-C stops it; the next call continues.

The learning rate decays to zero over the configured minutes of wall time or over the configured steps.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import sentencepiece
import torch
import typer
from torch import Tensor
from torch.nn import functional

from training import chunks, moonshine, start
from training import config as configuration
from training.command import TrainingError, run
from training.config import Config
from training.data import LANGUAGE, TOKENS
from training.distort import Distorter
from training.loss import transducer_loss
from training.model import LOWER, build, greedy
from training.moonshine import FRAME_SAMPLES
from training.store import Batch, Example, Pool, Store, collate, grouped, read
from training.weights import copies

_LANGUAGE_TOKENS = 16_384
"""Maximum number of tokens in a batch of the language model, padding included."""
_LANGUAGE_RATE = 2e-3
_LOG_STEPS = 20
"""Interval between two reads of the losses, in steps; each read waits for the device."""
_CHECK_CHUNK = chunks.cut(chunk=10, left=31, right=5)
"""Chunks of held-out recordings: those of the server's default latency."""
_CHECK_SECS = 240
_SMALLEST_BATCH_SECS = 20.0


@dataclass
class Progress:
    """Progress of the training.

    Attributes:
        step: number of finished steps.
        minutes: wall time.
        hours: audio of all steps.
    """

    step: int = 0
    minutes: float = 0.0
    hours: float = 0.0


class Trainer:
    """Trains the model; the checkpoint has the weights, their moving average and the optimiser's state.

    Args:
        config: the configuration.
        work: directory of speech, checkpoint and log.
        device: device to train on.
        begin: model repository whose weights the training starts from.
        copy_to: directory for 16-bit copies of the averaged weights.

    Raises:
        FileNotFoundError: the vocabulary is missing.
    """

    def __init__(
        self, config: Config, work: Path, device: torch.device, begin: Path | None = None, copy_to: Path | None = None
    ) -> None:
        self._config, self._work, self._device, self._copy_to = config, work, device, copy_to
        if not (work / TOKENS).exists():
            raise FileNotFoundError(f"no {TOKENS} in {work}: run make data first")
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(work / TOKENS))
        self._pieces = pieces
        torch.manual_seed(config.seed)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        # cuDNN's attention takes half a second to plan for a new shape, and here every batch has a new shape.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.model, self.average = build(config), build(config)
        self.at = Progress()
        self._begun = begin is not None
        if begin and not self._checkpoint.exists():
            start.load(self.model, begin)
            _, lower, upper = moonshine.load(LOWER)  # as published: the start's weights may be worse on other voices
            self.model.encoder.lower.load_state_dict(lower.state_dict())
            self.model.encoder.upper.load_state_dict(upper.state_dict())
        self.average.load_state_dict(self.model.state_dict())
        self.model.to(device)
        self.average.to(device).eval().requires_grad_(False)
        self.model.encoder.stem.requires_grad_(False)
        self._optimiser = self._optimiser_of_all()
        self._random = np.random.default_rng(config.seed)
        self._store = Store(work / "speech", pieces, device, Pool(self._random), Pool(self._random))
        self.batch_secs = config.train.batch_secs
        if self._checkpoint.exists():
            kept = torch.load(self._checkpoint, weights_only=True, map_location=device)
            self.model.load_state_dict(kept["model"])
            self.average.load_state_dict(kept["average"])
            self._optimiser.load_state_dict(kept["optimiser"])
            self.at = Progress(**kept["at"])
            self._random = np.random.default_rng([config.seed, self.at.step])
            torch.manual_seed(config.seed + self.at.step)
        self._distorter = Distorter(config.seed + self.at.step, device)

    def _optimiser_of_all(self) -> torch.optim.AdamW:
        encoder, settings = self.model.encoder, self._config.train
        scales = {id(p): settings.lower_rate for p in encoder.lower.parameters()}
        scales |= {id(p): settings.upper_rate for p in encoder.upper.parameters()}
        encoder.lower.requires_grad_(settings.lower_rate > 0)
        encoder.upper.requires_grad_(settings.upper_rate > 0)
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for parameter in (p for p in self.model.parameters() if p.requires_grad):
            groups.setdefault((scales.get(id(parameter), 1.0), parameter.ndim > 1), []).append(parameter)
        return torch.optim.AdamW(
            [
                {"params": parameters, "scale": scale, "weight_decay": settings.weight_decay if matrix else 0.0}
                for (scale, matrix), parameters in groups.items()
            ],
            lr=settings.rate,
            betas=(0.9, 0.98),
            fused=self._device.type == "cuda",
        )

    @property
    def _checkpoint(self) -> Path:
        return self._work / "checkpoint.pt"

    def run(self) -> None:
        """Train to the end, or until Ctrl-C; write a checkpoint in either case."""
        stop = threading.Event()
        reader = threading.Thread(target=self._read_shards, args=(stop,), daemon=True)
        reader.start()
        try:
            if not self.at.step:
                self._learn_language()
            self._run()
        except KeyboardInterrupt:  # the interrupted step may be half done, which costs little
            self._save_checkpoint()
            raise
        finally:
            stop.set()
            reader.join()

    def _read_shards(self, stop: threading.Event) -> None:
        while not stop.wait(0.2):
            self._store.refresh()

    def _learn_language(self) -> None:
        """Train predictor and joint network as a language model of the text: the joint's frame input is zero."""
        path = self._work / LANGUAGE
        if not (self._config.train.language_epochs and path.exists()):
            return
        with np.load(path) as file:
            tokens, lengths = torch.from_numpy(file["tokens"].astype(np.int64)), file["lengths"]
        rows = tokens.split(lengths.tolist())
        order = np.argsort(lengths + self._random.random(len(lengths)))
        batches: list[list[int]] = [[]]
        for index in order:
            if (len(batches[-1]) + 1) * (int(lengths[index]) + 1) > _LANGUAGE_TOKENS:
                batches.append([])
            batches[-1].append(int(index))
        joint, predictor = self.model.joint, self.model.predictor
        # The output layer of a model to start from already fits its frames, so it is kept.
        learnt = [*predictor.parameters(), *joint.token.parameters()]
        learnt += [] if self._begun else [*joint.out.parameters()]
        optimiser = torch.optim.AdamW(learnt, lr=_LANGUAGE_RATE, betas=(0.9, 0.98), fused=self._device.type == "cuda")
        total, began = self._config.train.language_epochs * len(batches), time.monotonic()
        self.model.train()
        for step in range(total):
            if step % len(batches) == 0:
                shuffled = self._random.permutation(len(batches))
            for group in optimiser.param_groups:
                group["lr"] = _LANGUAGE_RATE * min(1.0, (step + 1) / 50) * (1 - step / total)
            chosen = [rows[i] for i in batches[shuffled[step % len(batches)]]]
            padded = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-100).to(self._device)
            history = functional.pad(padded.clamp(min=0), (1, 0), value=self.model.blank)[:, :-1]
            with self._autocast():
                predicted, _ = predictor(history)
                logits = joint(joint.frame.bias.detach(), joint.token(predicted))[..., :-1]
            loss = functional.cross_entropy(logits.float().flatten(0, 1), padded.flatten(), ignore_index=-100)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learnt, 1.0)
            optimiser.step()
            if step % 200 == 0 or step == total - 1:
                self._log({"language": {"step": step, "of": total, "loss": round(float(loss.detach()), 4)}}, began)
        self.average.load_state_dict(self.model.state_dict())

    def _autocast(self) -> torch.autocast:
        # On a CPU with AVX2 alone, oneDNN has no LSTM in bfloat16 and raises an error.
        able = self._device.type != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=able)

    def _run(self) -> None:
        settings = self._config.train
        if (settings.minutes is None) == (settings.steps is None):
            raise TrainingError("give either minutes or steps to train for")
        before, began = self.at.minutes, time.monotonic()
        checked, losses = began, list[dict[str, Tensor]]()
        waiting = self._batches()
        while (done := self._done()) < 1:
            try:
                losses.append(self._step(next(waiting), done))
            except torch.cuda.OutOfMemoryError:
                if self.batch_secs < 2 * _SMALLEST_BATCH_SECS:
                    raise
                self._optimiser.zero_grad()
                torch.cuda.empty_cache()
                self.batch_secs *= 0.75
                waiting = self._batches()
                self._log({"batch_secs": self.batch_secs}, began)
            self.at.minutes = before + (time.monotonic() - began) / 60
            if len(losses) == _LOG_STEPS:
                self._log({"at": vars(self.at), "losses": _mean_of(losses), "hours": self._hours()}, began)
                losses.clear()
            if time.monotonic() - checked > 60 * settings.check_minutes:
                self.check(began)
                checked = time.monotonic()
        self.at.minutes = before + (time.monotonic() - began) / 60
        self.check(began)

    def _done(self) -> float:
        """Return the finished share of the training, 0 … 1."""
        settings = self._config.train
        return self.at.step / settings.steps if settings.steps else self.at.minutes / (settings.minutes or 1)

    def _hours(self) -> dict[str, float]:
        return {"speech": round(self._store.speech.hours, 2), "synthetic": round(self._store.synthetic.hours, 2)}

    def _batches(self) -> Iterator[list[Example]]:
        """Yield batches for ever; wait for the first shard.

        Raises:
            FileNotFoundError: there is no shard after two minutes, or none is being written.
        """
        patience = time.monotonic() + 120
        while not (self._store.speech.examples or self._store.synthetic.examples):
            if not any((self._work / "speech").glob("*")) or time.monotonic() > patience:
                raise FileNotFoundError(f"no speech in {self._work}: run make data first")
            time.sleep(0.2)
        while True:
            yield from self._store.batches(self.batch_secs, self._config.train.speech_share)

    def _step(self, examples: list[Example], done: float) -> dict[str, Tensor]:
        settings = self._config.train
        warmed = min(1.0, (self.at.step + 1) / max(1, settings.warm_up_steps))
        rate = settings.rate * warmed * 0.5 * (1 + math.cos(math.pi * done))
        for group in self._optimiser.param_groups:
            group["lr"] = rate * group["scale"]
        self.model.train()
        with torch.no_grad():
            batch = collate(examples, self._device, self._distorter.speeds(len(examples)))
            samples = self._distorter(batch.samples, batch.lengths)
        losses = self._losses(batch, samples)
        self._optimiser.zero_grad()
        torch.autograd.backward(list(losses.values()))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        self._optimiser.step()
        self.at.step += 1
        self._update_average()
        self.at.hours += sum(batch.samples_of_rows) / 16_000 / 3600
        return {"rate": torch.tensor(rate), "norm": norm.detach()} | {name: value.detach() for name, value in losses.items()}

    def _losses(self, batch: Batch, samples: Tensor) -> dict[str, Tensor]:
        """Return the losses per token; the CTC loss (Graves et al., 2006) is weighted."""
        settings, blank, count = self._config.train, self.model.blank, sum(batch.tokens_of_rows)
        with self._autocast():
            encoded, frames = self._encode(samples, batch.frames)
            ctc = functional.ctc_loss(
                self.model.ctc(encoded).float().log_softmax(-1).transpose(0, 1),
                batch.targets,
                torch.tensor([-(-n // (4 * FRAME_SAMPLES)) for n in batch.samples_of_rows]),
                torch.tensor(batch.tokens_of_rows),
                blank=blank,
                reduction="sum",
                zero_infinity=True,
            )
            history = functional.pad(batch.targets, (1, 0), value=blank)
            wrong = torch.rand(history.shape, device=self._device) < settings.wrong_tokens
            history = torch.where(wrong & (history != blank), torch.randint_like(history, blank), history)
            predicted, _ = self.model.predictor(history)
            loss = transducer_loss(self.model.joint, encoded, predicted, batch.targets, frames, batch.counts, blank)
        return {"transducer": loss.sum() / count, "ctc": settings.ctc_weight * ctc / count}

    def _encode(self, samples: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Encode whole recordings or chunk by chunk, with random frames masked."""
        by, hidden = self._config.train.chunks, _time_mask(frames, samples.shape[1] // FRAME_SAMPLES)
        if self._random.random() >= by.share:
            return self.model.encoder(samples, frames, hidden)
        size = int(self._random.integers(by.shortest, by.longest + 1))
        left = int(self._random.integers(by.shortest_left, by.longest_left + 1))
        return chunks.encode(self.model.encoder, samples, frames, chunks.cut(size, left, by.look_ahead), hidden)

    @torch.no_grad()
    def _update_average(self) -> None:
        """Update the moving average of the weights (Polyak and Juditsky, 1992)."""
        keep = min(self._config.train.average, (self.at.step + 1) / (self.at.step + 10))
        theirs, ours = list(self.model.state_dict().values()), list(self.average.state_dict().values())
        torch._foreach_lerp_(ours, theirs, 1 - keep)

    def check(self, began: float) -> None:
        """Write a checkpoint, evaluate the averaged weights on the held-out recordings, and log the result."""
        self._save_checkpoint()
        choose = self._work / "speech" / "choose.json"
        if choose.exists():
            examples = read(choose, self._pieces, self._device)
            errors = {"whole": self._errors(examples, None), "chunks": self._errors(examples, _CHECK_CHUNK)}
            self._log({"at": vars(self.at), "errors": errors, "hours": self._hours()}, began)

    def _log(self, entry: dict[str, Any], began: float) -> None:
        line = json.dumps(entry | {"secs": round(time.monotonic() - began, 1)})
        typer.echo(line)
        with (self._work / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def _save_checkpoint(self) -> None:
        """Write the checkpoint, and copies of the averaged weights if configured."""
        if self._copy_to:
            copies(self.average.state_dict(), self._copy_to)
        kept: dict[str, Any] = {"model": self.model.state_dict(), "average": self.average.state_dict()}
        kept |= {"optimiser": self._optimiser.state_dict(), "at": dict(vars(self.at))}
        scratch = self._checkpoint.with_suffix(".part")
        torch.save(kept, scratch)
        scratch.rename(self._checkpoint)

    @torch.inference_mode()
    def _errors(self, examples: list[Example], by: chunks.Cut | None) -> dict[str, float]:
        """Return the word error rate in percent for each set and for all."""
        counts: dict[str, list[int]] = {}
        for group in grouped(examples, _CHECK_SECS, np.random.default_rng(0)):
            batch = collate(group, self._device)
            encoder = self.average.encoder
            encoded, frames = (
                chunks.encode(encoder, batch.samples, batch.frames, by) if by else encoder(batch.samples, batch.frames)
            )
            for example, tokens in zip(group, greedy(self.average, encoded, frames, penalty=1.0), strict=True):
                reference = example.item.text.split()
                wrong = distance(reference, self._pieces.decode(tokens).split())
                for name in (example.item.set, "all"):
                    total = counts.setdefault(name, [0, 0])
                    total[0] += wrong
                    total[1] += len(reference)
        return {name: round(100 * wrong / words, 2) for name, (wrong, words) in sorted(counts.items())}


def distance(reference: list[str], hypothesis: list[str]) -> int:
    """Return the number of insertions, deletions and substitutions of words (Levenshtein, 1966)."""
    row = list(range(len(hypothesis) + 1))
    for number, word in enumerate(reference, 1):
        corner, row[0] = row[0], number
        for index, other in enumerate(hypothesis, 1):
            corner, row[index] = row[index], min(row[index] + 1, row[index - 1] + 1, corner + (word != other))
    return row[-1]


def _time_mask(frames: Tensor, longest: int) -> Tensor:
    """Return a time mask [B, T] as in SpecAugment (Park et al., 2019): up to 0.3 s, about once in 2.5 s."""
    many, device = max(1, round(longest * FRAME_SAMPLES / 16_000 / 2.5)), frames.device
    starts = torch.rand(len(frames), many, device=device) * frames[:, None]
    widths = torch.randint(0, 13, (len(frames), many), device=device)
    at = torch.arange(longest, device=device)
    return ((at >= starts[..., None]) & (at < (starts + widths)[..., None])).any(1)


def _mean_of(losses: list[dict[str, Tensor]]) -> dict[str, float]:
    return {name: round(float(torch.stack([one[name].float().cpu() for one in losses]).mean()), 6) for name in losses[-1]}


def main(
    work: Annotated[Path, typer.Option(help="Directory of the speech from `make data`, the checkpoint and the log")],
    begin: Annotated[Path | None, typer.Option(help="Model repository to start from")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or one of several: cuda:1")] = "cpu",
    minutes: Annotated[float | None, typer.Option(help="Duration of the training; overrides the configuration")] = None,
    copy_to: Annotated[Path | None, typer.Option(help="Directory for 16-bit copies of the averaged weights")] = None,
    config: Annotated[Path, typer.Option(help="The configuration")] = configuration.DEFAULT,
) -> None:
    """Train the transducer, or continue from a checkpoint."""
    settings = configuration.load(config)
    if minutes:
        settings = settings.model_copy(update={"train": settings.train.model_copy(update={"minutes": minutes, "steps": None})})
    Trainer(settings, work, torch.device(device), begin, copy_to).run()


if __name__ == "__main__":
    run(main)
