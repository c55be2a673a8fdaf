"""Errors for audio that is not decodable."""

from __future__ import annotations

from gateway.errors import ApiError, ErrorKind

SUPPORTED = "WAV, W64, AIFF, AU, CAF, FLAC, Ogg (Vorbis, Opus), MP3, M4A/MP4, WebM/Matroska, AAC, AMR or WMA"
"""Supported formats, for messages."""

EXTRA = "install the server's extra 'containers' (pip install 'amira-asr[containers]')"
"""Remedy for formats that libsndfile does not decode, for messages."""


def unsupported(message: str) -> ApiError:
    """Return the error for a format or codec that is not supported; its message ends with the supported ones."""
    return ApiError(ErrorKind.UNSUPPORTED_MEDIA, f"{message} Send raw PCM or a {SUPPORTED} file.")


def undecodable(message: str) -> ApiError:
    """Return the error for a file that is damaged, or takes too much to decode."""
    return ApiError(ErrorKind.UNDECODABLE_AUDIO, message)


def too_long(length: str, max_secs: float) -> ApiError:
    """Return the error for audio over the limit."""
    return ApiError(ErrorKind.AUDIO_TOO_LONG, f"The audio lasts {length}; at most {max_secs:g} s are allowed.")
