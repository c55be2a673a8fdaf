"""Decide which connections may stay: by the client's address, and by how many are open."""

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
"""Maximum number of client addresses tracked; the least recently seen are forgotten."""

MAX_HEALTH_ONLY = 64
"""Maximum number of open connections beyond the connect rate, which may request ``/health`` only."""

PRESSED_SHARE = 0.8
"""Share of the allowed connections above which idle ones are closed."""

PRESSED_IDLE_SECS = 1.0
"""Keep-alive timeout above that share."""

MAX_CLOSED_AT_ONCE = 32
"""Maximum number of idle connections closed for one that arrives."""

PRESSURE_LOG_SECS = 10.0
"""Minimum interval between log events about too many connections."""

log = structlog.get_logger()
C = TypeVar("C")


class Verdict(Enum):
    """What becomes of a connection."""

    WELCOME = auto()
    HEALTH_ONLY = auto()
    REFUSED = auto()


class ConnectRates:
    """Limits how often each address connects.

    Args:
        rate: connections per second and address, on average; the burst is twice as many.
        exempt: whether an address is not limited.
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
        """Take back the count of a connection that requested ``/health`` only."""
        if bucket := self._buckets.get(address):
            bucket.take(-1)


class Guard(Generic[C]):
    """Decides which connections are accepted, and which are closed when too many are open.

    Args:
        connects_per_address: connections per second and client address, on average; the burst is twice as many.
        max_connections: connections that may be open at once.
        exempt: whether the connections of an address are not limited.
    """

    def __init__(self, connects_per_address: float, max_connections: int, exempt: Callable[[str], bool] | None = None) -> None:
        self._rates = ConnectRates(connects_per_address, exempt or is_loopback)
        self._max_connections = max_connections
        self._open: set[C] = set()
        self._health_only: set[C] = set()
        self._active_at: OrderedDict[C, float] = OrderedDict()  # of those that may be idle, the longest idle first
        self._logged_at = float("-inf")
        self.admit, self.refund = self._rates.admit, self._rates.refund

    def arrive(self, connection: C, address: str, now: float) -> Verdict:
        """Count a new connection, and return what becomes of it.

        Args:
            connection: the connection.
            address: of its client.
            now: seconds of a monotonic clock.
        """
        if len(self._open) >= self._max_connections:
            return Verdict.REFUSED
        verdict = Verdict.WELCOME if self._rates.admit(address) else Verdict.HEALTH_ONLY
        if verdict is Verdict.HEALTH_ONLY:
            if len(self._health_only) >= MAX_HEALTH_ONLY:
                return Verdict.REFUSED
            self._health_only.add(connection)
        self._open.add(connection)
        self._active_at[connection] = now
        return verdict

    def touch(self, connection: C, now: float) -> None:
        """Note that a connection is active."""
        if connection in self._active_at:
            self._active_at[connection] = now
            self._active_at.move_to_end(connection)

    def keep(self, connection: C) -> None:
        """Never take a connection for idle again."""
        self._active_at.pop(connection, None)

    def leave(self, connection: C) -> None:
        """Count a connection no longer."""
        self._open.discard(connection)
        self._health_only.discard(connection)
        self._active_at.pop(connection, None)

    def take_idle(self, now: float) -> list[C]:
        """Return the connections to close, the longest idle first; none unless most of those allowed are open."""
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
    """Return whether an address is of this machine; False if it is no IP address."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback
