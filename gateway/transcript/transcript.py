"""A stream's whole transcript, joined from the decoder's segments."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """One answer of the ensemble; docs/API.md describes the tensors.

    Attributes:
        text, tokens, words, confidence: of the current segment; text keeps its leading space where a word begins.
        stable_chars: how many leading characters of the text can no longer change.
        segment_final: the segment ends here, the next answer begins another.
        samples, features, frames: decoded for good since the start of the stream.
        state: the stream's in the decoder, where it was asked for; another sequence can go on from it.
    """

    text: str
    tokens: list[int]
    words: list[dict[str, Any]]
    confidence: float
    stable_chars: int
    segment_final: bool
    samples: int
    features: int
    frames: int
    state: str = ""


@dataclass
class Transcript:
    """Final segments and the current one.

    Args:
        continues: there is text before it, so that a leading space means something.

    Attributes:
        text: the whole transcript so far.
        tokens: its token ids.
        words: its timed words.
        stable_chars: how many leading characters of ``text`` can no longer change.
        segment_words: how many of the words are of the current segment.
    """

    continues: bool = False
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    words: list[dict[str, Any]] = field(default_factory=list)
    stable_chars: int = 0
    segment_words: int = 0
    _final_chars: int = 0
    _final_tokens: int = 0
    _final_probability: float = 0.0  # summed over the final segments' tokens
    _probability: float = 0.0  # and with the current segment's

    @property
    def confidence(self) -> float | None:
        """Mean probability of all tokens; None where there are none."""
        return self._probability / len(self.tokens) if self.tokens else None

    def update(self, answer: Answer) -> bool:
        """Take an answer; whether the text changed."""
        before, final_text = self.text, self.text[: self._final_chars]
        self.text = self._join(final_text, answer.text)
        self.stable_chars = len(self._join(final_text, answer.text[: answer.stable_chars]))
        self.tokens[self._final_tokens :] = answer.tokens
        self.words[len(self.words) - self.segment_words :] = answer.words
        self.segment_words = len(answer.words)
        segment_probability = 0.0 if math.isnan(answer.confidence) else answer.confidence * len(answer.tokens)
        self._probability = self._final_probability + segment_probability
        if answer.segment_final:
            self._final_chars = len(self.text)
            self._final_tokens = len(self.tokens)
            self._final_probability = self._probability
            self.segment_words = 0
        return self.text != before

    @property
    def settled(self) -> tuple[int, int, int]:
        """How many characters, tokens and words are of final segments."""
        return self._final_chars, self._final_tokens, len(self.words) - self.segment_words

    def _join(self, settled: str, text: str) -> str:
        return settled + text if self.continues else (settled + text).lstrip()
