"""Messages of ``/v2/decode/stream/{model}``, in the dialect that the client chooses by its subprotocol."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any, get_args

from gateway.audio import RATE
from gateway.config.settings import Latency
from gateway.errors import ApiError, ErrorKind
from gateway.live.events import (
    Acknowledged,
    Event,
    Failed,
    Final,
    Partial,
    SegmentFinal,
    Snapshot,
    SpeechStarted,
    SpeechStopped,
)
from gateway.live.speech import Detection

SPEECH = "speech"
"""Value of the query's ``events`` with which a client gets the start and stop of speech."""


class Dialect(Enum):
    """Dialects of the messages; the value is the subprotocol."""

    PLAIN = ""
    """Each message has the whole transcript."""
    V2 = "amira.v2"
    """The same, and the stream can be resumed."""
    V3 = "amira.v3"
    """Each message has the current segment only, and the stream can be resumed."""

    @property
    def resumable(self) -> bool:
        """Whether the client gets session tokens."""
        return self is not Dialect.PLAIN

    @classmethod
    def chosen(cls, offered: Collection[str]) -> Dialect:
        """Return the newest of the dialects that a client offers."""
        return next((dialect for dialect in (cls.V3, cls.V2) if dialect.value in offered), cls.PLAIN)


def read_events(query: Mapping[str, str]) -> Detection | None:
    """Return the rules for the start and stop of speech, if the query asks for these events; else None.

    Raises:
        ApiError: ``UNACCEPTABLE``, the query asks for other events.
    """
    wanted = query.get("events")
    if wanted is None:
        return None
    if wanted != SPEECH:
        raise ApiError(ErrorKind.UNACCEPTABLE, f"events is {wanted[:40]!r}; it must be {SPEECH!r}", "events")
    return Detection()


def read_latency(query: Mapping[str, str]) -> dict[str, str | int]:
    """Return the decoder's options for the latency that the query of a stream names.

    Raises:
        ApiError: ``UNACCEPTABLE``, there is no such latency.
    """
    wanted = query.get("latency")
    if wanted is None:
        return {}
    if wanted not in get_args(Latency):
        message = f"latency is {wanted[:40]!r}; it must be one of {', '.join(get_args(Latency))}"
        raise ApiError(ErrorKind.UNACCEPTABLE, message, "latency")
    return {"latency": wanted}


def message_of(event: Event, dialect: Dialect) -> dict[str, Any] | None:
    """Return the message of an event; None if the client gets none."""
    if isinstance(event, SpeechStarted | SpeechStopped):
        state = "started" if isinstance(event, SpeechStarted) else "stopped"
        return {"type": "speech", "state": state, "at_ms": event.at * 1000 // RATE}
    if isinstance(event, Acknowledged):
        processed_ms = event.decoded * 1000 // RATE
        settled = event.settled._asdict()
        return {
            "type": "ack",
            "session": event.token,
            "samples": event.samples,
            "settled": settled,
            "audio_processed_ms": processed_ms,
        }
    if isinstance(event, Failed):
        return None  # the error frame follows with the close
    transcript = event.transcript
    if isinstance(event, SegmentFinal) and not (event.changed or dialect.resumable or transcript.alternatives):
        return None  # a resuming client needs the final times of the words, which the next acknowledgement settles
    alternatives = {"alternatives": transcript.alternatives} if transcript.alternatives else {}
    kind = "final" if isinstance(event, Final) else "partial"
    if dialect is Dialect.V3:
        words = transcript.words[transcript.settled.words :] if kind == "final" else transcript.words
        return {
            "type": kind,
            **_segment(transcript),
            "words": words,
            "segment_final": not isinstance(event, Partial),
        } | alternatives
    return {
        "type": kind,
        "text": transcript.text,
        "tokens": transcript.tokens,
        "confidence": _rounded(transcript.confidence),
        "words": transcript.words,
        "audio_processed_ms": transcript.samples * 1000 // RATE,
        "stable_chars": transcript.stable_chars,
    } | alternatives


def _segment(transcript: Snapshot) -> dict[str, Any]:
    """Return the current segment. The texts of all segments, concatenated, are the transcript."""
    settled = transcript.settled
    return {
        "segment": transcript.segment,
        "text": transcript.text[settled.chars :],
        "tokens": transcript.tokens[settled.tokens :],
        "confidence": _rounded(transcript.segment_confidence),
        "audio_processed_ms": transcript.samples * 1000 // RATE,
        "stable_chars": max(0, transcript.stable_chars - settled.chars),
    }


def _rounded(confidence: float | None) -> float | None:
    return None if confidence is None else round(confidence, 4)
