"""Measure what phrases do to transcripts: ``python -m perf.evaluate DIR --phrases FILE``.

Each recording gets a list of its own, as contextual recognisers are compared (Le et al. 2021, arXiv:2104.02194): the file's
phrases that are said in the recording and others up to a number, or others alone. A said phrase counts as found if the
transcript has it as whole words. A false alarm is a listed phrase that the transcript has more often than the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress

from gateway.audio import RATE
from perf.labelled import Recording, normalise
from perf.output import circumstances
from perf.sweep import Decoding

NUMBERS = (10, 100, 500)
"""Numbers of phrases of a recording."""

Lists = Mapping[str, Sequence[str]]
"""Phrases by the name of a recording."""


class Outcome(NamedTuple):
    """What a kind of list does.

    Attributes:
        listed: mean number of phrases in a list.
        said: number of occurrences of listed phrases in the recordings.
        found: number of these in the transcripts.
        found_without: the same without phrases.
        false_alarms, false_alarms_without: number of false alarms of the lists, with and without phrases.
        rate: word error rate in per cent.
    """

    listed: float
    said: int
    found: int
    found_without: int
    false_alarms: int
    false_alarms_without: int
    rate: float


def read_phrases(path: Path) -> list[str]:
    """Read phrases, one per line, each once; what follows a tab is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(filter(None, (normalise(line.partition("\t")[0]) for line in lines))))


def occurrences(phrase: str, text: str) -> int:
    """Return how often a text has a phrase as whole words. Both are normalised."""
    return f" {text} ".replace(" ", "  ").count(f" {phrase.replace(' ', '  ')} ")


def choose_lists(recordings: Sequence[Recording], phrases: Sequence[str], number: int, *, said: bool) -> Lists:
    """Return a list for each recording: as many phrases as given, of which those said there come first or are left out."""
    lists = {}
    for recording in recordings:
        here = [phrase for phrase in phrases if occurrences(phrase, recording.text)]
        others = sorted(set(phrases) - set(here))
        first = here[:number] if said else []
        count = min(number - len(first), len(others))
        lists[recording.name] = [*first, *Random(recording.name).sample(others, count)]  # noqa: S311 (reproducible)
    return lists


def judge(recordings: Sequence[Recording], lists: Lists, texts: Sequence[str], plain: Sequence[str], rate: float) -> Outcome:
    """Count what lists did.

    Args:
        recordings: the recordings.
        lists: their phrases.
        texts: transcripts with the phrases.
        plain: transcripts without.
        rate: word error rate of ``texts``.
    """
    said = found = found_without = alarms = alarms_without = 0
    for recording, text, plain_text in zip(recordings, texts, plain, strict=True):
        for phrase in lists[recording.name]:
            there, heard, heard_without = (occurrences(phrase, each) for each in (recording.text, text, plain_text))
            said += there
            found += min(there, heard)
            found_without += min(there, heard_without)
            alarms += max(0, heard - there)
            alarms_without += max(0, heard_without - there)
    listed = sum(map(len, lists.values())) / len(recordings)
    return Outcome(listed, said, found, found_without, alarms, alarms_without, rate)


def prove(decoding: Decoding, phrases: Sequence[str], console: Console) -> tuple[float, list[Outcome]]:
    """Decode with lists of all kinds; return the word error rate without phrases, and the outcomes.

    Args:
        decoding: decodes the recordings.
        phrases: phrases of the lists.
        console: shows the progress.
    """
    recordings, outcomes = decoding.recordings, []
    kinds = [choose_lists(recordings, phrases, number, said=said) for said in (True, False) for number in NUMBERS]
    with Progress(console=console) as progress:
        task = progress.add_task("decoding", total=(len(kinds) + 1) * len(recordings))

        def texts(lists: Callable[[Recording], Sequence[str]]) -> list[str]:
            return decoding.texts(decoding.start, lists, lambda: progress.advance(task))

        plain = texts(lambda _: ())
        for lists in kinds:
            found = texts(lambda recording, lists=lists: lists[recording.name])  # type: ignore[misc]
            outcomes.append(judge(recordings, lists, found, plain, decoding.rate(found)))
    return decoding.rate(plain), outcomes


def to_markdown(rate: float, outcomes: Sequence[Outcome], decoding: Decoding, directory: Path) -> str:
    """Return the outcomes as a table."""
    about, recordings = circumstances(), decoding.recordings
    seconds = sum(len(recording.samples) for recording in recordings) / RATE
    description = (
        f"{about['date']}; {len(recordings)} recordings of {seconds:.0f} s of {directory.name}; "
        f"beam {decoding.p.options.beam}, phrase_bonus {decoding.p.phrase_bonus:g}. Without phrases the word error rate "
        f"is {rate:.1f} %."
    )
    lines = [
        description,
        "",
        "| phrases per recording | said ones found | without boosting | false alarms | without boosting | word error rate % |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind, chosen in (("", outcomes[: len(NUMBERS)]), (", none said", outcomes[len(NUMBERS) :])):
        for number, outcome in zip(NUMBERS, chosen, strict=True):
            listed = f"{number}" if outcome.listed == number else f"{number} ({outcome.listed:.0f} in the file)"
            found = [f"{count} of {outcome.said}" if outcome.said else "" for count in (outcome.found, outcome.found_without)]
            cells = [f"{listed}{kind}", *found, outcome.false_alarms, outcome.false_alarms_without, f"{outcome.rate:.1f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])
