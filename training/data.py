"""`make data`: speak the sentences, distort, encode; nothing that is already there is made again."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import sentencepiece
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training import config as configuration
from training import moonshine
from training.command import run
from training.config import Config
from training.distort import distort, level, stretch
from training.features import Features, Spoken
from training.model import LOWER
from training.speech import RATE, Audio, Recording, Voices, check_installed, grouped, recordings
from training.text import normalise, sentences

TOKENS = "tokens.model"
_STRETCHES = (1.0, 0.9, 1.1, 0.95, 1.06, 0.88, 1.13)


@dataclass(frozen=True)
class Job:
    """One shard to make: numbers of sentences, or recordings with the number of the copy (0: undistorted)."""

    name: str
    sentences: range | None = None
    recordings: tuple[Recording, ...] = ()
    copy: int = 0
    windowed: float = 0.0


def held_out(found: list[Recording], every: int) -> tuple[list[Recording], list[Recording]]:
    """Split recordings into those to train on and those to choose by."""
    return [r for i, r in enumerate(found) if i % every], found[::every]


def jobs(config: Config, speech: Path | None, choose: Path | None) -> Iterator[Job]:
    """List the shards that the configuration asks for, recordings first; without `choose` some of `speech` are held out."""
    data = config.data
    train = recordings(speech) if speech else []
    if choose:
        chosen = recordings(choose)
    else:
        train, chosen = held_out(train, data.held_out)
    if chosen:
        yield Job("choose-whole", recordings=tuple(chosen))
        yield Job("choose-windows", recordings=tuple(chosen), windowed=1.0)
    if train:
        random = np.random.default_rng(config.seed)
        for copy in range(data.speech_copies):
            kept = [r for r in train if random.random() < data.most_of_a_copy.get(r.set, 1.0)]
            yield Job(f"speech-{copy:02d}", recordings=tuple(kept), copy=copy, windowed=data.windowed if copy else 0.0)
    count = len(sentences(data.sentences)[: data.most_sentences])
    for number, first in enumerate(range(0, count, data.shard_sentences)):
        numbers = range(first, min(first + data.shard_sentences, count))
        yield Job(f"synthetic-{number:04d}", sentences=numbers, windowed=data.windowed)


class Maker:
    """Makes shards, one after the other, in a process of its own."""

    def __init__(self, config: Config, directory: Path) -> None:
        torch.set_num_threads(1)
        self._config, self._directory = config, directory
        stem, lower, _ = moonshine.load(LOWER)
        self._features = Features(stem, lower, config.data)
        self._voices = Voices(config.data.voices)
        self._sentences = sentences(config.data.sentences)

    def make(self, job: Job) -> str:
        """Make one shard; its random choices depend on the seed and its name alone."""
        random = np.random.default_rng([self._config.seed, *job.name.encode()])
        speech = self._spoken(job, random) if job.sentences else self._recorded(job, random)
        self._features.write(list(speech), self._directory / f"{job.name}.json")
        return job.name

    def _spoken(self, job: Job, random: np.random.Generator) -> Iterator[Spoken]:
        chosen = [self._sentences[i] for i in job.sentences or ()]
        others: list[Audio] = []
        for group in grouped(chosen, random):
            voice, audio = self._voices.speak(group, random)
            if len(audio) > self._config.data.longest_secs * RATE:
                group = group[:1]  # noqa: PLW2901 - too long together
                voice, audio = self._voices.speak(group, random)
            if len(audio) > self._config.data.longest_secs * RATE:
                continue
            spoken = Spoken(distort(audio, others, random), normalise(" ".join(group)), voice, random.random() < job.windowed)
            others = [*others[-7:], audio]
            yield spoken

    def _recorded(self, job: Job, random: np.random.Generator) -> Iterator[Spoken]:
        others: list[Audio] = []
        for recording in job.recordings:
            audio = recording.read()
            others = [*others[-7:], audio]
            if job.copy:
                audio = distort(stretch(audio, _STRETCHES[(job.copy - 1) % len(_STRETCHES)]), others[:-1], random)
            else:
                audio = level(audio, random)
            yield Spoken(audio, recording.text, recording.set, random.random() < job.windowed)


_maker: Maker | None = None


def _start(config: Config, directory: Path) -> None:
    global _maker  # noqa: PLW0603 - the one of this process
    os.nice(5)
    _maker = Maker(config, directory)


def _make(job: Job) -> str:
    if _maker is None:
        raise RuntimeError("no maker in this process")
    return _maker.make(job)


def tokens(config: Config, directory: Path, speech: Path | None) -> None:
    """Take the pieces that the configuration names, or learn some from all text (Kudo's unigram model, 2018); once."""
    if (directory / TOKENS).exists():
        return
    if config.data.tokens:
        shutil.copyfile(config.data.tokens, directory / TOKENS)
        return
    real = (r.text for r in held_out(recordings(speech), config.data.held_out)[0]) if speech else iter(())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=itertools.chain((normalise(s) for s in sentences(config.data.sentences)), real),
        model_prefix=str(directory / Path(TOKENS).stem),
        vocab_size=config.data.pieces,
        model_type="unigram",
        character_coverage=1.0,
        normalization_rule_name="identity",
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )


def main(
    work: Annotated[Path, typer.Option(help="Where features, checkpoints and the log go")],
    speech: Annotated[Path | None, typer.Option(help="Labelled recordings with their manifest.tsv")] = None,
    choose: Annotated[Path | None, typer.Option(help="Labelled recordings to choose by, instead of some of those")] = None,
    config: Annotated[Path, typer.Option(help="The configuration")] = configuration.DEFAULT,
    processes: Annotated[int, typer.Option(help="How many at once")] = os.cpu_count() or 1,
) -> None:
    """Make the features to train on."""
    settings = configuration.load(config)
    check_installed(settings.data.voices)
    directory = work / "features"
    directory.mkdir(parents=True, exist_ok=True)
    tokens(settings, work, speech)
    todo = [job for job in jobs(settings, speech, choose) if not (directory / f"{job.name}.json").exists()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(processes, context, initializer=_start, initargs=(settings, directory)) as pool,
        Progress(*columns) as progress,
    ):
        bar = progress.add_task("shards", total=len(todo))
        for made in as_completed([pool.submit(_make, job) for job in todo]):
            progress.update(bar, advance=1, description=made.result())


if __name__ == "__main__":
    run(main)
