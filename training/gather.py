"""`make text`: gather sentences from Debian packages, and order them by the words that they cover.

A training synthesises as many sentences as its time allows, from the top of the file. Sentences with words that are still rare
among the earlier ones come first, so any prefix of the file covers as many words as possible.
"""

from __future__ import annotations

import gzip
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from training import config as configuration
from training.command import run
from training.text import normalise, sentences

PACKAGES = ("bible-kjv", "bible-kjv-text", "dict-gcide", "dict-wn", "dict-jargon", "dict-devil", "fortunes", "fortunes-min")
FEWEST_WORDS, MOST_WORDS = 3, 34
"""Shortest and longest sentence to synthesise, in words."""
COMMON, RARE = 1_000, 30_000
"""Frequency ranks of the words to cover. More common words are covered anyway; rarer ones hardly occur in speech."""
_ENTRIES = {"webster", "wordnet", "jargon"}
"""Sources with dictionary entries instead of prose."""
_LEFT_OUT = {"pratchett", "startrek", "songs-poems", "knghtbrd", "translate-me", "art", "ascii-art", "perl", "magic", "ethnic"}
"""Fortune files that are left out: long quotations of protected works, text that is not prose, or insults."""
_WEBSTER = "[1913 Webster]"
_SPOKEN = re.compile(r"[A-Za-z' ,.;:!?-]+")
_ABBREVIATIONS = {"Mr": "Mister", "Mrs": "Missus", "Dr": "Doctor", "St": "Saint"}


def _prose(text: str) -> Iterator[str]:
    """Yield the sentences of a text that a voice can read without changes."""
    text = re.sub(r"\s+", " ", text.replace("_", "").replace("--", ", ").replace("’", "'").replace('"', ""))
    text = re.sub(r"\b(Mr|Mrs|Dr|St)\.", lambda found: _ABBREVIATIONS[found[1]], text)
    for sentence in re.split(r"(?<=[.!?;:])[')\]]*\s+", text):
        words = sentence.split()
        if not FEWEST_WORDS <= len(words) <= MOST_WORDS or not _SPOKEN.fullmatch(sentence):
            continue
        if re.search(r"\b[A-Z]{2,}\b|\b[B-HJ-NP-Z]\.|\b[b-hj-z]\b", sentence):
            continue
        yield sentence.strip()


def _dictionary(root: Path, name: str) -> str:
    with gzip.open(root / f"usr/share/dictd/{name}.dict.dz", "rt", encoding="utf-8", errors="ignore") as file:
        return file.read()


def _bible(root: Path) -> Iterator[str]:
    """Yield the verses of the King James Version, printed by the package's program."""
    program = [f"{root}/usr/bin/bible", "-p", f"{root}/usr/lib", "-f", "gen1:1-rev22:21"]
    printed = subprocess.run(program, check=True, capture_output=True, text=True).stdout  # noqa: S603 - our own words
    for line in printed.splitlines():
        yield from _prose(line.partition(" ")[2])


def _webster(root: Path) -> Iterator[str]:
    """Yield definitions and quotations of Webster's dictionary of 1913, as marked in GCIDE."""
    for entry in _dictionary(root, "gcide").split("\n\n"):
        text, mark, _ = entry.partition(_WEBSTER)
        if not mark:
            continue
        text = re.sub(r"\[[^\]]*\]|\([^)]*\)|\\[^\\]*\\|\{|\}|--[A-Z][^.\n]*\.?|\b(n|a|v|adv|pl|Syn|prep)\.", " ", text)
        yield from (s for s in _prose(text) if len(s.split()) > 4)  # noqa: PLR2004 - shorter ones are lists of synonyms


def _wordnet(root: Path) -> Iterator[str]:
    """Yield WordNet's definitions and examples."""
    text = _dictionary(root, "wn")
    for quoted in re.findall(r'"([^"]{12,300})"', text):
        yield from _prose(quoted)
    for entry in re.split(r"\n(?=\S)", re.sub(r"\[[^\]]*\]|\([^)]*\)", " ", text)):
        for meaning in re.split(r"(?:n |v |adj |adv |\s)\d*: ", entry)[1:]:
            yield from _prose(meaning.partition(";")[0].partition('"')[0])


def _fortunes(root: Path) -> Iterator[str]:
    for path in sorted((root / "usr/share/games/fortunes").iterdir()):
        if not path.suffix and path.name not in _LEFT_OUT:
            yield from _prose(path.read_text(errors="ignore").replace("\n%\n", ".\n"))


