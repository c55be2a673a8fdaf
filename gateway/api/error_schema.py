"""The error body in OpenAPI."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from gateway.errors import ErrorKind


class ErrorDetail(BaseModel):
    """What is wrong, and whether a retry helps."""

    message: str
    type: str
    code: str
    param: str | None
    request_id: str | None
    retryable: bool
    retry_after_ms: int | None


class ErrorAnswer(BaseModel):
    """The body of every error answer."""

    error: ErrorDetail


def openapi_responses() -> dict[int | str, dict[str, Any]]:
    """Return the responses of a route: for each error status the body and the possible codes."""
    codes: dict[int, list[str]] = {}
    for kind in ErrorKind:
        codes.setdefault(kind.status, []).append(kind.code)
    return {status: {"model": ErrorAnswer, "description": ", ".join(names)} for status, names in sorted(codes.items())}
