"""``POST /v2/decode/batch/{model}``: the face of the recordings' engine."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from gateway.api.error_schema import openapi_responses
from gateway.audio.json_form import unpack_json
from gateway.audio.media_types import OCTETS
from gateway.audio.pool import FilePool
from gateway.errors import ApiError, ErrorKind
from gateway.limits.auth import check_key
from gateway.limits.places import CallerGoneError
from gateway.service import Service
from gateway.triton.connection import Samples

router = APIRouter()


class Word(BaseModel):
    """A recognised word, timed from the start of the recording."""

    word: str
    start: float = Field(description="seconds")
    end: float = Field(description="seconds")
    confidence: float = Field(ge=0, le=1)


class BatchAnswer(BaseModel):
    """A transcript."""

    text: str
    tokens: list[int] = Field(description="ids in the model's vocabulary")
    audio_length_samples: int = Field(description="length at 16 kHz")
    features_length: int = Field(description="number of feature frames")
    encoded_length: int = Field(description="number of encoder frames")
    confidence: float | None = Field(description="mean probability of the tokens; null if there are none")
    words: list[Word]
    opaque: Any = Field(default=None, description="value of the same name in the JSON request")


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
    description="The body is raw PCM (16-bit little-endian, 16 kHz, mono) or a WAV, FLAC, Ogg, MP3, AIFF, AU, CAF or W64 file; "
    "as the body itself, as the `file` of a form, or as an array of bytes in the `audio_buffer` of JSON.",
)
async def decode_batch(request: Request, model: str) -> Response:
    """Answer one recording."""
    service: Service = request.app.state.service
    caller = check_key(request.headers, service.settings)
    service.check_model(model)
    with service.quotas.batch(caller, request.client.host if request.client else None):
        with service.transcriber.admit(model, caller):
            pass  # refused before its body is read, if it can be
        body, content_type = await _read_body(request)
        with service.transcriber.admit(model, caller) as recording:  # a body that does not come holds no place
            samples, opaque = await _decode(request, service.files, body, content_type, recording.max_secs)
            try:
                transcription = await recording.transcribe(samples, caller_gone=request.receive)
            except CallerGoneError:
                raise ClientDisconnect from None
    (segment,) = transcription.segments
    answer = {
        "text": segment.text,
        "tokens": segment.tokens,
        "audio_length_samples": transcription.samples,
        "features_length": transcription.features,
        "encoded_length": transcription.frames,
        "confidence": None if segment.confidence is None else round(segment.confidence, 4),
        "words": segment.words,
        **opaque,
    }
    return Response(orjson.dumps(answer), media_type="application/json")


async def _read_body(request: Request) -> tuple[bytes, str]:
    """Return the recording's bytes, and their content type.

    Raises:
        ApiError: the form has no file.
        ClientDisconnect: the client left.
    """
    content_type = request.headers.get("content-type", "")
    if _media_type(content_type) == "multipart/form-data":
        return await _read_form(request)
    return await request.body(), content_type


async def _decode(
    request: Request, files: FilePool, body: bytes, content_type: str, max_secs: float
) -> tuple[Samples, dict[str, Any]]:
    """Decode the body.

    Returns:
        16 kHz mono audio [n], and the fields that the answer repeats: ``opaque``, if the request has it.

    Raises:
        ApiError: the body is not audio, or is longer than ``max_secs``.
        ClientDisconnect: the client left.
    """
    opaque: dict[str, Any] = {}
    if _media_type(request.headers.get("content-type", "")) == "application/json":
        body, opaque = await run_in_threadpool(unpack_json, body)  # off the event loop: parsing numbers takes long
        content_type = OCTETS
    return await _unless_gone(request, asyncio.ensure_future(files.decode(body, content_type, max_secs))), opaque


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


async def _unless_gone(request: Request, work: asyncio.Future[Samples]) -> Samples:
    """Wait for work, and cancel it when the client leaves.

    Raises:
        ClientDisconnect: the client left.
    """
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


async def _read_form(request: Request) -> tuple[bytes, str]:
    """Return the content of the form's file, and its media type."""
    async with request.form(max_files=1, max_fields=16) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError(ErrorKind.INVALID_BODY, "the form has no file under the name 'file'", "file")
        return await file.read(), file.content_type or "application/octet-stream"
