"""Web pages: live transcription at ``/``, the state of the server at ``/status``, and the REST API at ``/docs``.

The files of ``gateway/page`` are served as they are, from memory. They load nothing from elsewhere, and the browser enforces it
(Content Security Policy Level 3).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, ValidationError

from gateway.errors import ApiError, ErrorKind
from gateway.limits.auth import check_key
from gateway.service import Service
from gateway.transcript.segments import Segment
from gateway.transcript.words import Word
from gateway.transcript.writers import to_srt, to_text, to_vtt

FOLDER = Path(__file__).parents[1] / "page"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # asks for a newer version each time
}

NAVIGATION = re.compile(rb"<nav .*?</nav>", re.DOTALL)
"""Links between the pages."""

MAX_SECS = 10_000_000.0
"""Maximum time of a word, in seconds."""

WRITERS: Mapping[str, Callable[[Sequence[Segment]], str]] = {"txt": to_text, "srt": to_srt, "vtt": to_vtt}
"""Writer of each format, by its file name extension."""

GET = ["GET", "HEAD"]


@dataclass(frozen=True)
class File:
    """A file of a page.

    Attributes:
        body: its content.
        media_type: its content type.
    """

    body: bytes
    media_type: str

    @cached_property
    def etag(self) -> str:
        """Entity tag (RFC 9110, 8.8.3)."""
        return f'"{hashlib.sha256(self.body).hexdigest()[:16]}"'


class PageWord(BaseModel):
    """A timed word of a transcript."""

    word: str
    start: Annotated[float, Field(ge=0, le=MAX_SECS)]
    end: Annotated[float, Field(ge=0, le=MAX_SECS)]
    confidence: Annotated[float, Field(ge=0, le=1)] = 0.0


class PageSegment(BaseModel):
    """A segment of a transcript."""

    text: str
    words: list[PageWord]


class PageTranscript(BaseModel):
    """A transcript that a page has gathered."""

    segments: list[PageSegment]


def pages_router(*, pages: bool) -> APIRouter:
    """Return the routes of the pages.

    Args:
        pages: whether to serve ``/`` and ``/status``, and not only ``/docs``.
    """
    files = {path.name: File(path.read_bytes(), MEDIA_TYPES[path.suffix]) for path in sorted(FOLDER.iterdir())}
    docs = files["docs.html"]
    shown = {"/docs": docs if pages else File(NAVIGATION.sub(b"", docs.body), docs.media_type)}
    if pages:
        shown |= {"/": files["index.html"], "/status": files["status.html"]}
    router = APIRouter(include_in_schema=False)
    for path, file in shown.items():
        router.add_api_route(path, _sender(file), methods=GET)

    @router.api_route("/page/{name}", methods=GET)
    async def send_part(request: Request, name: str) -> Response:
        """Return a script, style sheet or picture."""
        file = files.get(name)
        if not file or name.endswith(".html"):
            raise ApiError(ErrorKind.NOT_FOUND, f"there is nothing at {request.url.path[:200]!r}")
        return _send(request, file)

    return router


def formats_router() -> APIRouter:
    """Return the route by which a page gets its transcript in the formats of the API."""
    router = APIRouter(include_in_schema=False)

    @router.post("/page/transcript.{extension}")
    async def write_transcript(request: Request, extension: str) -> Response:
        """Return the transcript of the body as text or subtitles."""
        service: Service = request.app.state.service
        check_key(request.headers, service.settings)
        if extension not in WRITERS:
            raise ApiError(ErrorKind.NOT_FOUND, f"there is no format {extension[:40]!r}; known: {', '.join(WRITERS)}")
        return Response(WRITERS[extension](read_transcript(await request.body())), media_type="text/plain")

    return router


def read_transcript(body: bytes) -> list[Segment]:
    """Return the segments of a page's transcript.

    Args:
        body: JSON of a ``PageTranscript``.

    Raises:
        ApiError: the body is not a valid transcript.
    """
    try:
        given = PageTranscript.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise ApiError(ErrorKind.INVALID_BODY, f"the transcript is not valid: {place}: {first['msg']}") from None
    segments: list[Segment] = []
    for segment in given.segments:
        words = [Word(word=one.word, start=one.start, end=one.end, confidence=one.confidence) for one in segment.words]
        if words:
            segments.append(Segment(len(segments), words[0]["start"], words[-1]["end"], segment.text, (), words, None))
    return segments


def _sender(file: File) -> Callable[[Request], Awaitable[Response]]:
    async def send_page(request: Request) -> Response:
        return _send(request, file)

    return send_page


def _send(request: Request, file: File) -> Response:
    """Return a file, or 304 if the browser has it."""
    headers = {**HEADERS, "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.body, headers=headers, media_type=file.media_type)
