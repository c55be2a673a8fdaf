"""``/v1``: the face of the recordings' engine for clients of OpenAI's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import orjson
import structlog
from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from gateway import metrics, tracing
from gateway.api.error_schema import openapi_responses
from gateway.api.openai_answers import delta_event, done_event, json_body, text_of, verbose_body
from gateway.api.openai_errors import body_of
from gateway.api.openai_form import FORM_SCHEMA, MAX_FIELD_BYTES, MAX_FIELDS, Form, Format, Granularity, read_form
from gateway.api.sse import EventStream
from gateway.audio.media_types import OCTETS
from gateway.errors import ApiError, ErrorKind
from gateway.limits.auth import check_key
from gateway.limits.places import CallerGoneError
from gateway.logs import current_request_id
from gateway.recordings.transcribe import Recording, Transcription
from gateway.service import Service
from gateway.triton.connection import Samples

PREFIX = "/v1/"
"""Where OpenAI's API is; errors below it have OpenAI's types."""

Event = Mapping[str, Any]

log = structlog.get_logger()
router = APIRouter()


@router.get("/v1/models", summary="List the models", responses=openapi_responses())
async def list_models(request: Request) -> dict[str, Any]:
    """Answer with all names of all models."""
    service: Service = request.app.state.service
    check_key(request.headers, service.settings)
    settings = service.settings
    return {"object": "list", "data": [_describe(name, service) for name in (*settings.models, *settings.model_aliases)]}


@router.get("/v1/models/{name:path}", summary="Describe a model", responses=openapi_responses())
async def describe_model(request: Request, name: str) -> dict[str, Any]:
    """Answer with one model, by its name or an alias."""
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
    """Answer one recording."""
    service: Service = request.app.state.service
    caller = check_key(request.headers, service.settings)
    async with AsyncExitStack() as held:
        held.enter_context(service.quotas.batch(caller, request.client.host if request.client else None))
        with service.places.batch():
            pass  # refused before its body is read, if it can be
        limits = {"max_files": 1, "max_fields": MAX_FIELDS, "max_part_size": MAX_FIELD_BYTES}
        form = read_form(await held.enter_async_context(request.form(**limits)))
        request.state.model = model = service.resolve_model(form.model)
        language = _language(form, service.settings.model_languages.get(model))
        recording = held.enter_context(service.transcriber.admit(model, caller))
        samples = await _decode(request, service, form, recording)
        try:
            if form.stream:
                events = _transcribe(recording, samples, request, form)
                return EventStream(with_error_event(await anext(events), events), held.pop_all())
            transcription = await recording.transcribe(samples, caller_gone=request.receive)
        except CallerGoneError:
            raise ClientDisconnect from None
    return _answer(transcription, form, language)


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


def _language(form: Form, spoken: str | None) -> str:
    """Return the language of a recording: the model's, or else the one that the client names.

    Raises:
        ApiError: the client names languages, and the model's is none of them.
    """
    if spoken is None:
        return form.languages[0] if form.languages else ""
    if form.languages and spoken not in form.languages:
        raise ApiError(
            ErrorKind.INVALID_VALUE,
            f"language is {form.languages[0][:8]!r}, and model {form.model!r} knows {spoken!r} alone; leave language out, "
            "or choose another model",
            "language",
        )
    return spoken


async def _decode(request: Request, service: Service, form: Form, recording: Recording) -> Samples:
    """Return the recording as 16 kHz mono audio [n].

    Raises:
        ApiError: the file is not audio, or is too long.
        ClientDisconnect: the client left.
    """
    body = await form.file.read()  # its content alone says what it is
    work = asyncio.ensure_future(service.files.decode(body, OCTETS, recording.max_secs))
    gone = asyncio.ensure_future(request.receive())
    both: set[asyncio.Future[Any]] = {work, gone}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for future in both:
            future.cancel()


async def _transcribe(recording: Recording, samples: Samples, request: Request, form: Form) -> AsyncGenerator[Event, None]:
    """Transcribe a recording, and yield its events as they come."""
    transcription = await recording.transcribe(samples, caller_gone=request.receive)
    for number, segment in enumerate(transcription.segments):
        if segment.text:
            yield delta_event(number, segment, logprobs=form.logprobs, whole=form.segments)
    yield done_event(transcription, logprobs=form.logprobs, whole=form.segments)


async def with_error_event(first: Event, others: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """Yield events, and the error's event after a failure, whose status the client can no longer get."""
    yield first
    try:
        async for event in others:
            yield event
    except ApiError as error:
        failure = error
    except Exception as error:
        log.exception("request failed")
        failure = ApiError(ErrorKind.INTERNAL, "internal error")
        failure.__cause__ = error
    else:
        return
    metrics.REJECTIONS.labels(failure.kind.code).inc()
    tracing.fail(failure.kind)
    yield body_of(failure, current_request_id())


def _answer(transcription: Transcription, form: Form, language: str) -> Response:
    """Return the answer in the form's format."""
    if form.format is Format.JSON:
        return _json(json_body(transcription, logprobs=form.logprobs))
    if form.format is Format.VERBOSE_JSON:
        words, segments = (granularity in form.granularities for granularity in (Granularity.WORD, Granularity.SEGMENT))
        return _json(verbose_body(transcription, language, words=words, segments=segments))
    return Response(text_of(transcription.segments) + "\n", media_type="text/plain")


def _json(body: Mapping[str, Any]) -> Response:
    return Response(orjson.dumps(body), media_type="application/json")
