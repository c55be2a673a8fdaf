"""Timed words, and texts that are nearly as probable."""

from __future__ import annotations

from typing import TypedDict


class _Word(TypedDict):
    word: str
    start: float
    """Seconds since the start of the stream or recording."""
    end: float
    """Seconds since the start of the stream or recording."""
    confidence: float
    """Lowest probability of the word's tokens, 0 to 1."""


class Word(_Word, total=False):
    """A recognised word, as in the decoder's JSON.

    A dictionary rather than a class: words go from one JSON text into another, and objects between them would cost a stream
    more than its transcript.
    """

    channel: int
    """Index of the channel, where the channels of a recording are separated."""


class Alternative(TypedDict):
    """One of the most probable texts of a segment, as in the decoder's JSON."""

    text: str
    confidence: float | None
    """Mean probability of its tokens, 0 to 1; None where there are none."""
