"""Segments of a recording as they are decoded, and answers that are sent part by part; for all faces of recordings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import structlog
from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway import metrics, tracing
from gateway.audio.pool import FilePool
from gateway.audio.raw import RawFormat
from gateway.errors import ApiError, ErrorKind
from gateway.logs import current_request_id
from gateway.recordings.transcribe import Recording
from gateway.transcript.segments import Segment

UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""Headers that prevent caches and nginx from delaying parts."""

Part = Mapping[str, Any]
Result = TypeVar("Result")

log = structlog.get_logger()


@dataclass(frozen=True)
class Wire:
    """Encoding of an answer that is sent part by part.

    Attributes:
        media_type: media type of the answer.
        encode: returns the bytes of a part.
        error: returns the part of an error, from it and the request's id.
    """

    media_type: str
    encode: Callable[[Part], bytes]
    error: Callable[[ApiError, str | None], Part]


async def unless_gone(request: Request, work: asyncio.Future[Result]) -> Result:
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
        gone.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
            if not work.cancelled():
                work.exception()  # no client waits for it any more


async def read_segments(
    files: FilePool, recording: Recording, body: bytes | BinaryIO, content_type: str, raw: RawFormat, *, separate: bool = False
) -> AsyncGenerator[Segment, None]:
    """Yield a recording's segments as they are decoded.

    Args:
        files: decodes the body.
        recording: the admitted recording.
        body: the recording's bytes, or an open file with them.
        content_type: media type of the body.
        raw: format of the body if it is raw audio.
        separate: whether each channel gets a transcript of its own.

    Raises:
        ApiError: the recording cannot be decoded.
    """
    reading = files.read(body, content_type, raw=raw, separate=separate, max_secs=recording.max_secs)
    async with reading as audio, aclosing(recording.segments(audio, separate=separate)) as segments:
        async for segment in segments:
            yield segment


async def read_to_end(request: Request, segments: AsyncGenerator[Segment, None]) -> None:
    """Decode a recording to its end, unless the client leaves.

    Raises:
        ApiError: the recording cannot be decoded.
        ClientDisconnect: the client left.
    """

    async def exhaust() -> None:
        async with aclosing(segments):
            async for _ in segments:
                pass

    await unless_gone(request, asyncio.ensure_future(exhaust()))


async def stream(request: Request, parts: AsyncGenerator[Part, None], wire: Wire, held: AsyncExitStack) -> Response:
    """Wait for the first part, and return the response that sends all of them.

    Args:
        request: the request; its client may leave.
        parts: the parts; at least one.
        wire: encoding of the parts.
        held: contexts that the parts need; they end after the last part, or when the client leaves.

    Raises:
        ApiError: there is no first part.
        ClientDisconnect: the client left.
    """
    first = await unless_gone(request, asyncio.ensure_future(anext(parts)))
    return _Streamed(request, first, parts, wire, held.pop_all())


async def with_error(first: Part, others: AsyncIterator[Part], wire: Wire) -> AsyncIterator[bytes]:
    """Yield encoded parts. An error becomes the last part, since the status has been sent."""
    yield wire.encode(first)
    try:
        async for part in others:
            yield wire.encode(part)
    except ApiError as error:
        failure = error
    except Exception:
        log.exception("request failed")
        failure = ApiError(ErrorKind.INTERNAL, "internal error")
    else:
        return
    metrics.REJECTIONS.labels(failure.kind.code).inc()
    tracing.fail(failure.kind)
    yield wire.encode(wire.error(failure, current_request_id()))


class _Streamed(StreamingResponse):
    def __init__(
        self, request: Request, first: Part, others: AsyncGenerator[Part, None], wire: Wire, held: AsyncExitStack
    ) -> None:
        super().__init__(with_error(first, others, wire), headers=UNBUFFERED, media_type=wire.media_type)
        self._request = request
        self._others = others
        self._held = held

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        async with self._held, aclosing(self._others):
            await unless_gone(self._request, asyncio.ensure_future(self.stream_response(send)))
