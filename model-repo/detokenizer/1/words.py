"""Text and timed words of the tokens of one segment."""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vocabulary import BYTE_PIECE, SEPARATORS

ROUNDINGS = (3, 5, 7)
"""Decimals of a word's times: milliseconds, unless a word would have no length. 7 tell the samples of 16 kHz audio apart."""

FLOATING_POINT_ERROR = 1e-4
"""Largest difference of a computed time from a multiple of its last decimal that is not a difference, in such multiples."""


class Word(NamedTuple):
    """One word.

    Attributes:
        word: text without white space; not empty.
        start, end: seconds from the start of the stream, start < end.
        confidence: lowest probability of its tokens, 0 … 1: a word is as certain as its least certain token.
    """

    word: str
    start: float
    end: float
    confidence: float


class _Fragment(NamedTuple):
    """Text of one token, or of its part between two separators; empty where the token has no text of its own."""

    text: str
    begins_word: bool
    start: float
    end: float
    probability: float


def words_of(
    pieces: Sequence[str],
    starts: Sequence[float],
    ends: Sequence[float],
    probabilities: Sequence[float],
    *,
    final: bool = True,
) -> list[Word]:
    """Return the words of a segment's pieces.

    Byte pieces become characters. A character whose last bytes are missing is left out, since they may follow; if the segment
    is final, U+FFFD takes its place.

    Args:
        pieces: the segment's pieces. The first one begins a word, whether it has a separator or not.
        starts: time of each piece in seconds, not descending.
        ends: end of each piece, later than its start and not later than the next start.
        probabilities: of each piece.
        final: whether no more pieces of the segment follow.

    Returns:
        Words in order; none overlaps the next.
    """
    words: list[Word] = []
    for text, begins_word, start, end, probability in _fragments(pieces, starts, ends, probabilities, final=final):
        if words and not begins_word:
            last = words[-1]
            words[-1] = Word(last.word + text, last.start, end, min(last.confidence, probability))
        else:
            words.append(Word(text, start, end, probability))
    return _rounded([word for word in words if word.word])


def text_of(words: Sequence[Word], segment: int) -> str:
    """Return a segment's text: its words, separated by spaces; from segment 1 on a space separates it from the one before."""
    text = " ".join(word.word for word in words)
    return f" {text}" if text and segment > 0 else text


def _fragments(
    pieces: Sequence[str], starts: Sequence[float], ends: Sequence[float], probabilities: Sequence[float], *, final: bool
) -> Iterator[_Fragment]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    last: tuple[float, float, float] | None = None
    for piece, *times_and_probability in zip(pieces, starts, ends, probabilities, strict=True):
        start, end, probability = times_and_probability
        if byte := BYTE_PIECE.fullmatch(piece):
            text = decoder.decode(bytes.fromhex(byte[1]))
        else:
            text = decoder.decode(b"", final=True) + piece  # bytes that another piece interrupts stay incomplete
            decoder.reset()
        yield from _split(text, start, end, probability)
        last = start, end, probability
    if final and last and (text := decoder.decode(b"", final=True)):
        yield from _split(text, *last)


def _split(text: str, start: float, end: float, probability: float) -> Iterator[_Fragment]:
    """Split a token at its separators; its parts share its time evenly."""
    head, *others = SEPARATORS.split(text)
    parts = [(head, False)] if head or not others else []
    parts += [(part, True) for part in others]
    step = (end - start) / len(parts)
    for i, (part, begins_word) in enumerate(parts):
        until = end if i + 1 == len(parts) else start + (i + 1) * step
        yield _Fragment(part, begins_word, start + i * step, until, probability)


def _rounded(words: list[Word]) -> list[Word]:
    """Round times down, to as few decimals as leave every word its length; so they stay in order and within the audio."""
    for decimals in ROUNDINGS:
        scale = 10.0**decimals
        rounded = [word._replace(start=_floor(word.start, scale), end=_floor(word.end, scale)) for word in words]
        if all(word.start < word.end for word in rounded):
            return rounded
    return words


def _floor(secs: float, scale: float) -> float:
    """Round down to 1 / scale; a time that differs from a multiple by its floating-point error alone is that multiple."""
    nearest = round(secs * scale)
    return (nearest if abs(secs * scale - nearest) < FLOATING_POINT_ERROR else math.floor(secs * scale)) / scale
