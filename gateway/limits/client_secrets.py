"""Client secrets: short-lived keys that a caller creates for its own clients, such as a web page.

A secret carries its issuer and the session's initial settings. It is signed, not encrypted.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any

from itsdangerous import BadData, URLSafeSerializer

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.limits.auth import ANONYMOUS, caller_of

PREFIX = "ek_"


class ClientSecrets:
    """Issues and redeems client secrets.

    Args:
        settings: settings of the gateway; ``session_key`` is the key of the signature.
        wall_clock: returns Unix time in seconds.
    """

    def __init__(self, settings: Settings, wall_clock: Callable[[], float] = time.time) -> None:
        key = settings.session_key.get_secret_value() if settings.session_key else secrets.token_hex()
        self._serializer = URLSafeSerializer(key, salt="client secret")
        self._settings = settings
        self._wall_clock = wall_clock

    def issue(self, caller: int, session: Mapping[str, Any], lifetime_secs: int) -> tuple[str, int]:
        """Return a new secret, and the Unix time in seconds at which it expires.

        Args:
            caller: caller that is charged for the sessions of the secret's holder.
            session: initial settings of its sessions, as JSON.
            lifetime_secs: time in which it can be used, in seconds.
        """
        expires_at = int(self._wall_clock()) + lifetime_secs
        text = self._serializer.dumps([self._fingerprint(caller), expires_at, session])
        return PREFIX + (text if isinstance(text, str) else text.decode()), expires_at

    def redeem(self, key: str) -> tuple[int, Mapping[str, Any]]:
        """Return the caller of a key, and the initial settings of its session.

        Args:
            key: a client secret, or an API key.

        Raises:
            ApiError: it is neither, or has expired.
        """
        if not key.startswith(PREFIX):
            return caller_of(key, self._settings), {}
        if self._settings.api_keys:  # of which one may begin so
            with contextlib.suppress(ApiError):
                return caller_of(key, self._settings), {}
        try:
            maker, expires_at, session = self._serializer.loads(key.removeprefix(PREFIX))
        except (BadData, TypeError, ValueError):
            raise ApiError(ErrorKind.INVALID_API_KEY, "the client secret is not valid here; create another") from None
        if self._wall_clock() >= expires_at:
            raise ApiError(ErrorKind.INVALID_API_KEY, "the client secret has expired; create another")
        callers = range(len(self._settings.api_keys)) if self._settings.api_keys else (ANONYMOUS,)
        caller = next((caller for caller in callers if self._fingerprint(caller) == maker), None)
        if caller is None:
            raise ApiError(ErrorKind.INVALID_API_KEY, "the API key that made the client secret is not valid any more")
        return caller, session

    def _fingerprint(self, caller: int) -> str:
        """Return an identifier of a caller that is equal on every gateway with its key, and does not reveal the key."""
        if caller == ANONYMOUS:
            return ""
        return hashlib.sha256(self._settings.api_keys[caller].get_secret_value().encode()).hexdigest()[:16]
