"""`make data`: synthesise the sentences and read the recordings. Existing shards are kept.

A training can run at the same time: it reads shards as they appear.
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
"""File with all text as pieces: the concatenated `tokens` of all sentences, and the `lengths` of the sentences."""
_RECORDINGS_A_SHARD = 100


@dataclass(frozen=True)
class Job:
    """One shard to write: indices of sentences to synthesise, or recordings."""

    name: str
    sentences: range | None = None
    recordings: tuple[Recording, ...] = ()


def held_out(found: list[Recording], every: int) -> tuple[list[Recording], list[Recording]]:
    """Split recordings into a training set and a validation set, which gets one of `every`."""
    return [r for i, r in enumerate(found) if i % every], found[::every]


def jobs(config: Config, speech: Path | None, choose: Path | None) -> Iterator[Job]:
    """Yield the shards of a configuration, recordings first.

    Args:
        config: the configuration.
        speech: directory of recordings to train on.
        choose: directory of recordings to validate on; without it, some of `speech` are held out.
    """
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
    """Writes shards, one at a time, in its own process."""

    def __init__(self, config: Config, directory: Path) -> None:
        self._config, self._directory = config, directory
        self._voices = Voices(config.data.voices)
        self._sentences = sentences(config.data.sentences)

    def make(self, job: Job) -> str:
        """Write one shard, and return its name. Random choices depend only on the seed and the name."""
        random = np.random.default_rng([self._config.seed, *job.name.encode()])
        made = self._spoken(job, random) if job.sentences else ((r.read(), r.text, r.set) for r in job.recordings)
        store.write(made, self._directory / f"{job.name}.json")
        return job.name

    def _spoken(self, job: Job, random: np.random.Generator) -> Iterator[tuple[Audio, str, str]]:
        longest = self._config.data.longest_secs * RATE
        for group in grouped([self._sentences[i] for i in job.sentences or ()], random):
            voice, audio = self._voices.speak(group, random)
            if len(audio) > longest:
                group = group[:1]  # noqa: PLW2901 - together the sentences are too long
                voice, audio = self._voices.speak(group, random)
            if len(audio) <= longest:
                yield audio, normalise(" ".join(group)), voice


_maker: Maker | None = None


def _start(config: Config, directory: Path) -> None:
    global _maker  # noqa: PLW0603 - one maker per process
    os.nice(5)
    _maker = Maker(config, directory)


def _make(job: Job) -> str:
    if _maker is None:
        raise RuntimeError("no maker in this process")
    return _maker.make(job)


def tokens(config: Config, directory: Path, speech: Path | None) -> None:
    """Copy the configured vocabulary, or train a unigram model (Kudo, 2018) on all text. Keep an existing vocabulary."""
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
    """Write all text as pieces, from which the predictor learns. Keep an existing file."""
    if (directory / LANGUAGE).exists():
        return
    lines, share = sentences(config.data.sentences)[: config.data.most_sentences], 5_000
    parts = [lines[first : first + share] for first in range(0, len(lines), share)]
    rows = [row for part in pool.map(_encode, parts, itertools.repeat(directory / TOKENS)) for row in part]
    scratch = directory / f"part-{LANGUAGE}"
    np.savez(scratch, tokens=np.concatenate([np.array(row, np.int16) for row in rows]), lengths=[len(row) for row in rows])
    scratch.rename(directory / LANGUAGE)


def main(
    work: Annotated[Path, typer.Option(help="Directory for speech, checkpoints and the log")],
    speech: Annotated[Path | None, typer.Option(help="Labelled recordings with their manifest.tsv")] = None,
    choose: Annotated[Path | None, typer.Option(help="Recordings to validate on, instead of a part of --speech")] = None,
    config: Annotated[Path, typer.Option(help="The configuration")] = configuration.DEFAULT,
    processes: Annotated[int, typer.Option(help="Number of processes")] = os.cpu_count() or 1,
) -> None:
    """Write the shards of speech to train on."""
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
