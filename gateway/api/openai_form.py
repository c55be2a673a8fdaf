"""The form of ``POST /v1/audio/transcriptions``: its fields and their checks.

Clients spell fields of several values ``include[]`` (openai-python 3.57, openai-node 6.49) or ``include``, and those of an
object ``chunking_strategy[type]`` or as JSON; both are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import orjson
from starlette.datastructures import FormData, UploadFile

from gateway.api.phrases import MAX_ALTERNATIVES, number_option, phrase_options
from gateway.errors import ApiError, ErrorKind

MAX_FIELDS = 1000
"""Maximum number of fields beside the file; clients may send hundreds of keywords."""

MAX_FIELD_BYTES = 2 * 2**20
"""Maximum size of a field, in bytes: a reference of a speaker's voice is up to 10 s of audio in base64."""

MAX_SHOWN_CHARS = 64

Choice = TypeVar("Choice", bound=Enum)


class Format(str, Enum):
    """Formats of a transcript."""

    JSON = "json"
    TEXT = "text"
    SRT = "srt"
    VTT = "vtt"
    VERBOSE_JSON = "verbose_json"


class Granularity(str, Enum):
    """Units that are timed in ``verbose_json``."""

    WORD = "word"
    SEGMENT = "segment"


@dataclass(frozen=True)
class Form:
    """The fields that have an effect.

    Attributes:
        file: the recording.
        model: name or alias of the model.
        languages: tags of the recording's possible languages; empty if the client names none.
        format: of the answer.
        granularities: what is timed.
        logprobs: whether the answer has logarithms of probabilities.
        stream: whether the answer is a stream of events.
        decoder: options of the decoder.
    """

    file: UploadFile
    model: str
    languages: Sequence[str]
    format: Format
    granularities: frozenset[Granularity]
    logprobs: bool
    stream: bool
    decoder: Mapping[str, str | int]


def read_form(data: FormData) -> Form:
    """Read the form; fields that have no effect here are ignored.

    Raises:
        ApiError: a required field is missing, or a value is not allowed.
    """
    file = data.get("file")
    if not isinstance(file, UploadFile):
        raise _missing("file", "the recording, as a file of multipart/form-data")
    if not (model := _text(data, "model")):
        raise _missing("model", "the name of a model")
    text_format = _text(data, "response_format") or Format.JSON.value
    if text_format == "diarized_json":
        raise _invalid("response_format", text_format, "this server does not label speakers", Format)
    form = Form(
        file=file,
        model=model,
        languages=[*_texts(data, "language"), *_texts(data, "languages")],
        format=_choice("response_format", text_format, Format),
        granularities=frozenset(
            _choice("timestamp_granularities", name, Granularity) for name in _texts(data, "timestamp_granularities")
        )
        or frozenset((Granularity.SEGMENT,)),
        logprobs=bool([_choice("include", name, _Include) for name in _texts(data, "include")]),
        stream=_choice("stream", (_text(data, "stream") or "false").lower(), _Flag) is _Flag.TRUE,
        decoder=phrase_options(_texts(data, "keywords"), "keywords", ErrorKind.INVALID_VALUE) | _alternatives(data),
    )
    _check_combination(form)
    _check_number("temperature", _text(data, "temperature"), 0, 1)
    _check_chunking(data)
    return form


def _strings(*choices: str) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "string", **({"enum": choices} if choices else {})}}


FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["file", "model"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "the recording; its content says what it is"},
        "model": {"type": "string", "description": "name or alias of a model"},
        "response_format": {"type": "string", "enum": [choice.value for choice in Format], "default": Format.JSON.value},
        "timestamp_granularities[]": _strings(*(choice.value for choice in Granularity)),
        "include[]": _strings("logprobs"),
        "stream": {"type": "boolean", "default": False},
        "language": {"type": "string", "description": "ISO 639-1; refused if it is not the model's"},
        "languages[]": _strings(),
        "keywords[]": {**_strings(), "description": "phrases to boost"},
        "alternatives": {"type": "integer", "minimum": 1, "maximum": MAX_ALTERNATIVES, "description": "texts per segment"},
        "prompt": {"type": "string", "description": "without effect"},
        "temperature": {"type": "number", "minimum": 0, "maximum": 1, "description": "without effect"},
        "chunking_strategy": {"type": "string", "description": "`auto`, or JSON; without effect"},
    },
}
"""The form in OpenAPI."""