def gather(root: Path) -> dict[str, list[str]]:
    """Return the sentences of each source from the packages unpacked under `root`."""
    found: dict[str, Iterable[str]] = {
        "bible-kjv": _bible(root),
        "webster": _webster(root),
        "wordnet": _wordnet(root),
        "fortunes": _fortunes(root),
        "jargon": _prose(_dictionary(root, "jargon")),
        "devil": _prose(_dictionary(root, "devil")),
    }
    return {name: list(dict.fromkeys(lines)) for name, lines in found.items()}


def covering(prose: list[str], entries: list[str], ranks: dict[str, int], random: np.random.Generator) -> list[str]:
    """Order sentences so that words of ranks `COMMON` to `RARE` come early and evenly; alternate prose and entries.

    Dictionary entries are assigned to rounds: an entry goes to the round in which its rarest word occurs next, so each round
    covers as many of the remaining words as possible. Prose is in random order.

    Args:
        prose: sentences of prose.
        entries: sentences of dictionaries.
        ranks: frequency rank of each word.
        random: shuffles both.
    """
    said: Counter[str] = Counter()
    rounds: list[int] = []
    last = 0
    order = random.permutation(len(entries))
    for index in order:
        words = {w for w in normalise(entries[index]).split() if COMMON <= ranks.get(w, 0) < RARE}
        rounds.append(min((said[w] for w in words), default=last))
        last = max(last, rounds[-1])
        said.update(words)
    keys = np.array(rounds) + random.random(len(rounds))
    dealt = [entries[order[i]] for i in np.argsort(keys)]
    mixed = itertools.zip_longest([prose[i] for i in random.permutation(len(prose))], dealt)
    return [text for pair in mixed for text in pair if text]


def coverage(texts: Iterable[str], ranks: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Return, for each band of ranks, the number of words that occur at least once and at least five times."""
    counts = Counter(word for text in texts for word in normalise(text).split())
    bands = {"1-1k": (0, 1_000), "1k-3k": (1_000, 3_000), "3k-10k": (3_000, 10_000), "10k-30k": (10_000, 30_000)}
    many = 5
    covered = {}
    for name, (first, stop) in bands.items():
        words = [w for w, rank in ranks.items() if first <= rank < stop]
        covered[name] = sum(counts[w] > 0 for w in words), sum(counts[w] >= many for w in words)
    return covered


def ranked() -> dict[str, int]:
    """Return the frequency rank of each English word, from wordfreq."""
    from wordfreq import top_n_list  # noqa: PLC0415 - the import takes a second, and only this step needs it

    return {word: rank for rank, word in enumerate(top_n_list("en", 2 * RARE)) if re.fullmatch(r"[a-z']+", word)}


def unpack(root: Path) -> None:
    """Download the packages with apt, and unpack them under `root`."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=scratch, check=True)  # noqa: S603, S607 - our own words
        for package in Path(scratch).glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, root], check=True)  # noqa: S603, S607 - our own words


def main(
    into: Annotated[Path, typer.Option(help="File to write: one sentence per line, gzip-compressed")],
    packages: Annotated[Path | None, typer.Option(help="Directory of packages that are already unpacked")] = None,
    config: Annotated[Path, typer.Option(help="The configuration; its sentences are included")] = configuration.DEFAULT,
) -> None:
    """Gather and order text, and print its coverage."""
    settings = configuration.load(config)
    with tempfile.TemporaryDirectory() as scratch:
        root = packages or Path(scratch)
        if not packages:
            unpack(root)
        found = {"repository": sentences(settings.data.sentences), **gather(root)}
    unique: dict[str, tuple[str, str]] = {}
    for name, texts in found.items():
        for text in texts:
            unique.setdefault(normalise(text), (name, text))
    for source in found:
        new = [text for name, text in unique.values() if name == source]
        typer.echo(f"{source}: {len(new)} sentences, {sum(len(text.split()) for text in new)} words")
    prose = [text for name, text in unique.values() if name not in _ENTRIES]
    entries = [text for name, text in unique.values() if name in _ENTRIES]
    ranks = ranked()
    ordered = covering(prose, entries, ranks, np.random.default_rng(settings.seed))
    with gzip.open(into, "wt", encoding="utf-8") as file:
        file.write("\n".join(ordered) + "\n")
    for share in (0.1, 0.25, 0.5, 1.0):
        typer.echo(f"first {share:.0%}: {coverage(ordered[: int(share * len(ordered))], ranks)}")


if __name__ == "__main__":
    run(main)
