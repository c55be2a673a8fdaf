"""Decide which windows the next encoder call takes, and when the next decoder call starts. The functions have no effects.

Times are seconds of one monotonic clock, such as the event loop's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from windows import Window

RECORDING_PATIENCE_SECS = 2.0
"""Time during which live windows overtake a recording's window, so that many streams cannot starve recordings."""

LIVE_SECS = 2.0
"""Time since the last live window during which recordings leave one encoder call free for live windows."""

EXCLUSIVE_AFTER_SECS = 1.0
"""Time without two windows at once after which a call may use the encoder that takes all cores."""

GATHER_SECS = 0.5
"""Maximum delay of a recording's row to share its decoder calls. A call costs little more for many rows than for one."""


@dataclass(frozen=True, eq=False)
class Queued:
    """A window that waits for an encoder call.

    Attributes:
        window: the window.
        due: position in the queue: windows are encoded in the order of this time.
    """

    window: Window
    due: float

    @classmethod
    def at(cls, now: float, window: Window) -> Queued:
        """Return the queue entry of a window that arrives now."""
        return cls(window, now if window.live else now + RECORDING_PATIENCE_SECS)

    def can_share(self, other: Queued) -> bool:
        """Return whether both may share a call."""
        return self.window.kind == other.window.kind


@dataclass(frozen=True)
class Occupancy:
    """Load of the encoder.

    Attributes:
        calls: maximum number of calls that run at once.
        running: number of running calls.
        running_recordings: number of running calls with windows of recordings.
        last_live_at: arrival time of the last live window.
    """

    calls: int
    running: int
    running_recordings: int
    last_live_at: float


def choose(
    queue: Iterable[Queued], occupancy: Occupancy, now: float, windows_per_call: Callable[[int], int]
) -> Sequence[Queued]:
    """Return the windows that the next encoder call takes; empty if no call may start.

    The rules, in this order:

    1. At most ``occupancy.calls`` calls run at once.
    2. Recordings leave one call free for ``LIVE_SECS`` after a live window, unless there is only one call.
    3. The window with the earliest ``due`` goes first. This is the arrival time for a live window, and
       ``RECORDING_PATIENCE_SECS`` later for a recording's window.
    4. The call takes further windows that can share it, at most ``windows_per_call`` of their length in samples. Windows are
       spread over all free calls first: two parallel calls finish before one call with all windows.
    """
    free = occupancy.calls - occupancy.running
    if free <= 0:
        return []
    reserved = 1 if now - occupancy.last_live_at < LIVE_SECS else 0
    recordings_allowed = occupancy.running_recordings < max(1, occupancy.calls - reserved)
    in_order = sorted(queue, key=lambda queued: queued.due)
    first = next((queued for queued in in_order if queued.window.live or recordings_allowed), None)
    if first is None:
        return []
    sharing = [queued for queued in in_order if queued.can_share(first)]
    share = -(-len(sharing) // free)
    return sharing[: min(windows_per_call(len(first.window.samples)), share)]


def is_exclusive(last_met_at: float, now: float) -> bool:
    """Return whether a call may use the encoder that takes all cores: no two windows met for ``EXCLUSIVE_AFTER_SECS``."""
    return now - last_met_at >= EXCLUSIVE_AFTER_SECS


def next_decoder_call(waits_until: Iterable[float], now: float, *, rows_are_coming: bool) -> float:
    """Return the start of the next decoder call; ``now`` means at once.

    Rows wait only while more rows are certain to arrive, and only until the first of them may wait no longer.

    Args:
        waits_until: for each row, the latest start of its next call; not empty. A live row does not wait, so this is its
            arrival.
        now: the current time.
        rows_are_coming: whether more rows are certain to arrive.
    """
    return max(now, min(waits_until)) if rows_are_coming else now
