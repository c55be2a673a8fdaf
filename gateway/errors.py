"""Errors of the API: one catalogue and one error body for HTTP and WebSocket."""

from __future__ import annotations

import random
from enum import Enum
from typing import Any, NamedTuple

RETRY_AFTER_RANGE_SECS = (1.0, 5.0)
"""Range of the random ``Retry-After`` in seconds, so that refused clients do not all retry at once."""


class Kind(NamedTuple):
    """An entry of the catalogue.

    Attributes:
        code: stable, machine-readable name.
        type: group of codes.
        status: HTTP status.
        close_code: WebSocket close code.
        retryable: whether the same request may succeed later.
    """

    code: str
    type: str
    status: int
    close_code: int
    retryable: bool = False


class ErrorKind(Kind, Enum):
    """The catalogue of errors."""

    EMPTY_BODY = Kind("empty_body", "invalid_request", 400, 1007)
    ODD_LENGTH = Kind("odd_length", "invalid_request", 400, 1007)
    INVALID_BODY = Kind("invalid_body", "invalid_request", 400, 1007)
    UNDECODABLE_AUDIO = Kind("undecodable_audio", "invalid_request", 400, 1007)
    EMPTY_FRAME = Kind("empty_frame", "invalid_request", 400, 1007)
    INVALID_VALUE = Kind("invalid_value", "invalid_request", 400, 1007)
    UNSUPPORTED_TASK = Kind("unsupported_task", "invalid_request", 400, 1007)
    UNKNOWN_CONTROL = Kind("unknown_control", "invalid_request", 400, 1007)
    TEXT_FRAME = Kind("text_frame", "invalid_request", 400, 1003)
    INVALID_API_KEY = Kind("invalid_api_key", "authentication", 401, 4401)
    ORIGIN_NOT_ALLOWED = Kind("origin_not_allowed", "permission", 403, 4403)
    MODEL_NOT_FOUND = Kind("model_not_found", "not_found", 404, 4404)
    NOT_FOUND = Kind("not_found", "not_found", 404, 4404)
    METHOD_NOT_ALLOWED = Kind("method_not_allowed", "invalid_request", 405, 1003)
    BODY_TOO_SLOW = Kind("body_too_slow", "timeout", 408, 4408, retryable=True)
    STREAM_IDLE = Kind("stream_idle", "timeout", 408, 4408, retryable=True)
    BODY_TOO_LARGE = Kind("body_too_large", "too_large", 413, 1009)
    FRAME_TOO_LARGE = Kind("frame_too_large", "too_large", 413, 1009)
    AUDIO_TOO_LONG = Kind("audio_too_long", "too_large", 413, 4413)
    UNSUPPORTED_MEDIA = Kind("unsupported_media", "unsupported_media", 415, 1003)
    UNACCEPTABLE = Kind("unacceptable", "invalid_request", 422, 1007)
    INVALID_SESSION = Kind("invalid_session", "invalid_request", 422, 1007)
    QUOTA_EXCEEDED = Kind("quota_exceeded", "quota", 429, 4429, retryable=True)
    INTERNAL = Kind("internal", "server_error", 500, 1011)
    BACKEND_FAILED = Kind("backend_failed", "backend", 502, 4503, retryable=True)
    BACKEND_DIED = Kind("backend_died", "backend", 502, 4503)
    NO_CAPACITY = Kind("no_capacity", "capacity", 503, 4503, retryable=True)
    NOT_READY = Kind("not_ready", "capacity", 503, 4503, retryable=True)
    DRAINING = Kind("draining", "capacity", 503, 1012, retryable=True)
    BACKEND_TIMEOUT = Kind("backend_timeout", "backend", 504, 4503, retryable=True)


class ApiError(Exception):
    """An error that the client gets.

    Args:
        kind: entry in the catalogue.
        message: one or two sentences: what is wrong, the value, what is allowed. Nothing internal.
        param: name of the invalid parameter.

    Attributes:
        retry_after_secs: delay before a retry; None: no ``Retry-After``.
    """

    def __init__(self, kind: ErrorKind, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.retry_after_secs: float | None = None
        if kind.status in (429, 503):
            self.retry_after_secs = random.uniform(*RETRY_AFTER_RANGE_SECS)  # noqa: S311

    def body(self, request_id: str | None) -> dict[str, Any]:
        """Return the HTTP body."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind.type,
                "code": self.kind.code,
                "param": self.param,
                "request_id": request_id,
                "retryable": self.kind.retryable,
                "retry_after_ms": None if self.retry_after_secs is None else round(self.retry_after_secs * 1000),
            }
        }

    def frame(self, request_id: str | None) -> dict[str, Any]:
        """Return the WebSocket error frame."""
        return {"type": "error", "close_code": self.kind.close_code, **self.body(request_id)}

    def headers(self) -> dict[str, str]:
        """Return the HTTP headers of the error."""
        headers: dict[str, str] = {}
        if self.retry_after_secs is not None:
            headers["Retry-After"] = str(round(self.retry_after_secs))
        if self.kind is ErrorKind.INVALID_API_KEY:
            headers["WWW-Authenticate"] = "Bearer"
        return headers
