"""Timed words."""

from __future__ import annotations

from typing import TypedDict


class Word(TypedDict):
    """A recognised word, as the decoder's JSON has it.

    A dictionary rather than a class: words go from one JSON text into another, and objects between them would cost a stream
    more than its transcript.
    """

    word: str
    start: float
    """Seconds since the start of the stream or recording."""
    end: float
    """Seconds since the start of the stream or recording."""
    confidence: float
    """Mean probability of the word's tokens, 0 to 1."""
