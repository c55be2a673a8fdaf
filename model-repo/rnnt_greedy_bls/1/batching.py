"""Share the networks among streams: windows queue for encoder calls, and rows of frames join and leave between decoder calls.

No stream waits for a batch to fill or to drain. A window is encoded when a call is free, together with queued windows of equal
length. A row joins the next decoder call and leaves after its last token. So some streams are encoded while others are decoded,
and a long recording delays no stream. This is continuous batching, as in Orca (Yu et al., OSDI 2022). Only rows of recordings
wait for each other, while the encoder has a backlog. ``scheduling.py`` has the rules.

All state is changed in one event loop. Encoder calls run in their own threads; decoder calls are short and block the loop. A
call runs in the context (``contextvars``) of its first caller.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from beam import BeamRow
from greedy import Floats, JointOutputs, Row, Step, advance
from scheduling import GATHER_SECS, Occupancy, Queued, choose, is_exclusive, next_decoder_call
from stream import Decoded, Stream
from windows import Cache, Window


class Encoded(NamedTuple):
    """The encoder's result for one window.

    Attributes:
        frames: encoder frames [D, T].
        features: number of feature frames that they were computed from.
        cache: context after the window [S], of a cached encoder.
    """

    frames: Floats
    features: int
    cache: Cache | None = None


Encode = Callable[[Sequence[Window], bool], Sequence[Encoded]]
"""Encode windows of one kind in one call; the flag is set if the call is exclusive."""


class _Caller(NamedTuple):
    """The task that waits for a window: the future of its frames, and its context."""

    encoded: asyncio.Future[Encoded]
    context: contextvars.Context


class Encoder:
    """Queues the windows of all streams, and runs encoder calls.

    Args:
        encode: runs one call; blocks its thread.
        calls: maximum number of calls that run at once.
        windows_per_call: returns the maximum number of windows in a call for their length in samples.

    Attributes:
        backlog: number of windows for which no call was free. A window that has just arrived does not count.
    """

    def __init__(self, encode: Encode, calls: int, windows_per_call: Callable[[int], int]) -> None:
        self._encode = encode
        self._calls = calls
        self._windows_per_call = windows_per_call
        self._threads = ThreadPoolExecutor(calls, "encoder")
        self.backlog = 0
        self._queue: dict[Queued, _Caller] = {}
        self._running = 0
        self._running_recordings = 0
        self._last_live_at = -math.inf
        self._last_met_at = -math.inf

    def is_busy(self) -> bool:
        """Return whether there is a backlog, so that more frames are certain to come."""
        return self.backlog > 0

    async def encode(self, window: Window) -> Encoded:
        """Queue a window, and return its frames when they are encoded.

        Raises:
            RuntimeError: the call failed.
        """
        loop = asyncio.get_running_loop()
        if window.live:
            self._last_live_at = loop.time()
        caller = _Caller(loop.create_future(), contextvars.copy_context())
        self._queue[Queued.at(loop.time(), window)] = caller
        loop.call_soon(self._dispatch)  # windows that arrive in the same turn of the loop can share a call
        return await caller.encoded

    def _dispatch(self) -> None:
        """Start all calls that may start now."""
        now = asyncio.get_running_loop().time()
        if self._running + len(self._queue) > 1:
            self._last_met_at = now
        while group := choose(self._queue, self._occupancy(), now, self._windows_per_call):
            self._start(group, exclusive=is_exclusive(self._last_met_at, now))
        self.backlog = len(self._queue)

    def _occupancy(self) -> Occupancy:
        return Occupancy(self._calls, self._running, self._running_recordings, self._last_live_at)

    def _start(self, group: Sequence[Queued], *, exclusive: bool) -> None:
        """Remove windows from the queue, and start their call."""
        callers = [self._queue.pop(queued) for queued in group]
        recordings = not group[0].window.live
        self._running += 1
        self._running_recordings += recordings
        windows = [queued.window for queued in group]
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self._threads, callers[0].context.run, self._encode, windows, exclusive)
        call.add_done_callback(partial(self._finish, callers, recordings))

    def _finish(self, callers: Sequence[_Caller], recordings: bool, call: asyncio.Future[Sequence[Encoded]]) -> None:
        self._running -= 1
        self._running_recordings -= recordings
        if error := call.exception():
            for caller in callers:
                caller.encoded.set_exception(error)
        else:
            for caller, encoded in zip(callers, call.result(), strict=True):
                caller.encoded.set_result(encoded)
        self._dispatch()


class _Decoding(NamedTuple):
    """The task that waits for a row.

    Attributes:
        done: set when the row is decoded.
        waits_until: latest start of the next call, in seconds of the event loop's clock.
        context: context of the task.
    """

    done: asyncio.Future[None]
    waits_until: float
    context: contextvars.Context


class Decoder:
    """Decodes the rows of all streams in shared calls.

    Args:
        step: runs one call; blocks the event loop for a moment.
        joint: layout of the network's logits.
        block_frames: frames scored by one call.
        rows_are_coming: returns whether more rows are certain to arrive; rows wait only then.
    """

    def __init__(self, step: Step, joint: JointOutputs, block_frames: int, rows_are_coming: Callable[[], bool]) -> None:
        self._step = step
        self._joint = joint
        self._block_frames = block_frames
        self._rows_are_coming = rows_are_coming
        self._rows: dict[Row | BeamRow, _Decoding] = {}
        self._next: asyncio.TimerHandle | None = None

    async def decode(self, row: Row | BeamRow, patience_secs: float = 0.0) -> None:
        """Decode a row to its end.

        Args:
            row: frames of one stream.
            patience_secs: maximum delay of the row's first call to share the call with other rows.

        Raises:
            RuntimeError: a call failed.
            ValueError: the network's outputs have another layout, or this row's are not finite.
        """
        if row.finished:
            return
        loop = asyncio.get_running_loop()
        decoding = _Decoding(loop.create_future(), loop.time() + patience_secs, contextvars.copy_context())
        self._rows[row] = decoding
        self._schedule()
        await decoding.done
        if row.error:
            raise ValueError(row.error)

    def _schedule(self) -> None:
        """Schedule the next call, and cancel the one that was scheduled before."""
        if self._next:
            self._next.cancel()
        loop = asyncio.get_running_loop()
        waits_until = (decoding.waits_until for decoding in self._rows.values())
        at = next_decoder_call(waits_until, loop.time(), rows_are_coming=self._rows_are_coming())
        # A timer fires in the next turn of the loop at the earliest, so tasks whose rows have just finished can add rows
        # before.
        self._next = loop.call_at(at, self._call)

    def _call(self) -> None:
        """Advance all rows with one call of the network."""
        self._next = None
        rows = list(self._rows)
        try:
            self._rows[rows[0]].context.run(advance, self._step, self._joint, rows, self._block_frames)
        except Exception as error:  # noqa: BLE001 (an error fails these rows, not the decoder)
            for row in rows:
                self._rows.pop(row).done.set_exception(error)
        else:
            for row in rows:
                if row.finished:
                    self._rows.pop(row).done.set_result(None)
        if self._rows:
            self._schedule()


async def recognise(stream: Stream, encoder: Encoder, decoder: Decoder, *, end: bool) -> Decoded:
    """Decode the windows of a stream that are due, and return the result.

    Args:
        stream: the stream, with the new audio.
        encoder: shared by all streams.
        decoder: shared by all streams.
        end: whether no more audio follows.

    Raises:
        RuntimeError: a network failed; the stream's state is lost.
        ValueError: a network's outputs have a wrong size; the stream's state is lost.
    """
    tail: Floats | None = None
    while window := stream.next_window(end):
        encoded = await encoder.encode(window)
        frames, tail = stream.receive(window, *encoded)
        while frames.shape[1]:
            row = stream.row(frames)
            await decoder.decode(row, 0.0 if window.live else GATHER_SECS)
            frames = stream.commit(row)
    if tail is not None:
        tail_row = stream.tail_row(tail)
        await decoder.decode(tail_row)
        stream.show(tail_row)
    return stream.finish_request(end)
