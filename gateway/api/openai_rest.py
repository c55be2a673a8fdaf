"""``/v1``: a face of the engine of recordings, for clients of OpenAI's API."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from gateway.api.error_schema import openapi_responses
from gateway.api.openai_answers import delta_event, done_event, json_body, verbose_body
from gateway.api.openai_errors import body_of
from gateway.api.openai_form import FORM_SCHEMA, MAX_FIELD_BYTES, MAX_FIELDS, Form, Format, Granularity, read_form
from gateway.api.streaming import Part, Wire, read_segments, read_to_end, stream
from gateway.api.uploads import open_form_file, receive_form
from gateway.audio.media_types import OCTETS
from gateway.audio.raw import RawFormat
from gateway.errors import ApiError, ErrorKind
from gateway.languages import base_of
from gateway.limits.auth import check_key
from gateway.recordings.transcribe import Recording
from gateway.service import Service
from gateway.transcript.segments import Segment, Transcription
from gateway.transcript.writers import to_srt, to_text, to_vtt

PREFIX = "/v1/"
"""Prefix of OpenAI's API; errors below it have OpenAI's types."""

EVENTS = Wire("text/event-stream", lambda event: b"data: " + orjson.dumps(event) + b"\n\n", body_of)
"""Server-sent events (HTML standard, 9.2)."""

WRITERS: Mapping[Format, Callable[[Sequence[Segment]], str]] = {Format.TEXT: to_text, Format.SRT: to_srt, Format.VTT: to_vtt}

router = APIRouter()


@router.get("/v1/models", summary="List the models", responses=openapi_responses())
async def list_models(request: Request) -> dict[str, Any]:
    """Return all names of all models."""
    service: Service = request.app.state.service
    check_key(request.headers, service.settings)
    settings = service.settings
    return {"object": "list", "data": [_describe(name, service) for name in (*settings.models, *settings.model_aliases)]}


@router.get("/v1/models/{name:path}", summary="Describe a model", responses=openapi_responses())
async def describe_model(request: Request, name: str) -> dict[str, Any]:
    """Return one model, by its name or an alias."""
    service: Service = request.app.state.service
    check_key(request.headers, service.settings)
    service.resolve_model(name)
    return _describe(name, service)


@router.post(
    "/v1/audio/transcriptions",
    summary="Transcribe a recording, as OpenAI's API does",
    description="The answer has the form that `response_format` names, or is a stream of server-sent events.",
    responses=openapi_responses(),
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM_SCHEMA}}}},
)
async def create_transcription(request: Request) -> Response:
    """Return the transcript of one recording."""
    service: Service = request.app.state.service
    caller = check_key(request.headers, service.settings)
    async with AsyncExitStack() as held:
        held.enter_context(service.quotas.batch(caller, request.client.host if request.client else None))
        with service.places.batch():
            pass  # refused before its body is read, if it can be
        data = await receive_form(request, MAX_FIELDS, MAX_FIELD_BYTES)
        held.push_async_callback(data.close)
        form = read_form(data)
        request.state.model = model = service.resolve_model(form.model)
        options = service.language_options(model, form.languages, ErrorKind.INVALID_VALUE)
        service.check_alternatives(model, form.decoder, live=False, refusal=ErrorKind.INVALID_VALUE)
        upload = await open_form_file(form.file)
        recording = held.enter_context(service.transcriber.admit(model, caller, {**options, **form.decoder}))
        # The content alone says what the file is; clients name types by the file's name.
        segments = read_segments(service.files, recording, upload.body, OCTETS, RawFormat())
        if form.stream:
            return await stream(request, _events(segments, recording, form), EVENTS, held)
        await read_to_end(request, segments)
    language = options.get("language") or service.settings.model_languages.get(model) or next(iter(form.languages), "")
    return _answer(recording.transcription, form, base_of(str(language)))


@router.post("/v1/audio/translations", summary="Refused: no model translates", responses=openapi_responses())
async def create_translation(request: Request) -> Response:
    """Refuse to translate."""
    service: Service = request.app.state.service
    check_key(request.headers, service.settings)
    raise ApiError(
        ErrorKind.UNSUPPORTED_TASK,
        "this server transcribes speech and does not translate it; transcribe it with /v1/audio/transcriptions",
    )


def _describe(name: str, service: Service) -> dict[str, Any]:
    created, owner = int(service.started_at), service.settings.service_name
    return {"id": name, "object": "model", "created": created, "owned_by": owner}


async def _events(segments: AsyncGenerator[Segment, None], recording: Recording, form: Form) -> AsyncGenerator[Part, None]:
    """Yield the event of each segment, and the last one.

    Raises:
        ApiError: the recording cannot be decoded.
    """
    async with aclosing(segments):
        async for segment in segments:
            yield delta_event(segment, logprobs=form.logprobs)
    yield done_event(recording.transcription, logprobs=form.logprobs)


def _answer(transcription: Transcription, form: Form, language: str) -> Response:
    """Return the answer in the form's format."""
    if form.format is Format.JSON:
        return _json(json_body(transcription, logprobs=form.logprobs))
    if form.format is Format.VERBOSE_JSON:
        words, segments = (granularity in form.granularities for granularity in (Granularity.WORD, Granularity.SEGMENT))
        return _json(verbose_body(transcription, language, words=words, segments=segments))
    return Response(WRITERS[form.format](transcription.segments), media_type="text/plain")


def _json(body: Mapping[str, Any]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
