"""Decisions about connections, with a scripted clock."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from gateway.limits.connects import MAX_CLOSED_AT_ONCE, MAX_HEALTH_ONLY, PRESSED_IDLE_SECS, Guard, Verdict, is_loopback

FAR = "203.0.113.7"


def test_connections_beyond_the_rate_may_request_health_only() -> None:
    guard: Guard[int] = Guard(1, 1000)
    verdicts = [guard.arrive(number, FAR, 0.0) for number in range(3 + MAX_HEALTH_ONLY)]
    assert verdicts == [Verdict.WELCOME] * 2 + [Verdict.HEALTH_ONLY] * MAX_HEALTH_ONLY + [Verdict.REFUSED]
    guard.leave(2)
    assert guard.arrive(99, FAR, 0.0) is Verdict.HEALTH_ONLY


def test_refunded_connection_makes_room_for_another() -> None:
    guard: Guard[int] = Guard(1, 1000)
    assert [guard.admit(FAR) for _ in range(3)] == [True, True, False]
    guard.refund(FAR)
    assert guard.admit(FAR)


def test_loopback_connections_have_no_rate() -> None:
    guard: Guard[int] = Guard(1, 1000)
    assert {guard.arrive(number, "127.0.0.1", 0.0) for number in range(500)} == {Verdict.WELCOME}


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("::ffff:127.0.0.1", True)]
    + [(address, False) for address in ("10.0.0.1", "::2", "::ffff:10.0.0.1", "", "localhost", "/run/socket")],
)
def test_loopback_addresses(address: str, *, loopback: bool) -> None:
    assert is_loopback(address) is loopback


def test_nothing_is_closed_while_there_is_room() -> None:
    guard: Guard[int] = Guard(1000, 100)
    for number in range(79):
        guard.arrive(number, "::1", 0.0)
    assert guard.take_idle(1000.0) == []


def test_longest_idle_connections_are_closed_under_pressure() -> None:
    guard: Guard[int] = Guard(1000, 100)
    for number in range(80):
        guard.arrive(number, "::1", 0.0)
    guard.touch(0, 5.0)
    guard.keep(1)  # became a WebSocket
    with capture_logs() as events:
        assert guard.take_idle(PRESSED_IDLE_SECS - 0.1) == []
        assert guard.take_idle(5.0) == list(range(2, 2 + MAX_CLOSED_AT_ONCE))
        assert guard.take_idle(5.0) == list(range(2 + MAX_CLOSED_AT_ONCE, 2 + 2 * MAX_CLOSED_AT_ONCE))
        assert 0 not in guard.take_idle(5.0)
        assert guard.take_idle(5.0) == []
        assert guard.take_idle(5.0 + PRESSED_IDLE_SECS) == [0]
    assert [(event["event"], event["open_connections"], event["max_connections"]) for event in events] == [
        ("keep-alive shortened", 80, 100)
    ]


def test_full_server_refuses_connections() -> None:
    guard: Guard[int] = Guard(1000, 2)
    verdicts = [guard.arrive(number, "::1", 0.0) for number in range(3)]
    assert verdicts == [Verdict.WELCOME, Verdict.WELCOME, Verdict.REFUSED]
    guard.leave(0)
    assert guard.arrive(3, "::1", 0.0) is Verdict.WELCOME
