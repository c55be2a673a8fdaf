"""Check API keys."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind

ANONYMOUS = -1
"""Caller if the settings have no API keys."""


def check_key(headers: Mapping[str, str], settings: Settings) -> int:
    """Return the caller of a request by its API key.

    Args:
        headers: headers of the request, with case-insensitive names.
        settings: settings of the gateway; without API keys every request is accepted.

    Returns:
        Index of the key among those of the settings, or ``ANONYMOUS``.

    Raises:
        ApiError: the key is missing or wrong.
    """
    return caller_of(key_in(headers), settings)


def key_in(headers: Mapping[str, str]) -> str:
    """Return the key that headers have; empty if there is none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def caller_of(given: str, settings: Settings) -> int:
    """Return the caller that has a key, as ``check_key`` does.

    Raises:
        ApiError: the key is missing or wrong.
    """
    if not settings.api_keys:
        return ANONYMOUS
    if not given:
        raise ApiError(ErrorKind.INVALID_API_KEY, "an API key is needed: send Authorization: Bearer KEY or X-API-Key: KEY")
    # Every key is compared, each in constant time, so the duration reveals nothing.
    matches = [hmac.compare_digest(given.encode(), key.get_secret_value().encode()) for key in settings.api_keys]
    if not any(matches):
        raise ApiError(ErrorKind.INVALID_API_KEY, "the API key is not valid")
    return matches.index(True)
