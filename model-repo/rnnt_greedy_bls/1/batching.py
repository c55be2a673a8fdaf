"""How streams share the networks: windows queue for encoder calls, rows of frames join and leave between decoder calls.

No stream waits for a batch to fill or to drain. A window is encoded as soon as a call is free, together with queued windows of
equal length; a row joins the next decoder call and leaves with its own last token. So the encoder works on some streams while
others are decoded, and a long recording delays no stream. This is continuous batching as Orca does it for text (Yu et al., OSDI
2022). Only rows of recordings wait for each other, while the encoder has a backlog. ``scheduling.py`` has the rules.

Everything runs in one event loop. Encoder calls block threads of their own; decoder calls are short and block the loop. A call
runs in the context (``contextvars``) of its first caller.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from greedy import Floats, Row, Step, Transducer, advance
from scheduling import GATHER_SECS, Occupancy, Queued, choose, is_exclusive, next_decoder_call
from stream import Answer, Samples, Stream, Window


class Encoded(NamedTuple):
    """What the encoder makes of one window.

    Attributes:
        frames: encoder frames [D, T].
        features: number of feature frames behind them.
    """

    frames: Floats
    features: int


Encode = Callable[[Sequence[Samples], bool], Sequence[Encoded]]
"""Encode windows of equal length, 16 kHz audio [n] each, in one call; the flag is set if the call is exclusive."""


class _Caller(NamedTuple):
    """Where a window's frames go, and the context of the task that waits for them."""

    encoded: asyncio.Future[Encoded]
    context: contextvars.Context


class Encoder:
    """The encoder, for all streams.

    Args:
        encode: one call; blocks its thread.
        calls: number of calls that may run at once.
        windows_per_call: maximum number of windows in a call, by their length in samples.

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
        """Whether there is a backlog: its frames are certain to come."""
        return self.backlog > 0

    async def encode(self, window: Window) -> Encoded:
        """Encode a window.

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
        """Start as many calls as may start."""
        now = asyncio.get_running_loop().time()
        if self._running + len(self._queue) > 1:
            self._last_met_at = now
        while group := choose(self._queue, self._occupancy(), now, self._windows_per_call):
            self._start(group, exclusive=is_exclusive(self._last_met_at, now))
        self.backlog = len(self._queue)

    def _occupancy(self) -> Occupancy:
        return Occupancy(self._calls, self._running, self._running_recordings, self._last_live_at)

    def _start(self, group: Sequence[Queued], *, exclusive: bool) -> None:
        """Take windows out of the queue and encode them."""
        callers = [self._queue.pop(queued) for queued in group]
        recordings = not group[0].window.live
        self._running += 1
        self._running_recordings += recordings
        samples = [queued.window.samples for queued in group]
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self._threads, callers[0].context.run, self._encode, samples, exclusive)
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
    """A row in the decoder.

    Attributes:
        done: set when the row is decoded.
        due: until when the row may wait for others, in seconds of the event loop.
        context: of the task that waits for the row.
    """

    done: asyncio.Future[None]
    due: float
    context: contextvars.Context


class Decoder:
    """The predictor and joint network, for all streams.

    Args:
        step: one call; blocks the event loop for a moment.
        transducer: the meaning of the network's outputs.
        block_frames: frames scored by one call.
        rows_are_coming: whether more rows are certain to arrive; rows wait only then.
    """

    def __init__(self, step: Step, transducer: Transducer, block_frames: int, rows_are_coming: Callable[[], bool]) -> None:
        self._step = step
        self._transducer = transducer
        self._block_frames = block_frames
        self._rows_are_coming = rows_are_coming
        self._rows: dict[Row, _Decoding] = {}
        self._next: asyncio.TimerHandle | None = None

    async def decode(self, row: Row, patience_secs: float = 0.0) -> None:
        """Decode a row to its end.

        Args:
            row: frames of one stream.
            patience_secs: how long the row may wait to share its calls with others.

        Raises:
            RuntimeError: a call failed.
            ValueError: the network's outputs are not those of the transducer, or this row's are not finite.
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
        """Set the time of the next call anew."""
        if self._next:
            self._next.cancel()
        # At the earliest in the loop's next turn: tasks whose rows have just finished can add their next rows before.
        at = next_decoder_call((decoding.due for decoding in self._rows.values()), self._rows_are_coming())
        self._next = asyncio.get_running_loop().call_at(at, self._call)

    def _call(self) -> None:
        """Advance all rows by one call of the network."""
        self._next = None
        rows = list(self._rows)
        try:
            self._rows[rows[0]].context.run(advance, self._step, self._transducer, rows, self._block_frames)
        except Exception as error:  # noqa: BLE001 (any error is the rows', not the decoder's)
            for row in rows:
                self._rows.pop(row).done.set_exception(error)
        else:
            for row in rows:
                if row.finished:
                    self._rows.pop(row).done.set_result(None)
        if self._rows:
            self._schedule()


async def recognise(stream: Stream, encoder: Encoder, decoder: Decoder, *, end: bool) -> Answer:
    """Decode the windows of a stream that are due, and return its answer.

    Args:
        stream: has the new audio already.
        encoder: shared by all streams.
        decoder: shared by all streams.
        end: no more audio follows.

    Raises:
        RuntimeError: a network failed; the stream's state is lost.
        ValueError: a network's outputs do not fit; the stream's state is lost.
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
        row = stream.tail_row(tail)
        await decoder.decode(row)
        stream.show(row)
    return stream.answer(end)
