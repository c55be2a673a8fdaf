"""Errors for OpenAI's clients: our body with OpenAI's types, and the header that prevents useless retries."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from gateway.errors import ApiError, ErrorKind

SHOULD_RETRY_HEADER = "x-should-retry"
"""Header with which a server overrides the retry rules of OpenAI's clients, which depend on the status alone."""


def type_of(kind: ErrorKind) -> str:
    """Return OpenAI's type of an error."""
    if kind.status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if kind.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"


def body_of(error: ApiError, request_id: str | None) -> dict[str, Any]:
    """Return the body of an error, or the data of its event."""
    return {"error": {**error.body(request_id)["error"], "type": type_of(error.kind)}}


def headers_of(error: ApiError) -> dict[str, str]:
    """Return the headers of an error besides ``ApiError.headers``."""
    return {} if error.kind.retryable else {SHOULD_RETRY_HEADER: "false"}
