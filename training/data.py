"""`make data`: speak the sentences, read the recordings; nothing that is already there is made again.

A training may run beside: it takes up shards as they appear.
"""

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
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training import config as configuration
from training import store
from training.command import run
from training.config import Config
from training.speech import RATE, Audio, Recording, Voices, check_installed, grouped, recordings
from training.text import normalise, sentences

TOKENS = "tokens.model"
LANGUAGE = "language.npz"
"""All text as pieces: `tokens` of all sentences in a row, and the `lengths` of each."""
_RECORDINGS_A_SHARD = 100


@dataclass(frozen=True)
class Job:
    """One shard to make: numbers of sentences, or recordings."""

    name: str
    sentences: range | None = None
    recordings: tuple[Recording, ...] = ()


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
        yield Job("choose", recordings=tuple(chosen))
    random = np.random.default_rng(config.seed)
    kept = [r for r in train if random.random() < data.most_of_a_set.get(r.set, 1.0)]
    for number, first in enumerate(range(0, len(kept), _RECORDINGS_A_SHARD)):
        yield Job(f"speech-{number:02d}", recordings=tuple(kept[first : first + _RECORDINGS_A_SHARD]))
    count = len(sentences(data.sentences)[: data.most_sentences])
    for number, first in enumerate(range(0, count, data.shard_sentences)):
        yield Job(f"synthetic-{number:05d}", sentences=range(first, min(first + data.shard_sentences, count)))


class Maker:
    """Makes shards, one after the other, in a process of its own."""

    def __init__(self, config: Config, directory: Path) -> None:
        self._config, self._directory = config, directory
        self._voices = Voices(config.data.voices)
        self._sentences = sentences(config.data.sentences)

    def make(self, job: Job) -> str:
        """Make one shard; its random choices depend on the seed and its name alone."""
        random = np.random.default_rng([self._config.seed, *job.name.encode()])
        made = self._spoken(job, random) if job.sentences else ((r.read(), r.text, r.set) for r in job.recordings)
        store.write(made, self._directory / f"{job.name}.json")
        return job.name

    def _spoken(self, job: Job, random: np.random.Generator) -> Iterator[tuple[Audio, str, str]]:
        longest = self._config.data.longest_secs * RATE
        for group in grouped([self._sentences[i] for i in job.sentences or ()], random):
            voice, audio = self._voices.speak(group, random)
            if len(audio) > longest:
                group = group[:1]  # noqa: PLW2901 - too long together
                voice, audio = self._voices.speak(group, random)
            if len(audio) <= longest:
                yield audio, normalise(" ".join(group)), voice


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


def _encode(lines: list[str], model: Path) -> list[list[int]]:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return [row for row in pieces.encode([normalise(line) for line in lines]) if row]


def language(config: Config, directory: Path, pool: ProcessPoolExecutor) -> None:
    """Write all text as pieces, for the predictor to learn from; once."""
    if (directory / LANGUAGE).exists():
        return
    lines, share = sentences(config.data.sentences)[: config.data.most_sentences], 5_000
    parts = [lines[first : first + share] for first in range(0, len(lines), share)]
    rows = [row for part in pool.map(_encode, parts, itertools.repeat(directory / TOKENS)) for row in part]
    scratch = directory / f"part-{LANGUAGE}"
    np.savez(scratch, tokens=np.concatenate([np.array(row, np.int16) for row in rows]), lengths=[len(row) for row in rows])
    scratch.rename(directory / LANGUAGE)


def main(
    work: Annotated[Path, typer.Option(help="Where speech, checkpoints and the log go")],
    speech: Annotated[Path | None, typer.Option(help="Labelled recordings with their manifest.tsv")] = None,
    choose: Annotated[Path | None, typer.Option(help="Labelled recordings to choose by, instead of some of those")] = None,
    config: Annotated[Path, typer.Option(help="The configuration")] = configuration.DEFAULT,
    processes: Annotated[int, typer.Option(help="How many at once")] = os.cpu_count() or 1,
) -> None:
    """Make the speech to train on."""
    settings = configuration.load(config)
    check_installed(settings.data.voices)
    directory = work / "speech"
    directory.mkdir(parents=True, exist_ok=True)
    tokens(settings, work, speech)
    todo = [job for job in jobs(settings, speech, choose) if not (directory / f"{job.name}.json").exists()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(processes, context, initializer=_start, initargs=(settings, directory)) as pool,
        Progress(*columns) as progress,
    ):
        language(settings, work, pool)
        bar = progress.add_task("shards", total=len(todo))
        for made in as_completed([pool.submit(_make, job) for job in todo]):
            progress.update(bar, advance=1, description=made.result())


if __name__ == "__main__":
    run(main)
