"""A circuit breaker: an endpoint that keeps failing gets no new work until one trial shows that it is well again.

The pattern is Nygard's ("Release It!", 2007). It decides only where new sequences go: a live one stays where its state is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum

WINDOW_CALLS = 20
"""So many of the last outcomes count."""

MIN_FAILURES = 5
FAILURE_SHARE = 0.5
"""It opens at so many failures in the window, if they are this share of it."""

OPEN_SECS = 2.0
"""It stays open for so long, and a trial that does not report for so long is given up."""


class BreakerState(IntEnum):
    """The values are those of the metric."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """The breaker of one endpoint.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._outcomes: deque[bool] = deque(maxlen=WINDOW_CALLS)
        self._opened_at: float | None = None
        self._trial_at: float | None = None

    @property
    def state(self) -> BreakerState:
        """Closed: all may pass; half-open: one at a time, as a trial; open: none."""
        if self._opened_at is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._clock() - self._opened_at < OPEN_SECS else BreakerState.HALF_OPEN

    @property
    def would_allow(self) -> bool:
        """What ``allow`` would answer now."""
        trial_runs = self._trial_at is not None and self._clock() - self._trial_at < OPEN_SECS
        return self.state is BreakerState.CLOSED or (self.state is BreakerState.HALF_OPEN and not trial_runs)

    def allow(self) -> bool:
        """Whether new work may go to the endpoint; when half-open, whoever is allowed is the trial."""
        allowed = self.would_allow
        if allowed and self.state is BreakerState.HALF_OPEN:
            self._trial_at = self._clock()
        return allowed

    def record(self, *, success: bool) -> None:
        """Take the outcome of a call; a slow one is no success."""
        state = self.state
        if state is BreakerState.OPEN:
            return
        if state is BreakerState.HALF_OPEN:
            self._trial_at = None
            self._outcomes.clear()
            self._opened_at = None if success else self._clock()
            return
        self._outcomes.append(success)
        failures = self._outcomes.count(False)
        if failures >= max(MIN_FAILURES, FAILURE_SHARE * len(self._outcomes)):
            self._opened_at = self._clock()
