"""A recording's transcript, joined from the decoder's answers to its pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gateway.audio import RATE
from gateway.transcript.transcript import Answer
from gateway.transcript.words import Alternative, Word

MILLISECONDS = 3
"""Decimal places of times."""


@dataclass(frozen=True)
class Segment:
    """A part of a recording's transcript.

    Attributes:
        id: index of the segment.
        start, end: start of its first word and end of its last, in seconds since the start of the recording.
        text: its words, joined by spaces.
        tokens: token ids in the model's vocabulary.
        words: its words, with times in seconds since the start of the recording.
        confidence: mean probability of the tokens, 0 to 1; None where there are none.
        channel: index of the channel; None where channels are not separated.
        alternatives: its most probable texts, the best first; empty if they were not requested.
    """

    id: int
    start: float
    end: float
    text: str
    tokens: Sequence[int]
    words: Sequence[Word]
    confidence: float | None
    channel: int | None = None
    alternatives: Sequence[Alternative] = ()


@dataclass
class Transcription:
    """Transcript of a recording so far.

    Attributes:
        segments: segments in the order of their times; a piece without words has none.
        samples, features, frames: decoded length in 16 kHz samples, feature frames and encoder frames; that of the first
            channel where channels are separated.
    """

    segments: list[Segment] = field(default_factory=list)
    samples: int = 0
    features: int = 0
    frames: int = 0

    def add(self, answer: Answer, start: int, channel: int | None = None) -> Segment | None:
        """Add the decoder's answer to the next piece; return its segment, if it has words.

        Args:
            answer: answer to the whole piece.
            start: position of the piece's first sample.
            channel: index of the channel; None where channels are not separated.
        """
        if not channel:
            self.samples += answer.samples
            self.features += answer.features
            self.frames += answer.frames
        if not answer.words:
            return None
        words = _shifted(answer.words, start / RATE) if start else answer.words
        if channel is not None:
            words = [{**word, "channel": channel} for word in words]
        segment = Segment(
            len(self.segments),
            words[0]["start"],
            words[-1]["end"],
            answer.text,
            answer.tokens,
            words,
            None if math.isnan(answer.confidence) else answer.confidence,
            channel,
            answer.alternatives,
        )
        self.segments.append(segment)
        return segment

    @property
    def text(self) -> str:
        """The words of all segments."""
        return " ".join(segment.text for segment in self.segments)

    @property
    def tokens(self) -> list[int]:
        """The tokens of all segments."""
        return [token for segment in self.segments for token in segment.tokens]

    @property
    def words(self) -> list[Word]:
        """The words of all segments."""
        return [word for segment in self.segments for word in segment.words]

    @property
    def confidence(self) -> float | None:
        """Mean probability of all tokens, 0 to 1; None where there are none."""
        rated = [segment for segment in self.segments if segment.confidence is not None]
        tokens = sum(len(segment.tokens) for segment in rated)
        return sum((segment.confidence or 0.0) * len(segment.tokens) for segment in rated) / tokens if tokens else None


def _shifted(words: Sequence[Word], secs: float) -> list[Word]:
    return [
        {
            "word": word["word"],
            "start": round(word["start"] + secs, MILLISECONDS),
            "end": round(word["end"] + secs, MILLISECONDS),
            "confidence": word["confidence"],
        }
        for word in words
    ]
