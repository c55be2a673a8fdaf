"""Quotas of each API key: concurrent streams, and audio per second."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.limits.auth import ANONYMOUS
from gateway.limits.bucket import TokenBucket

BURST_SECS = 60.0
"""Burst of a caller that was silent: the audio that its rate allows in this time, in seconds."""


class Quotas:
    """What each caller uses of its quota.

    Args:
        settings: the gateway's.
        clock: monotonic time in seconds.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_streams = settings.max_streams_per_key
        self._audio_rate = settings.max_audio_rate_per_key
        self._clock = clock
        self._streams: Counter[int] = Counter()
        self._audio: dict[int, TokenBucket] = {}  # seconds of audio

    @contextmanager
    def stream(self, caller: int) -> Iterator[None]:
        """Hold one of the caller's streams.

        Raises:
            ApiError: all of them are in use.
        """
        if caller != ANONYMOUS and self._max_streams is not None and self._streams[caller] >= self._max_streams:
            raise ApiError(ErrorKind.QUOTA_EXCEEDED, f"all {self._max_streams} streams of this key are in use; please retry")
        self._streams[caller] += 1
        try:
            yield
        finally:
            self._streams[caller] -= 1

    def spend(self, caller: int, audio_secs: float) -> None:
        """Charge audio to a caller; the last piece may exceed what is left.

        Raises:
            ApiError: nothing is left.
        """
        if caller == ANONYMOUS or self._audio_rate is None:
            return
        bucket = self._audio.get(caller)
        if bucket is None:
            bucket = self._audio[caller] = TokenBucket(self._audio_rate, self._audio_rate * BURST_SECS, self._clock)
        if (left := bucket.level) <= 0:
            error = ApiError(
                ErrorKind.QUOTA_EXCEEDED, f"this key may send {self._audio_rate:g} s of audio per second, and has sent more"
            )
            error.retry_after_secs = 1.0 - left / self._audio_rate
            raise error
        bucket.take(audio_secs)
