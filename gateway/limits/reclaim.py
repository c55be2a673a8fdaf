"""Choose the stream that loses its place to a new stream when all places are in use."""

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
    """Return the holder that has sent no audio for the longest time; None if all have sent audio within ``min_secs``.

    Keepalives do not count as audio: a client that sends only keepalives would hold a place for ever.

    Args:
        holders: streams that hold a place.
        min_secs: minimum time without audio after which a holder may lose its place.
    """
    silent = max(holders, key=lambda holder: holder.silent_secs, default=None)
    return silent if silent is not None and silent.silent_secs >= min_secs else None
