"""Circuit breaker (Nygard, "Release It!", 2007): an endpoint that keeps failing gets no new sequences until a probe succeeds.

Open sequences stay on their endpoint, which has their state.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum

WINDOW_CALLS = 20
"""Number of recent calls that the breaker counts."""

MIN_FAILURES = 5
FAILURE_SHARE = 0.5
"""The breaker opens at this many failures in the window, if they are at least this share of it."""

OPEN_SECS = 2.0
"""Time for which the breaker stays open, and timeout of a half-open probe."""


class BreakerState(IntEnum):
    """State of a breaker, with the values of the metric ``asr_circuit_breaker_state``."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """The breaker of one endpoint.

    Args:
        clock: returns monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._outcomes: deque[bool] = deque(maxlen=WINDOW_CALLS)
        self._opened_at: float | None = None
        self._probe_at: float | None = None

    @property
    def state(self) -> BreakerState:
        """CLOSED allows all sequences, HALF_OPEN one at a time as a probe, OPEN none."""
        if self._opened_at is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if self._clock() - self._opened_at < OPEN_SECS else BreakerState.HALF_OPEN

    @property
    def would_allow(self) -> bool:
        """Whether ``allow`` would return true now."""
        probe_runs = self._probe_at is not None and self._clock() - self._probe_at < OPEN_SECS
        return self.state is BreakerState.CLOSED or (self.state is BreakerState.HALF_OPEN and not probe_runs)

    def allow(self) -> bool:
        """Return whether a new sequence may go to the endpoint; in state HALF_OPEN, this sequence is the probe."""
        allowed = self.would_allow
        if allowed and self.state is BreakerState.HALF_OPEN:
            self._probe_at = self._clock()
        return allowed

    def record(self, *, success: bool) -> None:
        """Record the outcome of a call.

        Args:
            success: whether the call succeeded in time.
        """
        state = self.state
        if state is BreakerState.OPEN:
            return
        if state is BreakerState.HALF_OPEN:
            self._probe_at = None
            self._outcomes.clear()
            self._opened_at = None if success else self._clock()
            return
        self._outcomes.append(success)
        failures = self._outcomes.count(False)
        if failures >= max(MIN_FAILURES, FAILURE_SHARE * len(self._outcomes)):
            self._opened_at = self._clock()
