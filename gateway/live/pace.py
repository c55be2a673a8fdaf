"""Decide how much audio a stream's next request has, and whether the request waits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from gateway.audio import RATE
from gateway.limits.bucket import TokenBucket

MAX_WINDOWS = 4
"""Maximum number of windows per request: a stream that is sent fast must not delay the requests of others."""

LEAD_SECS = 0.5
"""Lead over real time that a new stream may have without waiting, in seconds, such as speech from before the connection."""

MAX_BACKLOG_SECS = 60.0
"""Maximum late audio that is decoded at once, in seconds, such as after a pause of the network."""

MAX_LEAD_SECS = 2.0
"""Maximum lead that a stream is charged for, in seconds, so that a lead that it gained while alone does not delay it later."""


class Plan(NamedTuple):
    """The next request of a stream.

    Attributes:
        samples: number of samples in the request.
        cost_secs: audio that the stream's pace is charged for, in seconds.
        ahead_secs: lead of the stream over real time after the request, in seconds; above 0 it waits for its turn.
    """

    samples: int
    cost_secs: float
    ahead_secs: float


def plan(waiting: int, due: int, chunk: int, spare_secs: float, *, crowded: bool) -> Plan:
    """Return the next request: all waiting audio up to ``MAX_WINDOWS`` windows, or less while other streams are in real time.

    Args:
        waiting: number of samples in the buffer.
        due: number of samples that complete the next window.
        chunk: number of samples of each further window.
        spare_secs: audio that may be sent without a lead over real time, in seconds; negative while the stream is ahead.
        crowded: whether any stream is in real time; then a request has no window that a microphone cannot have filled.
    """
    windows = MAX_WINDOWS
    if crowded:
        windows = max(1, min(MAX_WINDOWS, 1 + int((spare_secs * RATE - due) / chunk)))
    samples = min(waiting, due + (windows - 1) * chunk)
    cost_secs = min(samples / RATE, spare_secs + MAX_LEAD_SECS)
    return Plan(samples, cost_secs, cost_secs - spare_secs)


class Pace:
    """Measures the lead of a stream over real time.

    Args:
        late_secs: audio that a resumed stream must send again or is late with, in seconds.
        clock: returns monotonic seconds.
    """

    def __init__(self, late_secs: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        level = min(MAX_BACKLOG_SECS, LEAD_SECS + late_secs)
        self._bucket = TokenBucket(1.0, MAX_BACKLOG_SECS, clock, level)  # seconds; a microphone makes one per second

    @property
    def spare_secs(self) -> float:
        """Audio that may be sent without a lead over real time, in seconds; negative while the stream is ahead."""
        return self._bucket.level

    def spend(self, plan: Plan) -> None:
        """Charge a request."""
        self._bucket.take(plan.cost_secs)
