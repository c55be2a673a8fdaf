"""Who may use the server, and how much at once."""

from __future__ import annotations

import asyncio
import hmac
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from starlette.datastructures import Headers

from gateway import metrics
from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.limits.bucket import TokenBucket

ANYBODY = -1
"""The caller where no keys are asked for."""

BURST_SECS = 60.0
"""A caller that was quiet may send at once what it may send in this time."""

MOST_BUSY = 0.3
"""Streams get ahead of real time only while those in real time have a request at Triton for less than this of the time."""

BUSY_SECS, BUSY_POLL_SECS = 5.0, 0.1
"""Over which time that is looked at, and how often by who waits for it."""


def check_key(headers: Headers, settings: Settings) -> int:
    """Hold the request's key against those of the settings; without any there, everybody may.

    Returns:
        The caller: its key's place among those of the settings.

    Raises:
        ApiError: the key is missing or wrong.
    """
    if not settings.api_keys:
        return ANYBODY
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    if not given:
        raise ApiError(ErrorKind.INVALID_API_KEY, "an API key is needed: send Authorization: Bearer KEY or X-API-Key: KEY")
    # Every key is compared, each in constant time, so that the time taken tells nothing.
    matches = [hmac.compare_digest(given.encode(), key.get_secret_value().encode()) for key in settings.api_keys]
    if not any(matches):
        raise ApiError(ErrorKind.INVALID_API_KEY, "the API key is not valid")
    return matches.index(True)


def origin_allowed(origin: str, settings: Settings) -> bool:
    """Whether a browser's page from this origin may connect."""
    return "*" in settings.allowed_origins or origin in settings.allowed_origins


