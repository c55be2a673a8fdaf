"""Check the origins of web pages (RFC 6454)."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind

DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
MAX_SHOWN_CHARS = 128


def check_origin(headers: Mapping[str, str], settings: Settings) -> None:
    """Refuse a request of a foreign web page. Programs that send no ``Origin`` are not affected.

    Args:
        headers: headers of the request, with case-insensitive names.
        settings: settings with the allowed origins and hosts.

    Raises:
        ApiError: the origin is not allowed.
    """
    origin = headers.get("origin")
    if origin is None or origin_allowed(origin, headers.get("host", ""), settings):
        return
    raise ApiError(
        ErrorKind.ORIGIN_NOT_ALLOWED,
        f"origin {origin[:MAX_SHOWN_CHARS]!r} is not allowed: add it to allowed_origins in the server's configuration, "
        "or its host to allowed_hosts if its pages come from this server",
    )


def origin_allowed(origin: str, host: str, settings: Settings) -> bool:
    """Return whether pages of an origin may use the gateway.

    An origin equal to the request's ``Host`` is the gateway's own. It is allowed if the host is ``localhost``, an IP address or
    one of ``allowed_hosts``. With any other name, the page of a foreign site whose name resolves to the gateway's address (DNS
    rebinding) would be allowed too.

    Args:
        origin: ``scheme://host[:port]``.
        host: the request's ``Host``.
        settings: settings of the gateway.
    """
    if "*" in settings.allowed_origins or origin in settings.allowed_origins:
        return True
    scheme = origin.partition("://")[0]
    theirs, ours = _split(origin), _split(f"{scheme}://{host}")
    return theirs is not None and theirs == ours and _is_known(theirs[0], settings)


def _split(url: str) -> tuple[str, int] | None:
    """Return host and port of a URL; None if it has none."""
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORTS[parts.scheme]
    except (ValueError, KeyError):
        return None
    return (parts.hostname, port) if parts.hostname and parts.username is None else None


def _is_known(host: str, settings: Settings) -> bool:
    """Return whether a foreign site cannot have this host."""
    if host == "localhost" or host in map(str.lower, settings.allowed_hosts):
        return True
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
