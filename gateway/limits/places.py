"""Places: how many streams and recordings the gateway serves at once.

Triton's sequence batcher has no limit of its own, so this is the only one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from gateway import metrics
from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind

MAX_QUEUE_SECS = 30.0
"""Maximum wait of a recording for a decoding place, in seconds: about the patience of HTTP clients."""


class CallerGoneError(Exception):
    """The caller left while its recording waited."""


class Place:
    """A place that is held.

    Args:
        free: called once, when it is released.
    """

    def __init__(self, free: Callable[[], None]) -> None:
        self._free: Callable[[], None] | None = free

    def release(self) -> None:
        """Give the place back, if that has not happened."""
        if free := self._free:
            self._free = None
            free()


class Places:
    """The places of one gateway.

    Args:
        settings: the gateway's.
        max_queue_secs: maximum wait of a recording for a decoding place.

    Attributes:
        streams, batches: number in flight; batches includes those that wait.
        draining: whether new work is refused.
    """

    def __init__(self, settings: Settings, max_queue_secs: float = MAX_QUEUE_SECS) -> None:
        self._max_streams = settings.max_concurrent_streams
        self._max_batches = settings.max_concurrent_batches
        self._max_waiting = settings.inference_queue_size
        self._max_queue_secs = max_queue_secs
        self._decoding = asyncio.Semaphore(self._max_batches)
        self.streams = 0
        self.batches = 0
        self.draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def stream(self) -> Iterator[Place]:
        """Hold a place for a stream, until the context is left or the place is released.

        Raises:
            ApiError: all places are taken, or the gateway drains.
        """
        self._refuse_while_draining()
        if self.full:
            raise ApiError(ErrorKind.NO_CAPACITY, f"all {self._max_streams} streams are in use; please retry")
        self.streams += 1
        self._report()
        place = Place(self._free_stream)
        try:
            yield place
        finally:
            place.release()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Hold a place in the queue of recordings, from when the body is there until the answer is made.

        Raises:
            ApiError: the queue is full, or the gateway drains.
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

    @asynccontextmanager
    async def decoding(self, caller_gone: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
        """Hold a place for Triton's work on a recording; wait for one while all are taken.

        Args:
            caller_gone: called only if the recording must wait; its result ends the wait.

        Raises:
            ApiError: the wait was longer than ``max_queue_secs``.
            CallerGoneError: the caller left during the wait.
        """
        if self._decoding.locked():
            await self._wait_for_decoding(caller_gone)
        else:
            await self._decoding.acquire()
        try:
            yield
        finally:
            self._decoding.release()

    async def _wait_for_decoding(self, caller_gone: Callable[[], Awaitable[object]]) -> None:
        place = asyncio.ensure_future(self._decoding.acquire())
        gone = asyncio.ensure_future(caller_gone())
        try:
            await asyncio.wait({place, gone}, timeout=self._max_queue_secs, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if not place.cancel():
                self._decoding.release()  # it was acquired in the same turn of the event loop
            raise
        finally:
            gone.cancel()
        if not place.done():
            place.cancel()
            if gone.done():
                raise CallerGoneError
            raise ApiError(ErrorKind.NO_CAPACITY, f"no place came free within {self._max_queue_secs:g} s; please retry")

    @property
    def full(self) -> bool:
        """Whether all places for streams are taken."""
        return self.streams >= self._max_streams

    def drain(self) -> None:
        """Refuse new work from now on."""
        self.draining = True
        metrics.DRAINING.set(1)

    async def wait_idle(self, timeout_secs: float) -> bool:
        """Wait until nothing is in flight; return False if something still is after the timeout."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_secs)
        except asyncio.TimeoutError:
            return False
        return True

    def _free_stream(self) -> None:
        self.streams -= 1
        self._report()

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
