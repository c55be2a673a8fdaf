"""The configuration of a realtime transcription session, as OpenAI's clients give it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gateway.audio import RATE
from gateway.audio.raw import Encoding, RawFormat
from gateway.live.speech import Detection

SILENCE_OF_EAGERNESS_MS = {"low": 1200, "medium": 700, "auto": 700, "high": 350}
"""Silence that ends a turn of ``semantic_vad``: the eager answer soon, the others wait for more."""

LATENCY_OF_DELAY = {"minimal": "low", "low": "low", "medium": "balanced", "high": "throughput", "xhigh": "throughput"}
"""Windows of each ``delay``."""

DEFAULT_PADDING_MS = 300

CLIENT_COMMITS = ("gpt-realtime-whisper", "gpt-live-transcribe")
"""OpenAI's models without turn detection: clients leave ``turn_detection`` out, and commit each turn (livekit-agents 1.8.9). If
the server commits the turn too, the client's commit is an error, which ends its session."""

UNION_TAGS = {"audio/pcm", "audio/pcmu", "audio/pcma", "server_vad", "semantic_vad"}
"""Parts of a validation error's place that are no fields."""

Message = dict[str, Any]


class EventError(Exception):
    """A client event that is not understood or not allowed; the session goes on.

    Args:
        message: what is wrong, the value, what is allowed.
        code: for programs.
        param: path of the field at fault.
    """

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param


class _Part(BaseModel):
    """A part of a session's configuration. What it does not name has no effect, and is accepted."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Open(_Part):
    """A part whose other fields are repeated in answers."""

    model_config = ConfigDict(frozen=True, extra="allow")


class Pcm(_Part):
    """16-bit little-endian PCM, mono."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24000, 16000, 8000] = 24000


class G711(_Part):
    """G.711 at 8 kHz."""

    type: Literal["audio/pcmu", "audio/pcma"]


class ServerVad(_Part):
    """A turn ends after a silence."""

    type: Literal["server_vad"] = "server_vad"
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    prefix_padding_ms: Annotated[int, Field(ge=0, le=5000)] = DEFAULT_PADDING_MS
    silence_duration_ms: Annotated[int, Field(ge=0, le=60_000)] = 500


class SemanticVad(_Part):
    """A turn ends after a silence that depends on the eagerness."""

    type: Literal["semantic_vad"]
    eagerness: Literal["low", "medium", "high", "auto"] = "auto"


class Transcription(_Open):
    """How to transcribe; other fields have no effect."""

    model: str | None = None
    language: str | None = None
    prompt: str | None = None
    delay: Literal["minimal", "low", "medium", "high", "xhigh"] | None = None


class Input(_Part):
    """Format and treatment of the audio."""

    format: Annotated[Pcm | G711, Field(discriminator="type")] = Pcm()
    transcription: Transcription | None = None
    noise_reduction: dict[str, Any] | None = None
    turn_detection: Annotated[ServerVad | SemanticVad, Field(discriminator="type")] | None = ServerVad()


class SessionConfig(_Part):
    """The configuration of a session.

    Attributes:
        input: of its audio.
        include: what its events have in addition.
    """

    input: Input = Input()
    include: tuple[str, ...] = ()

    @property
    def raw_format(self) -> RawFormat:
        """Format of the audio."""
        chosen = self.input.format
        if isinstance(chosen, Pcm):
            return RawFormat(Encoding.LINEAR16, chosen.rate)
        return RawFormat(Encoding.MULAW if chosen.type == "audio/pcmu" else Encoding.ALAW, 8000)

    @property
    def turns(self) -> ServerVad | SemanticVad | None:
        """Turn detection: the client's choice, or else the default of its model; None if the client commits each turn."""
        chosen = "turn_detection" in self.input.model_fields_set
        return None if not chosen and (self.model or "").startswith(CLIENT_COMMITS) else self.input.turn_detection

    @property
    def detection(self) -> Detection | None:
        """When a turn starts and ends; None if the client commits each turn."""
        turns = self.turns
        if isinstance(turns, SemanticVad):
            return Detection(silence_ms=SILENCE_OF_EAGERNESS_MS[turns.eagerness])
        return Detection(turns.threshold, turns.silence_duration_ms) if turns else None

    @property
    def padding(self) -> int | None:
        """Samples before detected speech that belong to its turn; None without turn detection."""
        turns = self.turns
        if turns is None:
            return None
        padding_ms = turns.prefix_padding_ms if isinstance(turns, ServerVad) else DEFAULT_PADDING_MS
        return padding_ms * RATE // 1000

    @property
    def latency(self) -> str | None:
        """Name of the windows; None for those of the settings."""
        delay = self.input.transcription.delay if self.input.transcription else None
        return LATENCY_OF_DELAY[delay] if delay else None

    @property
    def model(self) -> str | None:
        """Name or alias of the model, if it was given."""
        return self.input.transcription.model if self.input.transcription else None

    def with_model(self, name: str) -> SessionConfig:
        """Return the configuration with a model's name or alias."""
        return self.merge({"audio": {"input": {"transcription": {"model": name}}}})

    def merge(self, session: Any) -> SessionConfig:
        """Return the configuration with what a ``session`` object has; each field of its ``audio.input`` is replaced.

        Raises:
            EventError: a value is not allowed.
        """
        given = member_of(member_of(session, "audio", "session"), "input", "session.audio")
        current = self.input.model_dump(exclude_unset=True)
        changed = {name: value for name, value in given.items() if name in Input.model_fields}
        if isinstance(changed.get("transcription"), dict):
            changed["transcription"] = {**(current.get("transcription") or {}), **changed["transcription"]}
        for name, default in (("turn_detection", "server_vad"), ("format", "audio/pcm")):
            if isinstance(part := changed.get(name), dict):
                changed[name] = {"type": default, **{key: value for key, value in part.items() if value is not None}}
        if "format" in changed and changed["format"] is None:
            del changed["format"]
        try:
            merged = Input.model_validate({**current, **changed})
        except ValidationError as error:
            first = error.errors()[0]
            path = ".".join(str(part) for part in first["loc"] if part not in UNION_TAGS)
            raise EventError(f"{path} is not valid: {first['msg']}.", param=f"session.audio.input.{path}") from None
        include = session.get("include", self.include)
        return SessionConfig(input=merged, include=tuple(map(str, include)) if isinstance(include, list | tuple) else ())

    def render(self, session_id: str) -> Message:
        """Return the configuration as the server's events have it."""
        return {
            "id": session_id,
            "object": "realtime.transcription_session",
            "type": "transcription",
            "audio": {
                "input": {
                    **self.input.model_dump(),
                    "turn_detection": self.turns and self.turns.model_dump(),
                    "transcription": self.input.transcription and self.input.transcription.model_dump(exclude_none=True),
                }
            },
            "include": list(self.include),
        }


def member_of(value: Any, name: str, path: str) -> Mapping[str, Any]:
    """Return a member that is an object, or an empty one if there is none.

    Raises:
        EventError: the value or its member is no object.
    """
    if not isinstance(value, dict):
        raise EventError(f"{path} must be an object.", param=path)
    member = value.get(name)
    if member is None:
        return {}
    if not isinstance(member, dict):
        raise EventError(f"{path}.{name} must be an object.", param=f"{path}.{name}")
    return member