class _Include(str, Enum):
    LOGPROBS = "logprobs"


class _Flag(str, Enum):
    TRUE = "true"
    FALSE = "false"


class _Chunking(str, Enum):
    AUTO = "auto"
    SERVER_VAD = "server_vad"


def _check_combination(form: Form) -> None:
    if Granularity.WORD in form.granularities and form.format is not Format.VERBOSE_JSON:
        raise ApiError(
            ErrorKind.INVALID_VALUE,
            "timestamp_granularities is word, which needs response_format=verbose_json",
            "timestamp_granularities",
        )
    if form.logprobs and form.format is not Format.JSON:
        raise ApiError(ErrorKind.INVALID_VALUE, "include is logprobs, which needs response_format=json", "include")
    if "alternatives" in form.decoder and form.format is not Format.VERBOSE_JSON:
        raise ApiError(ErrorKind.INVALID_VALUE, "alternatives needs response_format=verbose_json", "alternatives")
    if form.stream and form.format not in (Format.JSON, Format.TEXT):
        raise ApiError(
            ErrorKind.INVALID_VALUE,
            f"response_format is {form.format.value}, which has no events; with stream=true use json",
            "response_format",
        )


def _check_chunking(data: FormData) -> None:
    """Check a chunking strategy. It has no effect: recordings are cut where they are quietest."""
    name = "chunking_strategy"
    strategy: dict[str, Any] = {}
    given = _text(data, name)
    if given.startswith("{"):
        try:
            strategy = orjson.loads(given)
        except orjson.JSONDecodeError:
            raise _invalid(name, given, "it is not valid JSON", _Chunking) from None
    elif given:
        strategy = {"type": given}
    parts = ("type", "threshold", "prefix_padding_ms", "silence_duration_ms")
    strategy |= {part: value for part in parts if (value := _text(data, f"{name}[{part}]"))}
    if not strategy:
        return
    _choice(name, str(strategy.get("type", _Chunking.SERVER_VAD.value)), _Chunking)
    for part, most in zip(parts[1:], (1, math.inf, math.inf), strict=True):
        _check_number(f"{name}[{part}]", str(strategy.get(part, "")), 0, most)


def _check_number(name: str, text: str, least: float, most: float) -> None:
    try:
        allowed = not text or least <= float(text) <= most
    except ValueError:
        allowed = False
    if not allowed:
        bounds = f"from {least} to {most}" if math.isfinite(most) else f"of {least} or more"
        raise ApiError(ErrorKind.INVALID_VALUE, f"{name} is {_shown(text)}; it must be a number {bounds}", name)


def _alternatives(data: FormData) -> dict[str, str | int]:
    number = _text(data, "alternatives")
    return number_option("alternatives", number, MAX_ALTERNATIVES, ErrorKind.INVALID_VALUE) if number else {}


def _text(data: FormData, name: str) -> str:
    """Return a field's value; empty if the client does not send the field."""
    values = _texts(data, name)
    return values[-1] if values else ""


def _texts(data: FormData, name: str) -> list[str]:
    """Return the values of a field in either spelling, without empty ones."""
    values = (*data.getlist(name), *data.getlist(f"{name}[]"))
    return [value.strip() for value in values if isinstance(value, str) and value.strip()]


def _choice(name: str, value: str, choices: Callable[[str], Choice]) -> Choice:
    try:
        return choices(value)
    except ValueError:
        raise _invalid(name, value, "it is not known", choices) from None


def _invalid(name: str, value: str, reason: str, choices: Any) -> ApiError:
    allowed = ", ".join(choice.value for choice in choices)
    return ApiError(ErrorKind.INVALID_VALUE, f"{name} is {_shown(value)}: {reason}; allowed: {allowed}", name)


def _missing(name: str, meaning: str) -> ApiError:
    return ApiError(ErrorKind.INVALID_BODY, f"the form has no {name}: {meaning}", name)


def _shown(value: str) -> str:
    return repr(value[:MAX_SHOWN_CHARS])
