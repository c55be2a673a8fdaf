"""Events of OpenAI's realtime transcription protocol: read the client's, write the server's."""

from __future__ import annotations

import binascii
import math
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.api import realtime_items as items
from gateway.api.openai_errors import type_of
from gateway.api.realtime_config import EventError, Message, SessionConfig, member_of
from gateway.audio import RATE
from gateway.errors import ApiError
from gateway.transcript.words import Word

INVALID = "invalid_request_error"
LOGPROBS = "item.input_audio_transcription.logprobs"
TRANSCRIPTION = "conversation.item.input_audio_transcription"

SECRET_SECS = (10, 7200)
"""Range of a client secret's lifetime, in seconds."""

DEFAULT_SECRET_SECS = 600
MAX_SECRET_SESSION_BYTES = 2048
"""Largest session of a client secret, which carries it through HTTP headers."""


@dataclass(frozen=True)
class Update:
    """``session.update``."""

    session: Any


@dataclass(frozen=True)
class Append:
    """``input_audio_buffer.append``."""

    audio: bytes


@dataclass(frozen=True)
class Commit:
    """``input_audio_buffer.commit``."""

    event_id: str | None


@dataclass(frozen=True)
class Clear:
    """``input_audio_buffer.clear``."""


ClientEvent = Update | Append | Commit | Clear
KNOWN = "session.update, input_audio_buffer.append, input_audio_buffer.commit, input_audio_buffer.clear"


def read_event(text: str | bytes) -> ClientEvent:
    """Return a client event.

    Raises:
        EventError: a transcription session has no such event.
    """
    try:
        event = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise EventError("The event is not JSON.", "invalid_json") from None
    if not isinstance(event, dict):
        raise EventError("The event must be a JSON object.", "invalid_json")
    kind = event.get("type")
    if kind == "input_audio_buffer.append":
        return Append(_read_audio(event.get("audio")))
    if kind == "input_audio_buffer.commit":
        return Commit(_id_of(event))
    if kind == "input_audio_buffer.clear":
        return Clear()
    if kind == "session.update":
        return Update(event.get("session"))
    raise EventError(f"The event type {str(kind)[:80]!r} is not known; known: {KNOWN}.", "unknown_event", "type")


def event_id_of(text: str | bytes) -> str | None:
    """Return the id that a client gave its event, if any."""
    try:
        event = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return _id_of(event) if isinstance(event, dict) else None


def _id_of(event: Mapping[str, Any]) -> str | None:
    event_id = event.get("event_id")
    return event_id if isinstance(event_id, str) else None


def _read_audio(value: Any) -> bytes:
    if not isinstance(value, str):
        raise EventError("audio must be a base64 string.", param="audio")
    try:
        return b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise EventError("audio is not valid base64.", param="audio") from None


def error_message(
    message: str, *, type_: str = INVALID, code: str | None = None, param: str | None = None, event_id: str | None = None
) -> Message:
    """Return an ``error`` event."""
    return {"type": "error", "error": {"type": type_, "code": code, "message": message, "param": param, "event_id": event_id}}


def messages_of(event: items.Event, *, logprobs: bool) -> Iterator[Message]:
    """Yield the server's messages of an event.

    Args:
        event: of the items.
        logprobs: whether the client asked for them.
    """
    match event:
        case items.SpeechStarted(item_id, at):
            yield {"type": "input_audio_buffer.speech_started", "item_id": item_id, "audio_start_ms": _ms(at)}
        case items.SpeechStopped(item_id, at):
            yield {"type": "input_audio_buffer.speech_stopped", "item_id": item_id, "audio_end_ms": _ms(at)}
        case items.Committed(item_id, previous):
            yield {"type": "input_audio_buffer.committed", "item_id": item_id, "previous_item_id": previous}
            for state in ("added", "done"):
                yield {"type": f"conversation.item.{state}", "previous_item_id": previous, "item": _item(item_id)}
        case items.Delta(item_id, text):
            yield {"type": f"{TRANSCRIPTION}.delta", "item_id": item_id, "content_index": 0, "delta": text}
        case items.Completed(item_id, text, words, samples):
            yield {
                "type": f"{TRANSCRIPTION}.completed",
                "item_id": item_id,
                "content_index": 0,
                "transcript": text,
                "usage": {"type": "duration", "seconds": round(samples / RATE, 3)},
                **({"logprobs": [_logprob(i, word) for i, word in enumerate(words)]} if logprobs else {}),
            }
        case items.Failed(item_id, error):
            yield {
                "type": f"{TRANSCRIPTION}.failed",
                "item_id": item_id,
                "content_index": 0,
                "error": error_of(error),
            }
        case items.Cleared():
            yield {"type": "input_audio_buffer.cleared"}
        case items.CommitEmpty(samples, event_id):
            least = _ms(items.MIN_COMMIT_SAMPLES)
            message = f"The input audio buffer has {_ms(samples)} ms of audio; a commit needs {least} ms or more."
            yield error_message(message, code="input_audio_buffer_commit_empty", event_id=event_id)


def error_of(error: ApiError) -> Message:
    """Return an error of ours as OpenAI's events have it."""
    return {"type": type_of(error.kind), "code": error.kind.code, "message": error.message, "param": error.param}


def _item(item_id: str) -> Message:
    content = [{"type": "input_audio", "transcript": None}]
    return {
        "id": item_id,
        "object": "realtime.item",
        "type": "message",
        "status": "completed",
        "role": "user",
        "content": content,
    }


def _logprob(index: int, word: Word) -> Message:
    """Return the log probability of a word, from the mean probability that the decoder returns."""
    text = word["word"] if index == 0 else f" {word['word']}"
    return {"token": text, "logprob": round(math.log(max(word["confidence"], 1e-9)), 4), "bytes": list(text.encode())}


def _ms(samples: int) -> int:
    return samples * 1000 // RATE


@dataclass(frozen=True)
class SecretRequest:
    """What a client secret is wanted for.

    Attributes:
        session: how its sessions begin, as the request has it.
        config: the same, with the defaults.
        lifetime_secs: how long it can be used.
    """

    session: Mapping[str, Any]
    config: SessionConfig
    lifetime_secs: int


def read_secret_request(body: bytes) -> SecretRequest:
    """Return the content of a request for a client secret; an empty body has the defaults.

    Raises:
        EventError: the body is no such request.
    """
    try:
        request = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError:
        raise EventError("The body is not JSON.") from None
    session = member_of(request, "session", "the body")
    if len(orjson.dumps(session)) > MAX_SECRET_SESSION_BYTES:
        raise EventError(f"session has more than {MAX_SECRET_SESSION_BYTES} bytes of JSON.", param="session")
    lifetime_secs = member_of(request, "expires_after", "the body").get("seconds", DEFAULT_SECRET_SECS)
    least, most = SECRET_SECS
    if not isinstance(lifetime_secs, int) or not least <= lifetime_secs <= most:
        shown = str(lifetime_secs)[:40]
        message = f"expires_after.seconds is {shown}; it must be a whole number from {least} to {most}."
        raise EventError(message, param="expires_after.seconds")
    return SecretRequest(session, SessionConfig().merge(session), lifetime_secs)
