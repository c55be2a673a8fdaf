"""How streams share the networks: windows wait for the encoder, rows of frames come and go between two calls of the decoder.

No stream waits for a batch to fill or to empty. A window is encoded as soon as a call is free, together with those of equal
length that wait with it; a row joins the decoder's very next call and leaves with its own last token. So the encoder works on
some streams while others are decoded, and a long recording holds up nobody. (Continuous batching as Orca does it for text:
Yu et al., OSDI 2022.) Only rows of whole recordings wait for each other, when the encoder has more to do than it can.

All of it runs in one event loop. Calls of the encoder block threads of their own; those of the decoder, which are short, the
loop itself. A call runs in the context (``contextvars``) of the first of those that share it.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from greedy import Floats, Row, Step, Transducer, advance
from stream import Answer, Samples, Stream, Window

RECORDING_PATIENCE_SECS = 2.0
"""So long live windows go before a whole recording; then it takes its turn, or many streams would starve it."""

GATHER_SECS = 0.5
"""From its beginning a whole recording's row waits so long for others: a call costs little more for many."""

LIVE_SECS = 2.0
"""While the last live window is no older than this, recordings leave one call of the encoder to live windows."""

EXCLUSIVE_AFTER_SECS = 1.0
"""A call has the encoder to itself if for so long no window has met another."""


class Encoded(NamedTuple):
    """What the encoder makes of a window.

    Attributes:
        frames: encoder frames [D, T].
        features: number of feature frames that they were made from.
    """

    frames: Floats
    features: int


Encode = Callable[[Sequence[Samples], bool], Sequence[Encoded]]
"""Encode windows of equal length, 16 kHz audio [n] each, by one call; and whether it has the encoder to itself."""


@dataclass(eq=False)
class _Waiting:
    """A window that waits for the encoder; ``due`` is in seconds of the event loop."""

    window: Window
    due: float
    encoded: asyncio.Future[Encoded]
    context: contextvars.Context

    @property
    def kind(self) -> tuple[bool, int]:
        """Only windows of one kind share a call: padding would cost more than it saves."""
        return self.window.live, len(self.window.samples)


