"""Limit connections: by the client's address, and by the number of open connections."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum, auto
from ipaddress import ip_address
from typing import Generic, TypeVar

import structlog

from gateway.limits.bucket import TokenBucket

MAX_ADDRESSES = 10_000
"""Maximum number of client addresses tracked (LRU)."""

MAX_EXCESS = 64
"""Maximum number of open connections beyond the connect rate; they may request only ``/health``."""

PRESSED_SHARE = 0.8
"""Share of the allowed connections above which idle ones are closed."""

PRESSED_IDLE_SECS = 1.0
"""Keep-alive timeout above ``PRESSED_SHARE``."""

MAX_CLOSED_AT_ONCE = 32
"""Maximum number of idle connections that are closed when one arrives."""

PRESSURE_LOG_SECS = 10.0
"""Minimum interval between log events about too many connections."""

log = structlog.get_logger()
C = TypeVar("C")


class Standing(Enum):
    """Standing of a connection with the connect rate of its address.

    COUNTED: it counts, and may request anything.
    UNCOUNTED: it has requested only ``/health``, and no longer counts.
    EXCESS: it is beyond the rate; it may send one request, for ``/health``.
    REFUSED: it must be aborted.
    """

    COUNTED = auto()
    UNCOUNTED = auto()
    EXCESS = auto()
    REFUSED = auto()


class ConnectRates:
    """Limits the connections per second of each address.

    Args:
        rate: average connections per second and address; the burst is twice as many.
        exempt: returns whether an address is not limited.
    """

    def __init__(self, rate: float, exempt: Callable[[str], bool]) -> None:
        self._rate = rate
        self._exempt = exempt
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def admit(self, address: str) -> bool:
        """Count a connection of this address, and return whether it is within the rate."""
        if self._exempt(address):
            return True
        bucket = self._buckets.pop(address, None) or TokenBucket(self._rate, 2 * self._rate)
        self._buckets[address] = bucket
        if len(self._buckets) > MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        if bucket.level < 1:
            return False
        bucket.take(1)
        return True

    def refund(self, address: str) -> None:
        """Take back the count of a connection."""
        if bucket := self._buckets.get(address):
            bucket.take(-1)


class ConnectionLimits(Generic[C]):
    """Decides which connections are accepted, and which are closed when too many are open.

    Args:
        connects_per_address: average connections per second and client address; the burst is twice as many.
        max_connections: maximum number of open connections.
        exempt: returns whether the connect rate of an address is not limited; by default for loopback addresses.
    """

    def __init__(self, connects_per_address: float, max_connections: int, exempt: Callable[[str], bool] | None = None) -> None:
        self._rates = ConnectRates(connects_per_address, exempt or is_loopback)
        self._max_connections = max_connections
        self._open: set[C] = set()
        self._excess: set[C] = set()
        self._active_at: OrderedDict[C, float] = OrderedDict()  # of those that may be idle, the longest idle first
        self._logged_at = float("-inf")

    def arrive(self, connection: C, address: str, now: float) -> Standing:
        """Count a new connection, and return its standing: COUNTED, EXCESS or REFUSED.

        Args:
            connection: the connection.
            address: address of its client.
            now: seconds of a monotonic clock.
        """
        if len(self._open) >= self._max_connections:
            return Standing.REFUSED
        standing = Standing.COUNTED if self._rates.admit(address) else Standing.EXCESS
        if standing is Standing.EXCESS:
            if len(self._excess) >= MAX_EXCESS:
                return Standing.REFUSED
            self._excess.add(connection)
        self._open.add(connection)
        self._active_at[connection] = now
        return standing

    def recount(self, address: str, standing: Standing, *, health_only: bool) -> Standing:
        """Return the standing of a connection after the head of a request.

        Args:
            address: address of its client.
            standing: its standing before.
            health_only: whether it has requested only ``/health`` so far.
        """
        if health_only:
            if standing is Standing.COUNTED:
                self._rates.refund(address)
                return Standing.UNCOUNTED
            return standing
        if standing is Standing.COUNTED or self._rates.admit(address):
            return Standing.COUNTED
        return Standing.REFUSED

    def touch(self, connection: C, now: float) -> None:
        """Record that a connection is active."""
        if connection in self._active_at:
            self._active_at[connection] = now
            self._active_at.move_to_end(connection)

    def keep(self, connection: C) -> None:
        """Never treat a connection as idle again."""
        self._active_at.pop(connection, None)

    def leave(self, connection: C) -> None:
        """Remove a connection from all counts."""
        self._open.discard(connection)
        self._excess.discard(connection)
        self._active_at.pop(connection, None)

    def take_idle(self, now: float) -> list[C]:
        """Return idle connections to close, the longest idle first; none below ``PRESSED_SHARE``."""
        if len(self._open) < PRESSED_SHARE * self._max_connections:
            return []
        due = itertools.takewhile(lambda item: now - item[1] >= PRESSED_IDLE_SECS, self._active_at.items())
        idle = [connection for connection, _ in itertools.islice(due, MAX_CLOSED_AT_ONCE)]
        for connection in idle:
            del self._active_at[connection]
        if now >= self._logged_at + PRESSURE_LOG_SECS:
            self._logged_at = now
            log.warning(
                "keep-alive shortened",
                open_connections=len(self._open),
                max_connections=self._max_connections,
                advice="raise the limit on open files (ulimit -n)",
            )
        return idle


def is_loopback(address: str) -> bool:
    """Return whether an address is a loopback address; False if it is not an IP address."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback
