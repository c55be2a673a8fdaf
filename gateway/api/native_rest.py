"""``POST /v2/decode/batch/{model}``: a face of the engine of recordings."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from gateway.api.error_schema import openapi_responses
from gateway.api.phrases import MAX_ALTERNATIVES, MAX_BEAM, MAX_PHRASES, LanguageModel, decoding_options
from gateway.api.streaming import Part, Wire, read_segments, read_to_end, stream
from gateway.api.uploads import UPLOAD_SCHEMA, Upload, receive_upload
from gateway.audio.raw import RawFormat, parse_raw_format
from gateway.errors import ApiError, ErrorKind
from gateway.limits.auth import check_key
from gateway.recordings.transcribe import Recording
from gateway.service import Service
from gateway.transcript.segments import Segment, Transcription
from gateway.transcript.writers import to_srt, to_text, to_vtt

router = APIRouter()

SEPARATE = "separate"
"""Value of the query's ``channels`` with which each channel gets a transcript of its own."""


class Word(BaseModel):
    """A recognised word, timed from the start of the recording."""

    word: str
    start: float = Field(description="seconds")
    end: float = Field(description="seconds")
    confidence: float = Field(ge=0, le=1)
    channel: int | None = Field(default=None, description="with `channels=separate`")


class TextAlternative(BaseModel):
    """A text of a segment that is nearly as probable as the best one."""

    text: str
    confidence: float | None = Field(description="mean probability of its tokens; null if there are none")


class SegmentAnswer(BaseModel):
    """A part of a transcript."""

    id: int
    start: float = Field(description="start of its first word, in seconds")
    end: float = Field(description="end of its last word, in seconds")
    text: str
    words: list[Word]
    confidence: float | None
    channel: int | None = Field(default=None, description="with `channels=separate`")
    alternatives: list[TextAlternative] | None = Field(default=None, description="with `alternatives`; the best first")


class BatchAnswer(BaseModel):
    """A transcript."""

    text: str
    tokens: list[int] = Field(description="ids in the model's vocabulary")
    audio_length_samples: int = Field(description="length at 16 kHz")
    features_length: int = Field(description="number of feature frames")
    encoded_length: int = Field(description="number of encoder frames")
    confidence: float | None = Field(description="mean probability of the tokens; null if there are none")
    words: list[Word]
    segments: list[SegmentAnswer] = Field(description="parts of a long recording; a short recording has one")
    opaque: Any = Field(default=None, description="value of the same name in the JSON request")


class Format(Enum):
    """Formats of answers; each value is the name in the query."""

    JSON = "json"
    TEXT = "text"
    SRT = "srt"
    VTT = "vtt"
    NDJSON = "ndjson"


WRITERS: Mapping[Format, tuple[Callable[[Sequence[Segment]], str], str]] = {
    Format.TEXT: (to_text, "text/plain"),
    Format.SRT: (to_srt, "application/x-subrip"),
    Format.VTT: (to_vtt, "text/vtt"),
}
"""Writer and media type of each format."""


LINES = Wire(
    "application/x-ndjson",
    partial(orjson.dumps, option=orjson.OPT_APPEND_NEWLINE),
    lambda error, request_id: error.body(request_id),
)
"""Answers as lines of JSON."""


@dataclass(frozen=True)
class Options:
    """The query of a request.

    Attributes:
        format: format of the answer.
        raw: format of the audio, if it is raw audio.
        separate: whether each channel gets a transcript of its own.
        languages: tags of the speech's possible languages; empty if the client names none.
        decoder: options of the decoder.
    """

    format: Format
    raw: RawFormat
    separate: bool
    languages: Sequence[str]
    decoder: Mapping[str, str | int]


