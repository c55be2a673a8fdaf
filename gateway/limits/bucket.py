"""A token bucket (Turner, 1986): what may be used on average, and how much of it at once."""

from __future__ import annotations

import time
from collections.abc import Callable


class TokenBucket:
    """Fills at a rate, up to a size.

    Args:
        rate: what flows in, a second.
        size: what it holds.
        clock: tells seconds.
        level: what is there at first; it is full if not given.
    """

    def __init__(
        self, rate: float, size: float, clock: Callable[[], float] = time.monotonic, level: float | None = None
    ) -> None:
        self.rate = rate
        self.size = size
        self._clock = clock
        self._level = size if level is None else level
        self._as_of = clock()

    def take(self, amount: float) -> None:
        """Take something out, though it were more than there is: then the level is below 0 until it has flown in."""
        self._level = self.level - amount

    @property
    def level(self) -> float:
        """What is there now."""
        now = self._clock()
        self._level = min(self.size, self._level + (now - self._as_of) * self.rate)
        self._as_of = now
        return self._level
