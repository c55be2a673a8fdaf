"""Decisions about connections, with a scripted clock."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from gateway.limits.connects import MAX_CLOSED_AT_ONCE, MAX_EXCESS, PRESSED_IDLE_SECS, ConnectionLimits, Standing, is_loopback

FAR = "203.0.113.7"


def test_connections_beyond_the_rate_may_request_health_only() -> None:
    limits: ConnectionLimits[int] = ConnectionLimits(1, 1000)
    verdicts = [limits.arrive(number, FAR, 0.0) for number in range(3 + MAX_EXCESS)]
    assert verdicts == [Standing.COUNTED] * 2 + [Standing.EXCESS] * MAX_EXCESS + [Standing.REFUSED]
    limits.leave(2)
    assert limits.arrive(99, FAR, 0.0) is Standing.EXCESS


def test_connection_for_health_alone_makes_room_for_another() -> None:
    limits: ConnectionLimits[int] = ConnectionLimits(1, 1000)
    assert [limits.arrive(number, FAR, 0.0) for number in range(3)] == [Standing.COUNTED] * 2 + [Standing.EXCESS]
    assert limits.recount(FAR, Standing.COUNTED, health_only=True) is Standing.UNCOUNTED
    assert limits.arrive(3, FAR, 0.0) is Standing.COUNTED


@pytest.mark.parametrize(
    ("before", "health_only", "free", "after"),
    [
        (Standing.COUNTED, False, 0, Standing.COUNTED),
        (Standing.COUNTED, True, 0, Standing.UNCOUNTED),
        (Standing.UNCOUNTED, True, 0, Standing.UNCOUNTED),
        (Standing.UNCOUNTED, False, 1, Standing.COUNTED),
        (Standing.UNCOUNTED, False, 0, Standing.REFUSED),
        (Standing.EXCESS, True, 1, Standing.EXCESS),
        (Standing.EXCESS, False, 1, Standing.COUNTED),
        (Standing.EXCESS, False, 0, Standing.REFUSED),
    ],
)
def test_standing_after_a_request(before: Standing, health_only: bool, free: int, after: Standing) -> None:
    limits: ConnectionLimits[int] = ConnectionLimits(1, 1000)
    for number in range(2 - free):
        limits.arrive(number, FAR, 0.0)
    assert limits.recount(FAR, before, health_only=health_only) is after


def test_loopback_connections_have_no_rate() -> None:
    limits: ConnectionLimits[int] = ConnectionLimits(1, 1000)
    assert {limits.arrive(number, "127.0.0.1", 0.0) for number in range(500)} == {Standing.COUNTED}


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("::ffff:127.0.0.1", True)]
    + [(address, False) for address in ("10.0.0.1", "::2", "::ffff:10.0.0.1", "", "localhost", "/run/socket")],
)
def test_loopback_addresses(address: str, *, loopback: bool) -> None:
    assert is_loopback(address) is loopback


def test_nothing_is_closed_while_there_is_room() -> None:
    limits: ConnectionLimits[int] = ConnectionLimits(1000, 100)
    for number in range(79):
        limits.arrive(number, "::1", 0.0)
    assert limits.take_idle(1000.0) == []


def test_longest_idle_connections_are_closed_under_pressure() -> None:
    limits: ConnectionLimits[int] = ConnectionLimits(1000, 100)
    for number in range(80):
        limits.arrive(number, "::1", 0.0)
    limits.touch(0, 5.0)
    limits.keep(1)  # became a WebSocket
    with capture_logs() as events:
        assert limits.take_idle(PRESSED_IDLE_SECS - 0.1) == []
        assert limits.take_idle(5.0) == list(range(2, 2 + MAX_CLOSED_AT_ONCE))
        assert limits.take_idle(5.0) == list(range(2 + MAX_CLOSED_AT_ONCE, 2 + 2 * MAX_CLOSED_AT_ONCE))
        assert 0 not in limits.take_idle(5.0)
        assert limits.take_idle(5.0) == []
        assert limits.take_idle(5.0 + PRESSED_IDLE_SECS) == [0]
    assert [(event["event"], event["open_connections"], event["max_connections"]) for event in events] == [
        ("keep-alive shortened", 80, 100)
    ]


def test_full_server_refuses_connections() -> None:
    limits: ConnectionLimits[int] = ConnectionLimits(1000, 2)
    verdicts = [limits.arrive(number, "::1", 0.0) for number in range(3)]
    assert verdicts == [Standing.COUNTED, Standing.COUNTED, Standing.REFUSED]
    limits.leave(0)
    assert limits.arrive(3, "::1", 0.0) is Standing.COUNTED
