"""Decide which stream loses its place when all are taken and another one wants to begin."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Holder(Protocol):
    """A stream that holds a place."""

    @property
    def silent_secs(self) -> float:
        """Time since its last audio, or since its start, in seconds."""


H = TypeVar("H", bound=Holder)


def longest_silent(holders: Iterable[H], min_secs: float) -> H | None:
    """Return the holder that has sent no audio for the longest time.

    Keepalives don't count as audio: a client that only sends those would hold a place for ever.

    Args:
        holders: streams that hold a place.
        min_secs: a holder keeps its place for at least this time without audio.

    Returns:
        None if every holder has sent audio within ``min_secs``.
    """
    silent = max(holders, key=lambda holder: holder.silent_secs, default=None)
    return silent if silent is not None and silent.silent_secs >= min_secs else None