def _query(name: str, description: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


PARAMETERS = [
    _query("format", "format of the answer", type="string", enum=[one.value for one in Format], default="json"),
    _query("language", "of the speech, such as `de` or `de-DE`; refused if it is not one of the model's", type="string"),
    _query("encoding", "of raw audio", type="string", enum=["linear16", "mulaw", "alaw", "float32"], default="linear16"),
    _query("sample_rate", "of raw audio, in Hz", type="integer", minimum=8000, maximum=48000, default=16000),
    _query(
        "channels",
        "`separate`: a transcript for each channel; a number: channels of raw audio; both in two parameters",
        type="array",
        items={"anyOf": [{"type": "integer", "minimum": 1, "maximum": 8}, {"const": SEPARATE}]},
        maxItems=2,
    ),
    _query("beam", "width of the beam; 1: greedy", type="integer", minimum=1, maximum=MAX_BEAM),
    _query("alternatives", "number of texts per segment", type="integer", minimum=1, maximum=MAX_ALTERNATIVES, default=1),
    _query("phrases", "phrase to boost; one per parameter", type="array", items={"type": "string"}, maxItems=MAX_PHRASES),
    _query(
        "language_model", "use of the language model", type="string", enum=[one.value for one in LanguageModel], default="auto"
    ),
]


@router.post(
    "/v2/decode/batch/{model}",
    response_model=BatchAnswer,
    responses=openapi_responses(),
    openapi_extra={"requestBody": UPLOAD_SCHEMA, "parameters": PARAMETERS},
    summary="Transcribe a recording",
    description="The body is raw PCM (16-bit little-endian, 16 kHz, mono) or a WAV, FLAC, Ogg, MP3, AIFF, AU, CAF or W64 file; "
    "as the body itself, as the `file` of a form, or as an array of bytes in the `audio_buffer` of JSON.",
)
async def decode_batch(request: Request, model: str) -> Response:
    """Return the transcript of one recording."""
    service: Service = request.app.state.service
    caller = check_key(request.headers, service.settings)
    service.check_model(model)
    options = parse_options(request)
    language = service.language_options(model, options.languages)
    service.check_alternatives(model, options.decoder, live=False)
    async with AsyncExitStack() as held:
        held.enter_context(service.quotas.batch(caller, request.client.host if request.client else None))
        with service.transcriber.admit(model, caller):
            pass  # refused before its body is read, if it can be
        upload = await held.enter_async_context(receive_upload(request))
        # A body that does not come holds no place.
        recording = held.enter_context(service.transcriber.admit(model, caller, {**language, **options.decoder}))
        segments = read_segments(
            service.files, recording, upload.body, upload.content_type, options.raw, separate=options.separate
        )
        if options.format is Format.NDJSON:
            return await stream(request, _lines(segments, recording, upload), LINES, held)
        await read_to_end(request, segments)
    if options.format is Format.JSON:
        answer = {**_answer(recording.transcription), **upload.opaque}
        return Response(orjson.dumps(answer), media_type="application/json")
    write, content_type = WRITERS[options.format]
    return Response(write(recording.transcription.segments), media_type=content_type)


def parse_options(request: Request) -> Options:
    """Read the query of a request.

    Raises:
        ApiError: a value is not allowed.
    """
    query = request.query_params
    given = query.get("format", Format.JSON.value)
    try:
        chosen = Format(given)
    except ValueError:
        known = ", ".join(one.value for one in Format)
        raise ApiError(ErrorKind.UNACCEPTABLE, f"format is {given[:40]!r}; it must be one of {known}", "format") from None
    channels = query.getlist("channels")
    counts = [value for value in channels if value != SEPARATE]
    if len(counts) > 1 or len(channels) > 2:  # noqa: PLR2004 (one of each)
        message = "channels is given more than once; send a number, 'separate', or one of each"
        raise ApiError(ErrorKind.UNACCEPTABLE, message, "channels")
    raw = {name: query[name] for name in ("encoding", "sample_rate") if name in query}
    raw_format = parse_raw_format({**raw, **({"channels": counts[0]} if counts else {})})
    return Options(chosen, raw_format, SEPARATE in channels, query.getlist("language"), decoding_options(query))


async def _lines(segments: AsyncGenerator[Segment, None], recording: Recording, upload: Upload) -> AsyncGenerator[Part, None]:
    """Yield a line for each segment as it is decoded, and one for the whole recording.

    Raises:
        ApiError: the recording cannot be decoded.
    """
    async with aclosing(segments):
        async for segment in segments:
            yield {"type": "segment", **_segment_answer(segment)}
    whole = _answer(recording.transcription)
    summary = {name: value for name, value in whole.items() if name not in ("words", "segments")}
    yield {"type": "transcript", **summary, **upload.opaque}


def _answer(transcription: Transcription) -> dict[str, Any]:
    return {
        "text": transcription.text,
        "tokens": transcription.tokens,
        "audio_length_samples": transcription.samples,
        "features_length": transcription.features,
        "encoded_length": transcription.frames,
        "confidence": _rounded(transcription.confidence),
        "words": transcription.words,
        "segments": list(map(_segment_answer, transcription.segments)),
    }


def _segment_answer(segment: Segment) -> dict[str, Any]:
    return {
        "id": segment.id,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "words": segment.words,
        "confidence": _rounded(segment.confidence),
        **({} if segment.channel is None else {"channel": segment.channel}),
        **({"alternatives": segment.alternatives} if segment.alternatives else {}),
    }


def _rounded(confidence: float | None) -> float | None:
    return None if confidence is None else round(confidence, 4)
