"""Token bucket (Turner, 1986): limits an average rate and the size of a burst."""

from __future__ import annotations

import time
from collections.abc import Callable


class TokenBucket:
    """A bucket that fills at a constant rate, up to its size.

    Args:
        rate: tokens added per second.
        size: maximum number of tokens.
        clock: returns monotonic seconds.
        level: number of tokens at the start; default: ``size``.
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
        """Take tokens, even more than there are; the level is then negative until enough were added."""
        self._level = self.level - amount

    @property
    def level(self) -> float:
        """Current number of tokens."""
        now = self._clock()
        self._level = min(self.size, self._level + (now - self._as_of) * self.rate)
        self._as_of = now
        return self._level
