"""Convert the tokens of one segment to text and timed words."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vocabulary import BYTE, BYTE_PIECE, SEPARATORS

ROUNDINGS = (3, 5, 7)
"""Numbers of decimals of times in seconds; a larger one is used if a word would have no length. 7 decimals distinguish samples
of 16 kHz audio."""

CJK = re.compile(r"[\u3005-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
"""Characters of Chinese and Japanese words, which are written without spaces: kana, ideographs, and their marks."""

FLOATING_POINT_ERROR = 1e-4
"""Largest difference between a time and a multiple of its last decimal that counts as a rounding error, in these multiples."""


class Word(NamedTuple):
    """One word.

    Attributes:
        word: text without white space; not empty.
        start, end: seconds from the start of the stream, start < end.
        confidence: lowest probability of its tokens, 0 … 1.
    """

    word: str
    start: float
    end: float
    confidence: float


class _Fragment(NamedTuple):
    """Text of one token, or of its part between two separators; empty if the token has no text."""

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

    Byte pieces become characters. An incomplete character at the end is left out, since its last bytes may follow; in a final
    segment it becomes U+FFFD.

    Args:
        pieces: pieces of the segment. The first one begins a word even without a separator.
        starts: start of each piece in seconds, not descending.
        ends: end of each piece in seconds, later than its start and not later than the next start.
        probabilities: probability of each piece, 0 … 1.
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
    """Return a segment's text: its words, separated by spaces. From segment 1 on, the text begins with a space.

    No space separates two words in scripts that are written without spaces.
    """
    text = ""
    for word in words:
        text += word.word if not text or (CJK.match(text[-1]) and CJK.match(word.word)) else f" {word.word}"
    return f" {text}" if text and segment > 0 else text


def _fragments(
    pieces: Sequence[str], starts: Sequence[float], ends: Sequence[float], probabilities: Sequence[float], *, final: bool
) -> Iterator[_Fragment]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    last: tuple[float, float, float] | None = None
    for piece, *times_and_probability in zip(pieces, starts, ends, probabilities, strict=True):
        start, end, probability = times_and_probability
        if of_bytes := BYTE_PIECE.fullmatch(piece):
            text = ""
            if of_bytes[1]:  # a new word interrupts a character, which stays incomplete
                text = decoder.decode(b"", final=True) + of_bytes[1]
                decoder.reset()
            text += decoder.decode(bytes.fromhex("".join(BYTE.findall(of_bytes[2]))))
        else:
            text = decoder.decode(b"", final=True) + piece  # another piece interrupts a character, which stays incomplete
            decoder.reset()
        yield from _split(text, start, end, probability)
        last = start, end, probability
    if final and last and (text := decoder.decode(b"", final=True)):
        yield from _split(text, *last)


def _split(text: str, start: float, end: float, probability: float) -> Iterator[_Fragment]:
    """Split a token at its separators. The parts share the time of the token evenly."""
    head, *others = SEPARATORS.split(text)
    parts = [(head, False)] if head or not others else []
    parts += [(part, True) for part in others]
    step = (end - start) / len(parts)
    for i, (part, begins_word) in enumerate(parts):
        until = end if i + 1 == len(parts) else start + (i + 1) * step
        yield _Fragment(part, begins_word, start + i * step, until, probability)


def _rounded(words: list[Word]) -> list[Word]:
    """Round times down to the fewest decimals at which every word has a length. Words stay in order and within the audio."""
    for decimals in ROUNDINGS:
        scale = 10.0**decimals
        rounded = [word._replace(start=_floor(word.start, scale), end=_floor(word.end, scale)) for word in words]
        if all(word.start < word.end for word in rounded):
            return rounded
    return words


def _floor(secs: float, scale: float) -> float:
    """Round down to a multiple of 1 / scale; a time that is below a multiple by a rounding error becomes this multiple."""
    nearest = round(secs * scale)
    return (nearest if abs(secs * scale - nearest) < FLOATING_POINT_ERROR else math.floor(secs * scale)) / scale
