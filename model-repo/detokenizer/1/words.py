"""Text and timed words from subword tokens, where ``▁`` begins a word (SentencePiece, Kudo & Richardson 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

WORD_START = "▁"


class Word(NamedTuple):
    """One word.

    Attributes:
        word: its text.
        start, end: seconds from the start of the stream.
        confidence: lowest probability of its tokens, 0 … 1: a word is as sure as its least sure part.
    """

    word: str
    start: float
    end: float
    confidence: float


def read_vocabulary(path: Path) -> list[str]:
    """Pieces by token id, from lines ``piece id``.

    Raises:
        ValueError: a line is not of that form, or the ids are not 0, 1, 2, …; the message names the line.
    """
    pieces: list[str] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            piece, _, index = line.rstrip("\n").rpartition(" ")
            if index != str(len(pieces)):
                raise ValueError(f"{path} line {number} is {line.rstrip()!r}; expected 'piece {len(pieces)}'")
            pieces.append(piece)
    return pieces


def join(pieces: Sequence[str], leading_space: bool) -> str:
    """Text of pieces; with ``leading_space`` it keeps the space of a first piece that begins a word."""
    text = "".join(pieces).replace(WORD_START, " ")
    return text if leading_space else text.removeprefix(" ")


def group(pieces: Sequence[str], starts: Sequence[float], ends: Sequence[float], probabilities: Sequence[float]) -> list[Word]:
    """Words of pieces with their times in seconds and their probabilities; a word ends no later than the next one starts."""
    words: list[Word] = []
    for piece, start, end, probability in zip(pieces, starts, ends, probabilities, strict=True):
        text = piece.removeprefix(WORD_START)
        if words and not piece.startswith(WORD_START):
            last = words[-1]
            words[-1] = Word(last.word + text, last.start, end, min(last.confidence, probability))
        else:
            words.append(Word(text, start, end, probability))
    words = [word for word in words if word.word]
    clamped = [word._replace(end=min(word.end, after.start)) for word, after in pairwise(words)]
    return clamped + words[-1:]