class Encoder:
    """The encoder, for all streams.

    Args:
        encode: one call; it blocks.
        calls: how many may run at once.
        windows_per_call: most windows of a length in samples in one.

    Attributes:
        waiting: how many windows no call was free for. One that has just come is not among them.
    """

    def __init__(self, encode: Encode, calls: int, windows_per_call: Callable[[int], int]) -> None:
        self._encode = encode
        self._calls = calls
        self._windows_per_call = windows_per_call
        self._threads = ThreadPoolExecutor(calls, "encoder")
        self.waiting = 0
        self._waiting: list[_Waiting] = []  # in the order in which they are due
        self._running = 0
        self._running_recordings = 0
        self._last_live = -LIVE_SECS
        self._last_met = -EXCLUSIVE_AFTER_SECS

    def busy(self) -> bool:
        """Whether windows wait, whose frames are sure to come when a call is free."""
        return self.waiting > 0

    async def encode(self, window: Window) -> Encoded:
        """Encode a window.

        Raises:
            RuntimeError: the call failed.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        if window.live:
            self._last_live = now
        due = now if window.live else now + RECORDING_PATIENCE_SECS
        waiting = _Waiting(window, due, loop.create_future(), contextvars.copy_context())
        self._waiting.append(waiting)
        self._waiting.sort(key=lambda waiting: waiting.due)
        # Those that come in the same turn of the loop can share a call.
        loop.call_soon(self._dispatch)
        return await waiting.encoded

    def _dispatch(self) -> None:
        """Start calls for what waits, as far as there is room."""
        loop = asyncio.get_running_loop()
        if self._running + len(self._waiting) > 1:
            self._last_met = loop.time()
        while self._running < self._calls:
            first = next((waiting for waiting in self._waiting if waiting.window.live or self._room_for_recording()), None)
            if not first:
                break
            alike = [waiting for waiting in self._waiting if waiting.kind == first.kind]
            share = -(-len(alike) // (self._calls - self._running))  # calls side by side beat one with all
            group = alike[: min(self._windows_per_call(len(first.window.samples)), share)]
            self._waiting = [waiting for waiting in self._waiting if waiting not in group]
            self._running += 1
            self._running_recordings += not first.window.live
            samples = [waiting.window.samples for waiting in group]
            exclusive = loop.time() - self._last_met >= EXCLUSIVE_AFTER_SECS
            call = loop.run_in_executor(self._threads, first.context.run, self._encode, samples, exclusive)
            call.add_done_callback(partial(self._finish, group))
        self.waiting = len(self._waiting)

    def _room_for_recording(self) -> bool:
        reserved = asyncio.get_running_loop().time() - self._last_live < LIVE_SECS
        return self._running_recordings < max(1, self._calls - reserved)

    def _finish(self, group: Sequence[_Waiting], call: asyncio.Future[Sequence[Encoded]]) -> None:
        self._running -= 1
        self._running_recordings -= not group[0].window.live
        if error := call.exception():
            for waiting in group:
                waiting.encoded.set_exception(error)
        else:
            for waiting, encoded in zip(group, call.result(), strict=True):
                waiting.encoded.set_result(encoded)
        self._dispatch()


class _Decoding(NamedTuple):
    """A row that is being decoded, or waits for others.

    Attributes:
        done: set when it is decoded.
        due: until then it may wait for others, in seconds of the event loop.
        context: of its caller.
    """

    done: asyncio.Future[None]
    due: float
    context: contextvars.Context


class Decoder:
    """The predictor and joint network, for all streams.

    Args:
        step: one call; it blocks, for a moment.
        transducer: the meaning of its outputs.
        block_frames: frames that one call scores.
        coming: whether more rows are sure to come. While none is, nobody waits.
    """

    def __init__(self, step: Step, transducer: Transducer, block_frames: int, coming: Callable[[], bool]) -> None:
        self._step = step
        self._transducer = transducer
        self._block_frames = block_frames
        self._coming = coming
        self._rows: dict[Row, _Decoding] = {}
        self._next: asyncio.TimerHandle | None = None

    async def decode(self, row: Row, patience_secs: float = 0.0) -> None:
        """Decode a row to its end.

        Args:
            row: frames of one stream.
            patience_secs: how long it may wait for others, to share its calls with them.

        Raises:
            RuntimeError: a call failed.
            ValueError: the network's outputs are not those of the transducer, or this row's are not finite.
        """
        if row.finished:
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + patience_secs
        decoding = self._rows[row] = _Decoding(loop.create_future(), due, contextvars.copy_context())
        self._schedule()
        await decoding.done
        if row.error:
            raise ValueError(row.error)

    def _schedule(self) -> None:
        """Let the next call be when the first row has waited for long enough, and at once while no others are to come."""
        if self._next:
            self._next.cancel()
        # Not before those whose rows have just finished have had their turn: what they decode next takes part.
        due = min(decoding.due for decoding in self._rows.values()) if self._coming() else 0.0
        self._next = asyncio.get_running_loop().call_at(due, self._call)

    def _call(self) -> None:
        """Call the network once, and let the rows that are left have their next call."""
        self._next = None
        rows = list(self._rows)
        try:
            self._rows[rows[0]].context.run(advance, self._step, self._transducer, rows, self._block_frames)
        except Exception as error:  # noqa: BLE001 (whatever it is, it is the rows' and not the decoder's)
            for row in rows:
                self._rows.pop(row).done.set_exception(error)
        else:
            for row in rows:
                if row.finished:
                    self._rows.pop(row).done.set_result(None)
        if self._rows:
            self._schedule()


async def recognise(stream: Stream, encoder: Encoder, decoder: Decoder, *, end: bool) -> Answer:
    """Decode what is due of a stream, and answer.

    Args:
        stream: it has its new audio.
        encoder: what its windows wait for.
        decoder: what their frames wait for.
        end: no more audio follows.

    Raises:
        RuntimeError: a network failed.
        ValueError: a network's outputs don't fit; in either case the stream's state is lost.
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
