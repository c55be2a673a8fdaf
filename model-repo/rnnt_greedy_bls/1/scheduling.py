"""Which windows the next encoder call takes, and when the next decoder call starts: decisions without effects.

Times are seconds of one monotonic clock, such as the event loop's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from stream import Window

RECORDING_PATIENCE_SECS = 2.0
"""How long live windows overtake a recording's window. Then it takes its turn, or many streams would starve it."""

LIVE_SECS = 2.0
"""While a live window arrived within this time, recordings leave one encoder call to live windows."""

EXCLUSIVE_AFTER_SECS = 1.0
"""A window has the encoder to itself if no two windows met within this time."""

GATHER_SECS = 0.5
"""Maximum delay of a recording's row to share its decoder calls: a call costs little more for many rows than for one."""


@dataclass(frozen=True, eq=False)
class Queued:
    """A window that waits for an encoder call.

    Attributes:
        window: its audio.
        due: when it may be encoded at the latest without being late; windows are encoded in this order.
    """

    window: Window
    due: float

    @classmethod
    def at(cls, now: float, window: Window) -> Queued:
        """Return a window that arrives now."""
        return cls(window, now if window.live else now + RECORDING_PATIENCE_SECS)

    def can_share(self, other: Queued) -> bool:
        """Whether both may share a call: only windows of one kind and length do, since padding costs more than it saves."""
        return (self.window.live, len(self.window.samples)) == (other.window.live, len(other.window.samples))


@dataclass(frozen=True)
class Occupancy:
    """How busy the encoder is.

    Attributes:
        calls: number of calls that may run at once.
        running: number of calls that run.
        running_recordings: how many of these encode recordings.
        last_live_at: when the last live window arrived.
    """

    calls: int
    running: int
    running_recordings: int
    last_live_at: float


def choose(
    queue: Iterable[Queued], occupancy: Occupancy, now: float, windows_per_call: Callable[[int], int]
) -> Sequence[Queued]:
    """Return the windows that the next encoder call takes; none where no call may start.

    The rules, in this order:

    1. No more than ``occupancy.calls`` calls run at once.
    2. While a live window arrived within ``LIVE_SECS``, recordings leave one call free, unless there is only one.
    3. The window that is due first goes first: live windows when they arrive, recordings ``RECORDING_PATIENCE_SECS`` later.
    4. Windows that can share its call do, as far as ``windows_per_call`` of their samples allows. They are spread over the free
       calls first: two calls side by side finish before one with all windows.
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
    """Whether a call may use the encoder that takes all cores: no two windows met for ``EXCLUSIVE_AFTER_SECS``."""
    return now - last_met_at >= EXCLUSIVE_AFTER_SECS


def next_decoder_call(due: Iterable[float], rows_are_coming: bool) -> float:
    """Return when the next decoder call starts.

    Args:
        due: for each row that waits, until when it may wait for others; not empty.
        rows_are_coming: whether more rows are certain to arrive. A row waits for nothing else.
    """
    return min(due) if rows_are_coming else 0.0
