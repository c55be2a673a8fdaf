"""Transcripts in the format of OpenAI's API: bodies and events.

The decoder returns a probability per word, not per token, so ``logprobs`` has one entry per word.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

from gateway.audio import RATE
from gateway.transcript.segments import Segment, Transcription
from gateway.transcript.words import Word

MIN_PROBABILITY = 1e-9
"""Minimum probability in logarithms: JSON has no infinity."""

SEEK_PER_SEC = 100
"""Unit of ``seek``, as in Whisper: spectrogram frames per second."""


def json_body(transcription: Transcription, *, logprobs: bool) -> dict[str, Any]:
    """Return the body of ``json``."""
    body: dict[str, Any] = {"text": transcription.text, "usage": _duration_usage(transcription)}
    if logprobs:
        body["logprobs"] = [entry for segment in transcription.segments for entry in _logprobs(segment)]
    return body


def verbose_body(transcription: Transcription, language: str, *, words: bool, segments: bool) -> dict[str, Any]:
    """Return the body of ``verbose_json``.

    Args:
        transcription: the transcript.
        language: language of the recording.
        words: whether words are listed.
        segments: whether segments are listed.
    """
    body: dict[str, Any] = {
        "task": "transcribe",
        "language": language,
        "duration": transcription.samples / RATE,
        "text": transcription.text,
        "usage": _duration_usage(transcription),
    }
    if segments:
        body["segments"] = list(map(_verbose_segment, transcription.segments))
    if words:
        body["words"] = list(map(_plain_word, transcription.words))
    return body


def delta_event(segment: Segment, *, logprobs: bool) -> dict[str, Any]:
    """Return the event of a segment; the deltas, concatenated, are the transcript."""
    event: dict[str, Any] = {"type": "transcript.text.delta", "delta": _joined_text(segment)}
    return event | ({"logprobs": list(_logprobs(segment))} if logprobs else {})


def done_event(transcription: Transcription, *, logprobs: bool) -> dict[str, Any]:
    """Return the last event."""
    heard, written = transcription.frames, len(transcription.tokens)
    usage = {"type": "tokens", "input_tokens": heard, "output_tokens": written, "total_tokens": heard + written}
    return {"type": "transcript.text.done", **json_body(transcription, logprobs=logprobs), "usage": usage}


def _duration_usage(transcription: Transcription) -> dict[str, Any]:
    return {"type": "duration", "seconds": transcription.samples / RATE}


def _joined_text(segment: Segment) -> str:
    """Return a segment's text with a leading space, as OpenAI's segments have it."""
    return f" {segment.text}" if segment.id else segment.text


def _logprobs(segment: Segment) -> Iterator[dict[str, Any]]:
    """Yield an entry for each word; the entries' tokens, concatenated, are the segment's text."""
    for number, word in enumerate(segment.words):
        token = f" {word['word']}" if segment.id or number else word["word"]
        yield {"token": token, "logprob": _log(word["confidence"]), "bytes": list(token.encode())}


def _verbose_segment(segment: Segment) -> dict[str, Any]:
    text = segment.text.encode()
    return {
        "id": segment.id,
        "seek": round(segment.start * SEEK_PER_SEC),
        "start": segment.start,
        "end": segment.end,
        "text": _joined_text(segment),
        "tokens": segment.tokens,
        "temperature": 0.0,
        "avg_logprob": _log(segment.confidence or 0.0),
        "compression_ratio": round(len(text) / len(zlib.compress(text)), 4),
        "no_speech_prob": 0.0,  # segments without speech do not exist
        **({"alternatives": segment.alternatives} if segment.alternatives else {}),
    }


def _plain_word(word: Word) -> dict[str, Any]:
    return {"word": word["word"], "start": word["start"], "end": word["end"]}


def _log(probability: float) -> float:
    return round(math.log(max(probability, MIN_PROBABILITY)), 6)
