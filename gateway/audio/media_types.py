"""Compare the content of a body with its declared media type (RFC 6838)."""

from __future__ import annotations

import importlib.util

from gateway.audio.body import Slices
from gateway.audio.errors import EXTRA, SUPPORTED
from gateway.audio.sniff import RAW, Content, Format, identify
from gateway.errors import ApiError, ErrorKind

OCTETS = "application/octet-stream"
RAW_TYPES = frozenset({OCTETS, "audio/pcm", "audio/x-pcm", "audio/raw", "audio/x-raw"})
"""Types that allow raw PCM. `audio/L16` does not: it is big-endian by definition and little-endian in many clients."""

FILE_TYPES = frozenset(f"audio/{name}" for name in ("wav", "x-wav", "wave", "vnd.wave", "flac", "x-flac", "ogg", "opus"))
"""Types that need a file."""

FILE_ONLY_TYPES = ("video/", "application/ogg", "application/x-www-form-urlencoded")
"""Prefixes of other types that are accepted if the content is a file: recordings with a picture, and curl's default type."""

CONTAINERS = importlib.util.find_spec("av") is not None
"""Whether the extra ``containers`` is installed."""

ALLOWED = (
    f"Send 16 kHz mono s16le PCM as {OCTETS} or audio/pcm, a {SUPPORTED} file as {OCTETS} or audio/*, "
    "one file as multipart/form-data, or an audio_buffer as application/json."
)


def identify_body(body: Slices, content_type: str) -> Content:
    """Identify a body that must be audio.

    The content decides: a file is accepted with any audio type. Raw PCM must be declared as such.

    Args:
        body: the whole body.
        content_type: its media type; parameters are ignored, and an empty one means `application/octet-stream`.

    Returns:
        A decodable format, or ``RAW``.

    Raises:
        ApiError: the body is empty, or neither a supported file nor raw PCM.
    """
    media_type = content_type.partition(";")[0].strip().lower() or OCTETS
    shown = repr(media_type[:80])
    declared_as_audio = media_type == OCTETS or media_type.startswith("audio/")
    if not declared_as_audio and (not len(body) or not media_type.startswith(FILE_ONLY_TYPES)):
        raise _unsupported(f"Content type {shown} isn't supported.", "Content-Type")
    if not len(body):
        raise ApiError(ErrorKind.EMPTY_BODY, "The body is empty; it must hold audio.")
    content = identify(body)
    if content.format.demuxer and not CONTAINERS:
        message = f"The body is {content.format.name}, which this server can't decode: {EXTRA}."
        raise ApiError(ErrorKind.UNSUPPORTED_MEDIA, message)
    if content.format.decodable:
        return content
    if not declared_as_audio:
        raise _unsupported(f"Content type {shown} isn't supported.", "Content-Type")
    if content.format != RAW:
        raise _unsupported(_describe(content.format))
    if media_type in FILE_TYPES:
        message = f"The body was sent as {media_type}, but doesn't begin like a {SUPPORTED} file."
        raise ApiError(ErrorKind.UNDECODABLE_AUDIO, message)
    if media_type not in RAW_TYPES:
        raise _unsupported(f"Content type {shown} isn't supported.", "Content-Type")
    return content


def _describe(found: Format) -> str:
    if found.name.endswith("text"):
        return f"The body is {found.name}, not audio."
    return f"The body looks like {found.name}, which isn't supported."


def _unsupported(message: str, param: str | None = None) -> ApiError:
    return ApiError(ErrorKind.UNSUPPORTED_MEDIA, f"{message} {ALLOWED}", param)
