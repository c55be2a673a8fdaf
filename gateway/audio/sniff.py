"""Identify what a body is, by its content and its declared media type."""

from __future__ import annotations

from gateway.errors import ApiError, ErrorKind

OCTETS = "application/octet-stream"
RAW_TYPES = frozenset({OCTETS, "audio/pcm", "audio/x-pcm", "audio/raw", "audio/x-raw"})
"""Media types that allow raw PCM. `audio/L16` does not: it is big-endian by definition and little-endian in many clients."""

CONTAINER_TYPES = frozenset(f"audio/{name}" for name in ("wav", "x-wav", "wave", "vnd.wave", "flac", "x-flac", "ogg", "opus"))
ALLOWED = (
    f"Send 16 kHz mono s16le PCM as {OCTETS} or audio/pcm, a WAV, FLAC or Ogg (Vorbis, Opus) file as {OCTETS} or audio/*, "
    "one file as multipart/form-data, or an audio_buffer as application/json."
)

WAV, FLAC, OGG = (b"RIFF", b"RF64"), b"fLaC", b"OggS"
"""First bytes of supported files."""

FOREIGN = (
    (0, b"ID3", "MP3"),
    (4, b"ftyp", "MP4"),
    (0, b"\x1a\x45\xdf\xa3", "WebM or Matroska"),
    (0, b"FORM", "AIFF"),
    (0, b"RIFF", "RIFF other than WAV"),
    (0, b"RF64", "RF64 other than WAV"),
    (0, b"#!AMR", "AMR"),
    (0, b"PK\x03\x04", "ZIP"),
    (0, b"\x1f\x8b\x08", "gzip"),
    (0, b"%PDF", "PDF"),
    (0, b"\x89PNG", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
)
"""Offset, bytes and name of formats that are recognised but not supported."""

TEXT = bytes(range(0x20, 0x7F)) + b"\t\n\v\f\r"
MIN_TEXT_BYTES = 16
"""Shorter bodies may be raw PCM although every byte is printable."""


def unsupported(message: str, param: str | None = None) -> ApiError:
    """Return the error for media that is not supported; its message ends with what is."""
    return ApiError(ErrorKind.UNSUPPORTED_MEDIA, f"{message} {ALLOWED}", param)


def undecodable(message: str) -> ApiError:
    """Return the error for audio that is not decodable."""
    return ApiError(ErrorKind.UNDECODABLE_AUDIO, message)


def too_long(length: str, max_secs: float) -> ApiError:
    """Return the error for audio over the limit."""
    return ApiError(ErrorKind.AUDIO_TOO_LONG, f"The audio lasts {length}; at most {max_secs:g} s are allowed.")


def is_file(body: bytes) -> bool:
    """Return whether a body starts like a file; decoding a file takes CPU time, reading raw PCM does not."""
    return body.startswith((*WAV, FLAC, OGG))


def parse_media_type(content_type: str) -> str:
    """Return the media type of a `Content-Type` without its parameters; an empty one means `application/octet-stream`.

    Raises:
        ApiError: the type is not a type of audio.
    """
    media_type = content_type.partition(";")[0].strip().lower() or OCTETS
    if media_type != OCTETS and not media_type.startswith("audio/"):
        raise unsupported(f"Content type {media_type[:80]!r} isn't supported.", "Content-Type")
    return media_type


def check_raw(body: bytes, media_type: str) -> None:
    """Check that a body without a supported file's header is raw PCM by its type, and that its content does not contradict.

    Raises:
        ApiError: it is not raw PCM.
    """
    for offset, magic, name in FOREIGN:
        if body.startswith(magic, offset):
            raise unsupported(f"The body looks like {name}, which isn't supported.")
    if media_type in CONTAINER_TYPES:
        raise undecodable(f"The body was sent as {media_type}, but doesn't begin like a WAV, FLAC or Ogg file.")
    if media_type not in RAW_TYPES:
        raise unsupported(f"Content type {media_type[:80]!r} isn't supported.", "Content-Type")
    if len(body) >= MIN_TEXT_BYTES and not body[:1024].translate(None, TEXT) and not body.translate(None, TEXT):
        raise undecodable(f"The body is text, not audio. {ALLOWED}")
