"""Places: limits on the streams and recordings that the gateway serves at once.

Triton's sequence batcher has no limit of its own, so this is the only one.

A recording is decoded in pieces, each of which needs a decoding place. A free place goes to the recording with the fewest
pieces in flight, and among equals to the one that has waited longest. So a recording of hours has all places while it is alone,
and one of some seconds waits for the end of one piece at most.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from gateway import metrics
from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind

MAX_QUEUE_SECS = 30.0
"""Maximum wait of a recording for its first decoding place, in seconds; HTTP clients seldom wait longer."""


class Place:
    """A place that is in use.

    Args:
        free: called once, when the place is released.
    """

    def __init__(self, free: Callable[[], None]) -> None:
        self._free: Callable[[], None] | None = free

    def release(self) -> None:
        """Release the place, unless it is released already."""
        if free := self._free:
            self._free = None
            free()


@dataclass(eq=False)
class Share:
    """Use of the decoding places by one recording.

    Attributes:
        decoding: number of its pieces in flight.
        begun: whether it has ever had a place.
    """

    decoding: int = 0
    begun: bool = False


class Places:
    """Places of a gateway.

    Args:
        settings: settings of the gateway.
        max_queue_secs: maximum wait of a recording for its first decoding place.

    Attributes:
        streams, batches: number of streams and batch requests in flight; batches includes waiting ones.
        draining: whether new work is refused.
    """

    def __init__(self, settings: Settings, max_queue_secs: float = MAX_QUEUE_SECS) -> None:
        self._max_streams = settings.max_concurrent_streams
        self._max_batches = settings.max_concurrent_batches
        self._max_waiting = settings.inference_queue_size
        self._max_queue_secs = max_queue_secs
        self._free = self._max_batches
        self._waiting: list[tuple[Share, asyncio.Future[None]]] = []  # in the order of their arrival
        self.streams = 0
        self.batches = 0
        self.draining = False
        self._drain_deadline_passed = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def stream(self) -> Iterator[Place]:
        """Hold a place for a stream until the context ends or the place is released.

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
    def batch(self) -> Iterator[Share]:
        """Hold a place in the queue of recordings, from the end of the request's body to the response.

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
            yield Share()
        finally:
            self.batches -= 1
            self._report()

    async def decoding(self, share: Share) -> Place:
        """Return a decoding place for a piece of a recording; wait for one while all are taken.

        Args:
            share: share of the recording; one of its pieces waits at a time.

        Raises:
            ApiError: the recording has not begun, and waited for longer than ``max_queue_secs``; or the time to drain is over.
        """
        if self._drain_deadline_passed:
            raise _stopping()
        if self._free and not self._waiting:
            self._take(share)
        else:
            await self._wait_for_decoding(share)
        return Place(lambda: self._free_decoding(share))

    async def _wait_for_decoding(self, share: Share) -> None:
        place = asyncio.get_running_loop().create_future()
        entry = share, place
        self._waiting.append(entry)
        try:
            await asyncio.wait({place}, timeout=None if share.begun else self._max_queue_secs)
        except asyncio.CancelledError:
            if place.done() and not place.exception():
                self._free_decoding(share)  # it was given in the same turn of the event loop
            raise
        finally:
            if not place.done():
                self._waiting.remove(entry)
        if not place.done():
            raise ApiError(ErrorKind.NO_CAPACITY, f"no place became free within {self._max_queue_secs:g} s; please retry")
        place.result()

    def _take(self, share: Share) -> None:
        self._free -= 1
        share.decoding += 1
        share.begun = True

    def _free_decoding(self, share: Share) -> None:
        self._free += 1
        share.decoding -= 1
        if self._waiting:
            chosen = min(self._waiting, key=lambda entry: entry[0].decoding)
            self._waiting.remove(chosen)
            self._take(chosen[0])
            chosen[1].set_result(None)

    @property
    def full(self) -> bool:
        """Whether all places for streams are taken."""
        return self.streams >= self._max_streams

    def drain(self) -> None:
        """Refuse new work from now on."""
        self.draining = True
        metrics.DRAINING.set(1)

    def end_recordings(self) -> None:
        """Give no more decoding places: the time to drain is over."""
        self._drain_deadline_passed = True
        for _, place in self._waiting:
            place.set_exception(_stopping())
        self._waiting.clear()

    async def wait_idle(self, timeout_secs: float) -> bool:
        """Wait until nothing is in flight; return False at the timeout."""
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
            raise _stopping()

    def _report(self) -> None:
        metrics.ACTIVE_CONNECTIONS.set(self.streams)
        metrics.ACTIVE_BATCHES.set(self.batches)
        if self.streams or self.batches:
            self._idle.clear()
        else:
            self._idle.set()


def _stopping() -> ApiError:
    return ApiError(ErrorKind.DRAINING, "the server is shutting down; please retry")
