"""Write the results of a Riva response."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gateway.api.riva_schema import RecognizeResponse, StreamingRecognizeResponse
from gateway.audio import RATE
from gateway.live.events import Event, Final, Partial, SegmentFinal, Snapshot
from gateway.transcript.segments import Transcription
from gateway.transcript.words import Alternative, Word

MONO = 1
"""Channel tag of the only channel; Riva counts from 1."""


def recording_response(transcription: Transcription, *, words: bool) -> Any:
    """Return the response to a recording: a result for each segment, or one empty result where there is no speech."""
    response = RecognizeResponse()
    processed_secs = transcription.samples / RATE
    for segment in transcription.segments:
        channel = MONO if segment.channel is None else segment.channel + 1
        result = response.results.add(channel_tag=channel, audio_processed=processed_secs)
        _add_alternative(result, segment.text, segment.confidence, segment.words if words else ())
        _add_others(result, segment.alternatives)
    if not response.results:
        _add_alternative(response.results.add(channel_tag=MONO, audio_processed=processed_secs), "", None, ())
    return response


class LiveResults:
    """Makes the responses of a stream, each with one result.

    A result has the current segment only. Words come with the final result of a segment, as Riva sends them.

    Args:
        words: whether results list words with times.
        interim: whether there are results before the end of a segment.
    """

    def __init__(self, *, words: bool, interim: bool) -> None:
        self._words = words
        self._interim = interim
        self._shown = False  # something of the current segment was sent

    def response(self, event: Event) -> Any | None:
        """Return the response of an event; None if there is nothing to send."""
        if isinstance(event, Partial):
            return self._result(event.transcript, ()) if self._interim else None
        if isinstance(event, SegmentFinal):
            return self._final(event.transcript, event.transcript.words)
        if isinstance(event, Final):
            return self._final(event.transcript, event.transcript.words[event.transcript.settled.words :])
        return None

    def _final(self, transcript: Snapshot, words: Iterable[Word]) -> Any | None:
        response = self._result(transcript, words if self._words else (), is_final=True)
        self._shown = False
        return response

    def _result(self, transcript: Snapshot, words: Iterable[Word], *, is_final: bool = False) -> Any | None:
        start = transcript.settled.chars
        text = transcript.text[start:]
        if not text.strip() and not self._shown:
            return None
        self._shown = True
        response = StreamingRecognizeResponse()
        stability = 1.0 if is_final else max(0, transcript.stable_chars - start) / max(1, len(text))
        result = response.results.add(
            is_final=is_final, stability=stability, channel_tag=MONO, audio_processed=transcript.samples / RATE
        )
        _add_alternative(result, text, transcript.segment_confidence, words)
        _add_others(result, transcript.alternatives)
        return response


def _add_others(result: Any, alternatives: Sequence[Alternative]) -> None:
    """Add the texts behind the best one, without words."""
    for alternative in alternatives[1:]:
        _add_alternative(result, alternative["text"], alternative["confidence"], ())


def _add_alternative(result: Any, text: str, confidence: float | None, words: Iterable[Word]) -> None:
    """Add a transcript, with a blank at its end: clients join transcripts without one."""
    alternative = result.alternatives.add(transcript=f"{text.strip()} " if text.strip() else "", confidence=confidence or 0.0)
    for word in words:
        alternative.words.add(
            word=word["word"],
            start_time=round(word["start"] * 1000),
            end_time=round(word["end"] * 1000),
            confidence=word["confidence"],
        )
