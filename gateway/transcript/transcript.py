"""A stream's transcript, joined from the decoder's segments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway.transcript.words import Alternative, Word


class Answer(NamedTuple):
    """One answer of the ensemble; docs/API.md describes the tensors.

    Attributes:
        text: text of the current segment; it keeps its leading space where a word begins.
        tokens: token ids of the current segment.
        words: words of the current segment.
        confidence: mean probability of the current segment's tokens, NaN where there are none.
        stable_chars: number of leading characters of the text that can no longer change.
        segment_final: whether the segment ends here; the next answer begins another.
        samples, features, frames: audio samples, feature frames and encoder frames decoded for good, since the stream's start.
        state: state of the decoder, from which another sequence can continue; empty if it was not requested.
        alternatives: the most probable texts of a final segment, the best first; empty if they were not requested.
    """

    text: str
    tokens: list[int]
    words: list[Word]
    confidence: float
    stable_chars: int
    segment_final: bool
    samples: int
    features: int
    frames: int
    state: str = ""
    alternatives: Sequence[Alternative] = ()


class Counts(NamedTuple):
    """Length of a part of a transcript; ``segments`` counts the final ones."""

    chars: int = 0
    tokens: int = 0
    words: int = 0
    segments: int = 0

    def plus(self, other: Counts) -> Counts:
        """Return the sum of both."""
        return Counts(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass
class Transcript:
    """Final segments and the current one.

    Args:
        continues: whether there is text before this transcript, which a leading space then separates.

    Attributes:
        text: the whole transcript so far.
        tokens: its token ids.
        words: its timed words.
        stable_chars: number of leading characters of ``text`` that can no longer change.
        settled: length of the final segments.
    """

    continues: bool = False
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    stable_chars: int = 0
    settled: Counts = field(default_factory=Counts)
    _settled_probability: float = 0.0  # summed over the tokens of final segments
    _probability: float = 0.0  # and over those of the current segment

    @property
    def confidence(self) -> float | None:
        """Mean probability of all tokens; None where there are none."""
        return self._probability / len(self.tokens) if self.tokens else None

    def update(self, answer: Answer) -> bool:
        """Replace the current segment by the answer's; return whether the text changed."""
        before, settled_text = self.text, self.text[: self.settled.chars]
        self.text = self._join(settled_text, answer.text)
        self.stable_chars = len(self._join(settled_text, answer.text[: answer.stable_chars]))
        self.tokens[self.settled.tokens :] = answer.tokens
        self.words[self.settled.words :] = answer.words
        segment_probability = 0.0 if math.isnan(answer.confidence) else answer.confidence * len(answer.tokens)
        self._probability = self._settled_probability + segment_probability
        if answer.segment_final:
            self.settled = Counts(len(self.text), len(self.tokens), len(self.words), self.settled.segments + 1)
            self._settled_probability = self._probability
        return self.text != before

    def _join(self, settled: str, text: str) -> str:
        return settled + text if self.continues else (settled + text).lstrip()
