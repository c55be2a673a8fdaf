"""Decide which event a decoder's answer becomes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gateway.live.events import Final, Partial, SegmentFinal, Snapshot
from gateway.transcript.transcript import Answer, Counts, Transcript
from gateway.transcript.words import Word


class Publisher:
    """The transcript of one session, and the events of its changes.

    Args:
        before: length of the transcript of earlier connections, which is not published again.
    """

    def __init__(self, before: Counts = Counts()) -> None:  # noqa: B008 (immutable)
        self._before = before
        self._transcript = Transcript(continues=before.chars > 0)

    @property
    def settled(self) -> Counts:
        """Length of the final segments since the start of the stream, including earlier connections."""
        return self._before.plus(self._transcript.settled)

    def publish(self, answer: Answer, *, last: bool) -> Partial | SegmentFinal | Final | None:
        """Add an answer to the transcript, and return its event; None if it changes nothing.

        Args:
            answer: the decoder's answer.
            last: whether it is the stream's last one.
        """
        settled = self._transcript.settled
        changed = self._transcript.update(answer)
        if last:
            return Final(self._snapshot(answer, settled, self._transcript.words))
        # With all words in each event, traffic would grow with the square of the stream's length.
        if answer.segment_final:
            return SegmentFinal(self._snapshot(answer, settled, answer.words), changed)
        return Partial(self._snapshot(answer, settled, answer.words)) if changed else None

    def _snapshot(self, answer: Answer, settled: Counts, words: Sequence[Word]) -> Snapshot:
        transcript = self._transcript
        return Snapshot(
            transcript.text,
            tuple(transcript.tokens),
            words,
            transcript.confidence,
            transcript.stable_chars,
            answer.samples,
            settled,
            self._before.segments + settled.segments,
            None if math.isnan(answer.confidence) else answer.confidence,
            answer.alternatives,
        )
