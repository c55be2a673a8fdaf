"""Transcripts as OpenAI's API has them: bodies and events.

The decoder says how probable each word is, not each token, so a word counts as a token in ``logprobs``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from gateway.audio import RATE
from gateway.recordings.transcribe import Segment, Transcription
from gateway.transcript.words import Word

MIN_PROBABILITY = 1e-9
"""Least probability that has a logarithm in an answer; JSON has no infinity."""

SEEK_PER_SEC = 100
"""Unit of ``seek``, as in Whisper: spectrogram frames per second."""


def text_of(segments: Sequence[Segment]) -> str:
    """Return the whole transcript."""
    return "".join(segment.text for segment in segments)


def json_body(transcription: Transcription, *, logprobs: bool) -> dict[str, Any]:
    """Return the body of ``json``."""
    segments = transcription.segments
    body = {"text": text_of(segments), "usage": _duration_usage(transcription)}
    if logprobs:
        body["logprobs"] = [entry for segment in segments for entry in _logprobs(segment)]
    return body


def verbose_body(transcription: Transcription, language: str, *, words: bool, segments: bool) -> dict[str, Any]:
    """Return the body of ``verbose_json``.

    Args:
        transcription: the transcript.
        language: of the recording.
        words: whether words are listed.
        segments: whether segments are listed.
    """
    found = [segment for segment in transcription.segments if segment.words]
    body: dict[str, Any] = {
        "task": "transcribe",
        "language": language,
        "duration": transcription.samples / RATE,
        "text": text_of(transcription.segments),
        "usage": _duration_usage(transcription),
    }
    if segments:
        body["segments"] = [_verbose_segment(number, segment) for number, segment in enumerate(found)]
    if words:
        body["words"] = [_plain_word(word) for segment in found for word in segment.words]
    return body


def delta_event(number: int, segment: Segment, *, logprobs: bool, whole: bool) -> dict[str, Any]:
    """Return the event of a segment; the deltas joined are the transcript.

    Args:
        number: the segment's, from 0.
        segment: the segment.
        logprobs: whether logarithms of probabilities are listed.
        whole: whether the event has the segment as the project's own API has it.
    """
    event: dict[str, Any] = {"type": "transcript.text.delta", "delta": segment.text}
    if logprobs:
        event["logprobs"] = list(_logprobs(segment))
    if whole:
        event["segment"] = _native_segment(number, segment)
    return event


def done_event(transcription: Transcription, *, logprobs: bool, whole: bool) -> dict[str, Any]:
    """Return the last event; arguments as in ``delta_event``."""
    tokens = [token for segment in transcription.segments for token in segment.tokens]
    usage = {
        "type": "tokens",
        "input_tokens": transcription.frames,
        "output_tokens": len(tokens),
        "total_tokens": transcription.frames + len(tokens),
    }
    event = {**json_body(transcription, logprobs=logprobs), "type": "transcript.text.done", "usage": usage}
    if whole:
        event |= {
            "tokens": tokens,
            "confidence": _confidence(transcription.segments),
            "audio_length_samples": transcription.samples,
        }
    return event


def _native_segment(number: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": number,
        "start": segment.words[0]["start"],
        "end": segment.words[-1]["end"],
        "text": segment.text,
        "words": segment.words,
        "confidence": segment.confidence,
    }


def _confidence(segments: Sequence[Segment]) -> float | None:
    """Return the mean probability of all tokens; None where there are none."""
    tokens = sum(len(segment.tokens) for segment in segments)
    return sum((segment.confidence or 0.0) * len(segment.tokens) for segment in segments) / tokens if tokens else None


def _duration_usage(transcription: Transcription) -> dict[str, Any]:
    return {"type": "duration", "seconds": transcription.samples / RATE}


def _logprobs(segment: Segment) -> Iterator[dict[str, Any]]:
    """Yield an entry for each word; the entries' tokens joined are the segment's text."""
    start = 0
    for word in segment.words:
        end = segment.text.index(word["word"], start) + len(word["word"])
        token = segment.text[start:end]
        yield {"token": token, "logprob": _log(word["confidence"]), "bytes": list(token.encode())}
        start = end


def _verbose_segment(number: int, segment: Segment) -> dict[str, Any]:
    start, text = segment.words[0]["start"], segment.text.encode()
    return {
        "id": number,
        "seek": round(start * SEEK_PER_SEC),
        "start": start,
        "end": segment.words[-1]["end"],
        "text": segment.text,
        "tokens": segment.tokens,
        "temperature": 0.0,
        "avg_logprob": _log(segment.confidence or 0.0),
        "compression_ratio": round(len(text) / len(zlib.compress(text)), 4),
        "no_speech_prob": 0.0,  # a segment has words, or it is none
    }


def _plain_word(word: Word) -> dict[str, Any]:
    return {"word": word["word"], "start": word["start"], "end": word["end"]}


def _log(probability: float) -> float:
    return round(math.log(max(probability, MIN_PROBABILITY)), 6)
