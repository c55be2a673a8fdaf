"""Which web pages may use the gateway."""

from __future__ import annotations

import pytest

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.limits.origins import check_origin, origin_allowed


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://localhost:8057", "localhost:8057"),
        ("http://LOCALHOST:8057", "localhost:8057"),
        ("http://127.0.0.1:8057", "127.0.0.1:8057"),
        ("http://[::1]:8057", "[::1]:8057"),
        ("http://10.1.2.3", "10.1.2.3"),
        ("http://10.1.2.3", "10.1.2.3:80"),
        ("https://10.1.2.3:443", "10.1.2.3"),
        ("https://asr.example.com", "asr.example.com"),
        ("https://ASR.example.com:8443", "asr.Example.com:8443"),
    ],
)
def test_own_origin_is_allowed(origin: str, host: str) -> None:
    assert origin_allowed(origin, host, Settings(allowed_hosts=("ASR.example.com",)))


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://evil.example", "evil.example"),  # its name may resolve to the gateway's address
        ("http://localhost:8057", "localhost:8058"),
        ("http://localhost:8057", "127.0.0.1:8057"),
        ("http://127.0.0.1.evil.example", "127.0.0.1.evil.example"),
        ("http://localhost.evil.example", "localhost.evil.example"),
        ("http://x@localhost", "localhost"),
        ("http://localhost", "x@localhost"),
        ("https://10.1.2.3", "10.1.2.3:80"),
        ("http://localhost:99999", "localhost:99999"),
        ("http://[::1", "[::1"),
        ("file://localhost", "localhost"),
        ("null", "null"),
        ("null", ""),
        ("", ""),
        ("http://", ""),
    ],
)
def test_foreign_origin_is_not_allowed(origin: str, host: str) -> None:
    assert not origin_allowed(origin, host, Settings(allowed_hosts=("asr.example.com",)))


def test_configured_origins_are_allowed_for_any_host() -> None:
    settings = Settings(allowed_origins=("https://app.example",))
    assert origin_allowed("https://app.example", "asr.internal", settings)
    assert not origin_allowed("https://app.example:8443", "asr.internal", settings)
    assert origin_allowed("null", "asr.internal", Settings(allowed_origins=("*",)))


def test_refusal_names_the_settings() -> None:
    with pytest.raises(ApiError, match=r"'https://evil\.example'.*allowed_origins.*allowed_hosts") as error:
        check_origin({"origin": "https://evil.example", "host": "localhost"}, Settings())
    assert error.value.kind is ErrorKind.ORIGIN_NOT_ALLOWED


def test_program_without_origin_is_allowed() -> None:
    check_origin({"host": "asr.example"}, Settings())
