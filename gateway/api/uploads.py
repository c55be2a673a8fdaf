"""Receive recordings: small ones stay in memory, larger ones go to a temporary file on disk."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import structlog
from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from gateway.audio.json_form import unpack_json
from gateway.audio.media_types import OCTETS
from gateway.errors import ApiError, ErrorKind

log = structlog.get_logger()

MEMORY_BYTES = 2**20
"""Maximum size of a body in memory, equal to Starlette's limit for files of forms; 33 s of raw PCM."""

MAX_FIELDS, MAX_FIELD_BYTES = 16, 2**20
"""Maximum number of fields of a form beside its file, and maximum size of one in bytes."""

MAX_FIELDS_BYTES = 16 * 2**20
"""Maximum size of all fields of a form beside its file, in bytes; they are kept in memory."""

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_BINARY = {"schema": {"type": "string", "format": "binary"}}
UPLOAD_SCHEMA: dict[str, Any] = {
    "required": True,
    "content": {
        "application/octet-stream": _BINARY,
        "audio/wav": _BINARY,
        "audio/flac": _BINARY,
        "audio/ogg": _BINARY,
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
"""The bodies that ``receive_upload`` reads, for OpenAPI."""


@dataclass(frozen=True)
class Upload:
    """A received recording.

    Attributes:
        body: its bytes, or an open file with them.
        content_type: its media type.
        opaque: the ``opaque`` of a JSON request, which the answer repeats; empty if there is none.
    """

    body: bytes | BinaryIO
    content_type: str
    opaque: Mapping[str, Any] = field(default_factory=dict)


@asynccontextmanager
async def receive_upload(request: Request) -> AsyncIterator[Upload]:
    """Receive the recording of a request: its body, the ``file`` of its form, or the ``audio_buffer`` of its JSON.

    Leaving the context deletes it.

    Raises:
        ApiError: the form has no file, the JSON no audio, the body is too large or too slow, or the disk has no room for it.
        ClientDisconnect: the client left.
    """
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        form = await receive_form(request)
        try:
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise ApiError(ErrorKind.INVALID_BODY, "the form has no file under the name 'file'", "file")
            yield await open_form_file(file)
        finally:
            await form.close()
    elif media_type == "application/json":
        body, opaque = await run_in_threadpool(unpack_json, await request.body())  # parsing numbers takes long
        yield Upload(body, OCTETS, opaque)
    else:
        body_or_file = await _receive_body(request)
        try:
            yield Upload(body_or_file, content_type)
        finally:
            if not isinstance(body_or_file, bytes):
                body_or_file.close()


async def receive_form(request: Request, max_fields: int = MAX_FIELDS, max_field_bytes: int = MAX_FIELD_BYTES) -> FormData:
    """Receive a form with at most one file. The form must be closed, which deletes the file.

    Args:
        request: its form is empty if its content type is not ``multipart/form-data``.
        max_fields: maximum number of fields beside the file.
        max_field_bytes: maximum size of one of them.

    Raises:
        ApiError: the body is too large or too slow, its fields are too large, or the disk has no room for it.
        HTTPException: 400, the form is malformed, or has more files or fields.
        ClientDisconnect: the client left.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "multipart/form-data":
        return FormData()

    async def limited() -> AsyncGenerator[bytes, None]:
        fields = fields_chars = 0
        async for chunk in request.stream():
            yield chunk
            for _, value in parser.items[fields:]:
                fields += 1
                fields_chars += len(value) if isinstance(value, str) else 0
            if fields_chars > MAX_FIELDS_BYTES:
                message = f"the form's fields beside its file have more than {MAX_FIELDS_BYTES} bytes, the most allowed"
                raise ApiError(ErrorKind.BODY_TOO_LARGE, message)

    async with aclosing(limited()) as body:
        parser = MultiPartParser(request.headers, body, max_files=1, max_fields=max_fields, max_part_size=max_field_bytes)
        with unstored_refused():
            try:
                return await parser.parse()
            except MultiPartException as error:
                raise HTTPException(400, error.message) from error


async def open_form_file(file: UploadFile) -> Upload:
    """Return the file of a form; the form must stay open while the file is used."""
    content_type = file.content_type or OCTETS
    if (file.size or 0) <= MEMORY_BYTES:
        return Upload(await file.read(), content_type)
    with unstored_refused():
        await run_in_threadpool(file.file.flush)  # it is read by its descriptor
    return Upload(file.file, content_type)


async def _receive_body(request: Request) -> bytes | BinaryIO:
    received = bytearray()
    file: BinaryIO | None = None
    try:
        with unstored_refused():
            async for chunk in request.stream():
                received += chunk
                if len(received) > MEMORY_BYTES:
                    file = file or tempfile.TemporaryFile()  # noqa: SIM115 (closed by the caller)
                    await run_in_threadpool(file.write, received)
                    received = bytearray()
            if not file:
                return bytes(received)
            await run_in_threadpool(file.write, received)
            await run_in_threadpool(file.flush)  # it is read by its descriptor
    except BaseException:
        if file:
            file.close()
        raise
    return file


@contextmanager
def unstored_refused() -> Iterator[None]:
    """Refuse a body that can't be stored: the disk is full, or the directory for temporary files is not writable.

    Raises:
        ApiError: the body can't be stored.
    """
    try:
        yield
    except OSError as error:
        log.error("body not stored", directory=tempfile.tempdir, reason=str(error))
        message = "the server's disk has no room for the body; please retry later, or send less"
        if error.errno not in NO_ROOM:
            message = "the server can't store the body, since its disk is not writable; please retry later"
        raise ApiError(ErrorKind.NO_CAPACITY, message) from error
