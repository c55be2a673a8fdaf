"""Pace of a stream: how much audio its next request carries, and whether the request may go at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from gateway.audio import RATE
from gateway.limits.bucket import TokenBucket

MAX_WINDOWS = 4
"""Maximum number of windows per request: a stream that is sent fast must not delay the requests of others."""

LEAD_SECS = 0.5
"""Audio that a new stream may have decoded ahead of real time, in seconds, such as speech from before the connection."""

MAX_BACKLOG_SECS = 60.0
"""Maximum late audio that is decoded at once, in seconds, as after a pause of the network."""

MAX_LEAD_SECS = 2.0
"""Maximum lead that a stream is charged for, in seconds: what it gained while it was alone is not held against it."""


class Plan(NamedTuple):
    """A request to come.

    Attributes:
        samples: audio that it carries.
        cost_secs: audio that the stream's pace is charged for, in seconds.
        ahead_secs: how far the request gets the stream ahead of real time, in seconds; above 0 it waits for its turn.
    """

    samples: int
    cost_secs: float
    ahead_secs: float


def plan(waiting: int, due: int, chunk: int, spare_secs: float, *, crowded: bool) -> Plan:
    """Decide what the next request carries.

    Args:
        waiting: samples in the buffer.
        due: samples that complete the next window.
        chunk: samples of each further window.
        spare_secs: audio that the stream may send and still be in real time, in seconds; negative while it is ahead.
        crowded: whether some stream is in real time; a request then carries no window that a microphone can't have filled.

    Returns:
        All of the audio up to ``MAX_WINDOWS`` windows, or less if the stream would get ahead of others.
    """
    windows = MAX_WINDOWS
    if crowded:
        windows = max(1, min(MAX_WINDOWS, 1 + int((spare_secs * RATE - due) / chunk)))
    samples = min(waiting, due + (windows - 1) * chunk)
    cost_secs = min(samples / RATE, spare_secs + MAX_LEAD_SECS)
    return Plan(samples, cost_secs, cost_secs - spare_secs)


class Pace:
    """How much audio a stream may send and still be in real time.

    Args:
        late_secs: audio that a resumed stream has to send again or is late with, in seconds.
        clock: monotonic time in seconds.
    """

    def __init__(self, late_secs: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        level = min(MAX_BACKLOG_SECS, LEAD_SECS + late_secs)
        self._bucket = TokenBucket(1.0, MAX_BACKLOG_SECS, clock, level)  # seconds; a microphone makes one per second

    @property
    def spare_secs(self) -> float:
        """Audio that may be sent now, in seconds; negative while the stream is ahead of real time."""
        return self._bucket.level

    def spend(self, plan: Plan) -> None:
        """Charge a request."""
        self._bucket.take(plan.cost_secs)
