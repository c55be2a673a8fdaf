"""Quotas of API keys and client addresses: concurrent streams and batch requests, and audio per second."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.limits.auth import ANONYMOUS
from gateway.limits.bucket import TokenBucket

BURST_SECS = 60.0
"""Time whose audio, at the maximum rate, a caller may send in one burst, in seconds."""


class InUse:
    """Counts items in use by key.

    Args:
        limit: maximum number of items in use per key; None: no limit.
        what: name of the items in the plural, for messages.
    """

    def __init__(self, limit: int | None, what: str) -> None:
        self._limit = limit
        self._what = what
        self._counts: Counter[Hashable] = Counter()

    @contextmanager
    def hold(self, key: Hashable | None) -> Iterator[None]:
        """Hold one item of a key; the key None has no limit.

        Raises:
            ApiError: all items of the key are in use.
        """
        if key is None or self._limit is None:
            yield
            return
        if self._counts[key] >= self._limit:
            raise ApiError(ErrorKind.QUOTA_EXCEEDED, f"all {self._limit} {self._what} are in use; please retry")
        self._counts[key] += 1
        try:
            yield
        finally:
            self._counts[key] -= 1
            if not self._counts[key]:
                del self._counts[key]


class Quotas:
    """Quotas of all callers, and their use.

    Args:
        settings: settings of the gateway.
        clock: returns monotonic seconds.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._audio_rate = settings.max_audio_rate_per_key
        self._clock = clock
        self._streams_of_key = InUse(settings.max_streams_per_key, "streams of this key")
        self._streams_of_address = InUse(settings.max_streams_per_address, "streams of this address")
        self._batches_of_key = InUse(settings.max_batches_per_key, "batch requests of this key")
        self._batches_of_address = InUse(settings.max_batches_per_address, "batch requests of this address")
        self._audio: dict[int, TokenBucket] = {}  # seconds of audio

    @contextmanager
    def stream(self, caller: int, address: str | None = None) -> Iterator[None]:
        """Hold a stream of a caller and a client address.

        Raises:
            ApiError: all of them are in use.
        """
        key = None if caller == ANONYMOUS else caller
        with self._streams_of_key.hold(key), self._streams_of_address.hold(address):
            yield

    @contextmanager
    def batch(self, caller: int, address: str | None = None) -> Iterator[None]:
        """Hold a batch request of a caller and a client address, from its head to the response.

        Raises:
            ApiError: all of them are in use.
        """
        key = None if caller == ANONYMOUS else caller
        with self._batches_of_key.hold(key), self._batches_of_address.hold(address):
            yield

    def spend(self, caller: int, audio_secs: float, *, owe: bool = False) -> None:
        """Charge audio to a caller; the last piece may exceed what is left.

        Args:
            caller: caller who is charged.
            audio_secs: length of the audio in seconds.
            owe: whether the caller may exceed its quota; the excess delays its next recording or stream.

        Raises:
            ApiError: nothing is left, and the caller may not owe.
        """
        if caller == ANONYMOUS or self._audio_rate is None:
            return
        bucket = self._audio.get(caller)
        if bucket is None:
            bucket = self._audio[caller] = TokenBucket(self._audio_rate, self._audio_rate * BURST_SECS, self._clock)
        if not owe and (left := bucket.level) <= 0:
            error = ApiError(
                ErrorKind.QUOTA_EXCEEDED, f"this key may send {self._audio_rate:g} s of audio per second, and has sent more"
            )
            error.retry_after_secs = 1.0 - left / self._audio_rate
            raise error
        bucket.take(audio_secs)


class Bill:
    """Charges one recording to its caller as it is read.

    The first block is refused if nothing is left. A recording that has begun goes on: a part of a transcript is useless.

    Args:
        quotas: quotas of the gateway.
        caller: caller who is charged.
    """

    def __init__(self, quotas: Quotas, caller: int) -> None:
        self._quotas = quotas
        self._caller = caller
        self._begun = False

    def add(self, audio_secs: float) -> None:
        """Charge more of the recording.

        Raises:
            ApiError: nothing was left for the first block.
        """
        self._quotas.spend(self._caller, audio_secs, owe=self._begun)
        self._begun = True
