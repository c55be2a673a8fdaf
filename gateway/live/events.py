"""Events of a live session.

A transcript covers the whole stream. The part after ``settled`` is the current segment. The first ``stable_chars`` characters
never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.errors import ApiError
from gateway.transcript.transcript import Counts
from gateway.transcript.words import Alternative, Word


@dataclass(frozen=True)
class Snapshot:
    """The transcript at one moment.

    Attributes:
        text: text of the whole stream; after a resumption, the text after the token.
        tokens: token ids of ``text`` in the model's vocabulary.
        words: words of the current segment; in ``Final``, of all of ``text``. Times are seconds since the start of the stream.
        confidence: mean probability of the tokens, 0 to 1; None where there are none.
        stable_chars: number of leading characters of ``text`` that can no longer change.
        samples: audio decoded for good, in samples since the start of the stream.
        settled: length of the transcript of earlier segments.
        segment: index of the current segment, since the start of the stream.
        segment_confidence: mean probability of the current segment's tokens, 0 to 1; None where there are none.
        alternatives: the most probable texts of a segment that ended, the best first; empty if they were not requested.
    """

    text: str
    tokens: Sequence[int]
    words: Sequence[Word]
    confidence: float | None
    stable_chars: int
    samples: int
    settled: Counts
    segment: int
    segment_confidence: float | None
    alternatives: Sequence[Alternative] = ()


@dataclass(frozen=True)
class Partial:
    """The text changed."""

    transcript: Snapshot


@dataclass(frozen=True)
class SegmentFinal:
    """The current segment ended; its text, tokens and words can no longer change.

    Attributes:
        transcript: transcript that includes the segment; ``settled`` excludes it.
        changed: whether the text differs from that of the event before.
    """

    transcript: Snapshot
    changed: bool


@dataclass(frozen=True)
class Final:
    """The stream ended. This is the last event."""

    transcript: Snapshot


@dataclass(frozen=True)
class SpeechStarted:
    """Speech began at sample ``at`` of the stream."""

    at: int


@dataclass(frozen=True)
class SpeechStopped:
    """Speech ended at sample ``at`` of the stream."""

    at: int


@dataclass(frozen=True)
class Acknowledged:
    """A resumable stream can continue from this position on another connection.

    Attributes:
        token: text of the session token.
        samples: position from which audio is still needed, in samples from the start of the stream.
        settled: length of the transcript, from the start of the stream, that the resumed stream does not repeat.
        decoded: audio decoded for good, in samples from the start of the stream.
    """

    token: str
    samples: int
    settled: Counts
    decoded: int


@dataclass(frozen=True)
class Failed:
    """The session failed. This is the last event."""

    error: ApiError


Event = Partial | SegmentFinal | Final | SpeechStarted | SpeechStopped | Acknowledged | Failed
