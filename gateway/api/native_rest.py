"""``POST /v2/decode/batch/{model}``: one recording in, one transcript out."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from gateway import metrics
from gateway.audio.files import OCTETS, RATE, decode_audio, is_file, pcm_from_json
from gateway.errors import ApiError, ErrorKind, openapi_responses
from gateway.limits.access import check_key
from gateway.service import Service
from gateway.triton.endpoint import Samples

QUEUE_SECS = 30.0
"""So long a recording waits for a place: clients have hardly more patience."""

router = APIRouter()


class Word(BaseModel):
    """A recognised word with its time from the start of the recording."""

    word: str
    start: float = Field(description="seconds")
    end: float = Field(description="seconds")
    confidence: float = Field(ge=0, le=1)


class BatchAnswer(BaseModel):
    """A transcript."""

    text: str
    tokens: list[int] = Field(description="ids in the model's vocabulary")
    audio_length_samples: int = Field(description="length at 16 kHz")
    features_length: int = Field(description="feature frames made from the audio")
    encoded_length: int = Field(description="encoder frames made from those")
    confidence: float | None = Field(description="mean probability of the tokens; null where there are none")
    words: list[Word]
    opaque: Any = Field(default=None, description="what the JSON request carried under this name")


BINARY = {"schema": {"type": "string", "format": "binary"}}
REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/octet-stream": BINARY,
        "audio/wav": BINARY,
        "audio/flac": BINARY,
        "audio/ogg": BINARY,
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"file": {"type": "string", "format": "binary"}},
                "required": ["file"],
            }
        },
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "audio_buffer": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}},
                    "opaque": {},
                    "description": {},
                },
                "required": ["audio_buffer"],
            }
        },
    },
}


@router.post(
    "/v2/decode/batch/{model}",
    response_model=BatchAnswer,
    responses=openapi_responses(),
    openapi_extra={"requestBody": REQUEST_BODY},
    summary="Transcribe a recording",
    description="The body is raw PCM (16-bit little-endian, 16 kHz, mono) or a WAV, FLAC or Ogg file; "
    "as it stands, as a form's `file`, or as JSON numbers in `audio_buffer`.",
)
async def decode_batch(request: Request, model: str) -> Response:
    """Answer one recording."""
    service: Service = request.app.state.service
    caller = check_key(request.headers, service.settings)
    ensemble = service.ensemble(model)
    with service.admission.batch():
        recogniser = service.triton.recogniser(ensemble)
        max_secs = min(service.settings.max_batch_audio_length_secs, recogniser.max_whole_secs)
        samples, opaque = await _read_audio(request, max_secs)
        service.quotas.spend(caller, len(samples) / RATE)
        metrics.AUDIO_SECONDS.labels("batch", model).inc(len(samples) / RATE)
        utterance = service.triton.recording(recogniser, service.options)
        async with _place(request, service.admission.batch_places):
            answer = await utterance.send(samples, end=True)
    body = {
        "text": answer.text,
        "tokens": answer.tokens,
        "audio_length_samples": answer.samples,
        "features_length": answer.features,
        "encoded_length": answer.frames,
        "confidence": None if math.isnan(answer.confidence) else round(answer.confidence, 4),
        "words": answer.words,
        **opaque,
    }
    return Response(orjson.dumps(body), media_type="application/json")


@asynccontextmanager
async def _place(request: Request, places: asyncio.Semaphore) -> AsyncIterator[None]:
    """Hold a place for Triton's work on a recording, unless its client leaves before there is one.

    Raises:
        ApiError: there was none for too long.
        ClientDisconnect: the client has left.
    """
    if places.locked():
        place = asyncio.create_task(places.acquire())
        left = asyncio.ensure_future(request.receive())
        try:
            await asyncio.wait({place, left}, timeout=QUEUE_SECS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            place.cancel()
        if not place.done():
            if left.done():
                raise ClientDisconnect
            raise ApiError(ErrorKind.NO_CAPACITY, f"no place came free within {QUEUE_SECS:g} s; please retry")
    else:
        await places.acquire()
    try:
        yield
    finally:
        places.release()


async def _read_audio(request: Request, max_secs: float) -> tuple[Samples, dict[str, Any]]:
    """The request's audio at 16 kHz, and its ``opaque`` where given.

    Raises:
        ApiError: the body is no audio, or too much of it.
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        body, content_type = await _read_form(request)
    else:
        body = await request.body()
    # Off the event loop: a minute of FLAC takes tens of milliseconds, in which live streams must not stand still. Raw PCM takes
    # no time, and the way to a thread and back would.
    if media_type == "application/json":
        return await run_in_threadpool(_decode_json, body, max_secs)
    if is_file(body):
        return await run_in_threadpool(decode_audio, body, content_type, max_secs), {}
    return decode_audio(body, content_type, max_secs), {}


def _decode_json(body: bytes, max_secs: float) -> tuple[Samples, dict[str, Any]]:
    audio, opaque = pcm_from_json(body)
    return decode_audio(audio, OCTETS, max_secs), opaque


async def _read_form(request: Request) -> tuple[bytes, str]:
    async with request.form(max_files=1, max_fields=16) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError(ErrorKind.INVALID_BODY, "the form has no file under the name 'file'", "file")
        return await file.read(), file.content_type or "application/octet-stream"