class Quotas:
    """What each key may use: streams at once, and seconds of audio a second."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_streams = settings.max_streams_per_key
        self._audio_rate = settings.max_audio_rate_per_key
        self._clock = clock
        self._streams: Counter[int] = Counter()
        self._audio: dict[int, TokenBucket] = {}  # seconds

    @contextmanager
    def stream(self, caller: int) -> Iterator[None]:
        """Hold one of the caller's streams.

        Raises:
            ApiError: it has no more.
        """
        if caller != ANYBODY and self._max_streams is not None and self._streams[caller] >= self._max_streams:
            raise ApiError(ErrorKind.QUOTA_EXCEEDED, f"all {self._max_streams} streams of this key are in use; please retry")
        self._streams[caller] += 1
        try:
            yield
        finally:
            self._streams[caller] -= 1

    def spend(self, caller: int, audio_secs: float) -> None:
        """Take audio off what the caller may send; the last piece may be larger than what is left.

        Raises:
            ApiError: nothing is left.
        """
        if caller == ANYBODY or self._audio_rate is None:
            return
        bucket = self._audio.get(caller)
        if bucket is None:
            bucket = self._audio[caller] = TokenBucket(self._audio_rate, self._audio_rate * BURST_SECS, self._clock)
        if (left := bucket.level) <= 0:
            error = ApiError(
                ErrorKind.QUOTA_EXCEEDED, f"this key may send {self._audio_rate:g} s of audio a second, and has sent more"
            )
            error.retry_after_secs = 1.0 - left / self._audio_rate
            raise error
        bucket.take(audio_secs)


class Admission:
    """Places for streams and batches. Triton's sequence batcher has no limit of its own, so this is the only one.

    Attributes:
        streams, batches: how many are in flight.
        batch_places: held by a batch request while Triton works on it.
        draining: nothing more is admitted.
        ahead: how many of the streams are sent faster than real time.
    """

    def __init__(self, settings: Settings) -> None:
        self._max_streams = settings.max_concurrent_streams
        self._max_batches = settings.max_concurrent_batches
        self._max_waiting = settings.inference_queue_size
        self.batch_places = asyncio.Semaphore(self._max_batches)
        self.streams = 0
        self.batches = 0
        self.draining = False
        self.ahead = 0
        self._line = asyncio.Lock()
        self._next_turn_at = 0.0
        self._at_triton = 0  # requests of streams in real time
        self._busy = 0.0
        self._looked_at = time.monotonic()
        self._calm = asyncio.Event()
        self._calm.set()
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def stream(self) -> Iterator[None]:
        """Hold a place for a stream.

        Raises:
            ApiError: there is none, or the server drains.
        """
        self._refuse_while_draining()
        if self.streams >= self._max_streams:
            raise ApiError(ErrorKind.NO_CAPACITY, f"all {self._max_streams} streams are in use; please retry")
        self.streams += 1
        self._report()
        try:
            yield
        finally:
            self.streams -= 1
            self._report()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Hold a place in the line of batch requests, while the body is read and until the answer is there.

        Raises:
            ApiError: the line is full, or the server drains.
        """
        self._refuse_while_draining()
        if self.batches >= self._max_batches + self._max_waiting:
            raise ApiError(
                ErrorKind.NO_CAPACITY,
                f"{self._max_batches} batch requests are being answered and {self._max_waiting} wait; please retry",
            )
        self.batches += 1
        self._report()
        try:
            yield
        finally:
            self.batches -= 1
            self._report()

    @property
    def crowded(self) -> bool:
        """Whether there are streams besides those that are sent faster than real time."""
        return self.streams > self.ahead

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Mark that a stream in real time has a request at Triton."""
        self._look_how_busy()
        self._at_triton += 1
        self._calm.clear()
        try:
            yield
        finally:
            self._look_how_busy()
            self._at_triton -= 1
            if not self._at_triton:
                self._calm.set()

    @asynccontextmanager
    async def turn(self, patience_secs: float) -> AsyncIterator[None]:
        """Wait for the turn of a stream that is sent faster than real time, as long as there are others.

        One at a time has a request at Triton; it is sent when no stream in real time has one, and had one for at most
        ``MOST_BUSY`` of the time of late, and not before Triton was left alone for as long as the last one took.

        Args:
            patience_secs: by so much the stream is ahead; after this time it waits no more, since it is in real time again.
        """
        if not self.crowded:
            yield
            return
        try:
            await asyncio.wait_for(self._take_turn(), patience_secs)
        except asyncio.TimeoutError:
            with self.at_once():
                yield
            return
        began = time.monotonic()
        try:
            yield
        finally:
            now = time.monotonic()
            self._next_turn_at = now + (now - began)
            self._line.release()

    async def _take_turn(self) -> None:
        await self._line.acquire()
        try:
            await asyncio.sleep(self._next_turn_at - time.monotonic())
            await self._calm.wait()
            while self._look_how_busy() > MOST_BUSY:
                await asyncio.sleep(BUSY_POLL_SECS)
                await self._calm.wait()
        except asyncio.CancelledError:
            self._line.release()
            raise

    def _look_how_busy(self) -> float:
        """Which part of the last time streams in real time had a request at Triton, by an exponential mean."""
        now = time.monotonic()
        old = math.exp((self._looked_at - now) / BUSY_SECS)
        self._busy = old * self._busy + (1 - old) * (self._at_triton > 0)
        self._looked_at = now
        return self._busy

    def drain(self) -> None:
        """Admit nothing more."""
        self.draining = True
        metrics.DRAINING.set(1)

    async def wait_idle(self, timeout_secs: float) -> bool:
        """Wait until nothing is in flight; False if something still was when the time was over."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_secs)
        except asyncio.TimeoutError:
            return False
        return True

    def _refuse_while_draining(self) -> None:
        if self.draining:
            raise ApiError(ErrorKind.DRAINING, "the server is shutting down; please retry")

    def _report(self) -> None:
        metrics.ACTIVE_CONNECTIONS.set(self.streams)
        metrics.ACTIVE_BATCHES.set(self.batches)
        if self.streams or self.batches:
            self._idle.clear()
        else:
            self._idle.set()
