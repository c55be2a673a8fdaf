"""Windows and rows of many streams share the networks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest

import scheduling
from batching import Decoder, Encoded, Encoder
from greedy import Floats, Row, States, Step
from tests.support.transducers import RandomTransducer, assert_same, decode_frame_by_frame, random_frames
from windows import Window

UNLIMITED = 10**9
LIVE, RECORDING = 100, 1000
"""Lengths of live windows and of recordings' windows, in samples."""


class Network:
    """An encoder whose calls end when the test ends them."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.exclusive: list[bool] = []
        self.running: list[threading.Event] = []
        self.error: Exception | None = None
        self._began = threading.Semaphore(0)

    def encode(self, windows: Sequence[Window], exclusive: bool) -> list[Encoded]:
        self.exclusive.append(exclusive)
        done = threading.Event()
        self.calls.append([int(window.samples[0]) for window in windows])
        self.running.append(done)
        self._began.release()
        assert done.wait(5), "the test did not end the call"
        if self.error:
            raise self.error
        return [Encoded(np.full((1, 1), w.samples[0], np.float32), len(w.samples)) for w in windows]

    async def wait_for_calls(self, calls: int) -> None:
        for _ in range(calls):
            assert await asyncio.to_thread(self._began.acquire, timeout=5)

    def end(self, call: int) -> None:
        self.running[call].set()

    def end_all(self) -> None:
        for call in self.running:
            call.set()


def window(number: int, length: int) -> Window:
    return Window(np.full(length, number, np.int16), 0, None, live=length < RECORDING)


def submit(encoder: Encoder, number: int, length: int = LIVE) -> asyncio.Task[Encoded]:
    return asyncio.ensure_future(encoder.encode(window(number, length)))


def counting(network: Step, batches: list[int]) -> Step:
    """Return the network with a list of the rows of each call."""

    def step(frames: Floats, last_tokens: Any, states: States) -> tuple[Floats, States]:
        batches.append(len(frames))
        return network(frames, last_tokens, states)

    return step


def at_most(windows: int) -> Callable[[int], int]:
    """Return a limit of windows per call that does not depend on their length."""
    return lambda _samples: windows


def nothing_comes() -> bool:
    """Say that no row is on its way to the decoder."""
    return False


async def nothing_more(network: Network) -> None:
    """Wait for a moment; no call may begin."""
    before = len(network.calls)
    await asyncio.sleep(0.05)
    assert len(network.calls) == before


async def test_windows_fill_free_calls_before_sharing() -> None:
    network = Network()
    encoder = Encoder(network.encode, calls=2, windows_per_call=at_most(4))
    tasks = [submit(encoder, number) for number in range(2)]
    await network.wait_for_calls(2)
    assert sorted(network.calls) == [[0], [1]]
    tasks += [submit(encoder, number) for number in range(2, 9)]
    await nothing_more(network)
    assert encoder.backlog == 7
    network.end(0)
    await network.wait_for_calls(1)
    assert network.calls[2] == [2, 3, 4, 5], "as many queued windows as fit"
    network.end(1)
    await network.wait_for_calls(1)
    assert network.calls[3] == [6, 7, 8]
    network.end_all()
    assert [int((await task).frames[0, 0]) for task in tasks] == list(range(9))
    assert encoder.backlog == 0


async def test_new_window_is_not_in_the_backlog() -> None:
    """A row would otherwise wait for a window for which a call is free."""
    network = Network()
    encoder = Encoder(network.encode, calls=1, windows_per_call=at_most(1))
    tasks = [submit(encoder, number) for number in range(3)]
    await asyncio.sleep(0)
    assert encoder.backlog == 0
    await network.wait_for_calls(1)
    assert encoder.backlog == 2
    for call in (1, 2):
        network.end(call - 1)
        await network.wait_for_calls(1)
        assert encoder.backlog == 2 - call
    network.end_all()
    await asyncio.gather(*tasks)


async def test_only_equal_lengths_share_a_call() -> None:
    network = Network()
    encoder = Encoder(network.encode, calls=1, windows_per_call=at_most(8))
    tasks = [submit(encoder, 0)]
    await network.wait_for_calls(1)
    tasks += [submit(encoder, number, length) for number, length in ((1, 100), (2, 200), (3, 100), (4, 200))]
    for call in range(3):
        network.end(call)
        if call < 2:
            await network.wait_for_calls(1)
    await asyncio.gather(*tasks)
    assert network.calls == [[0], [1, 3], [2, 4]]


async def test_windows_per_call_depends_on_length() -> None:
    network = Network()
    encoder = Encoder(network.encode, calls=1, windows_per_call=lambda samples: 600 // samples)
    tasks = [submit(encoder, 0)]
    await network.wait_for_calls(1)
    tasks += [
        submit(encoder, number, length) for number, length in ((1, 200), (2, 200), (3, 200), (4, 200), (5, 300), (6, 300))
    ]
    for call in range(4):
        network.end(call)
        if call < 3:
            await network.wait_for_calls(1)
    await asyncio.gather(*tasks)
    assert network.calls == [[0], [1, 2, 3], [4], [5, 6]]


async def test_live_windows_overtake_recordings() -> None:
    network = Network()
    encoder = Encoder(network.encode, calls=1, windows_per_call=at_most(1))
    tasks = [submit(encoder, 0)]
    await network.wait_for_calls(1)
    tasks += [submit(encoder, 1, RECORDING), submit(encoder, 2), submit(encoder, 3)]
    for call in range(4):
        network.end(call)
        if call < 3:
            await network.wait_for_calls(1)
    await asyncio.gather(*tasks)
    assert network.calls == [[0], [2], [3], [1]]


async def test_recording_takes_its_turn_after_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "RECORDING_PATIENCE_SECS", 0.05)
    network = Network()
    encoder = Encoder(network.encode, calls=1, windows_per_call=at_most(1))
    tasks = [submit(encoder, 0)]
    await network.wait_for_calls(1)
    tasks.append(submit(encoder, 1, RECORDING))
    await asyncio.sleep(0.1)
    tasks.append(submit(encoder, 2))
    for call in range(3):
        network.end(call)
        if call < 2:
            await network.wait_for_calls(1)
    await asyncio.gather(*tasks)
    assert network.calls == [[0], [1], [2]]


async def test_recordings_leave_a_call_to_live_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    encoder = Encoder(network.encode, calls=2, windows_per_call=at_most(1))
    first = submit(encoder, 0)
    await network.wait_for_calls(1)
    network.end(0)
    await first
    tasks = [submit(encoder, number, RECORDING) for number in (1, 2, 3)]
    await network.wait_for_calls(1)
    await nothing_more(network)
    assert network.calls == [[0], [1]]
    tasks.append(submit(encoder, 4))
    await network.wait_for_calls(1)
    assert network.calls[-1] == [4], "a live window waits for no recording"
    monkeypatch.setattr(scheduling, "LIVE_SECS", 0.0)
    network.end(1)
    network.end(2)
    await network.wait_for_calls(2)
    assert network.calls[3:] == [[2], [3]], "no stream is live"
    network.end_all()
    await asyncio.gather(*tasks)


async def test_window_without_company_is_exclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network()
    encoder = Encoder(network.encode, calls=2, windows_per_call=at_most(1))
    for number in range(2):
        alone = submit(encoder, number)
        await network.wait_for_calls(1)
        network.end(number)
        await alone
    assert network.exclusive == [True, True]
    both = [submit(encoder, number) for number in (2, 3)]
    await network.wait_for_calls(2)
    network.end_all()
    await asyncio.gather(*both)
    after = submit(encoder, 4)
    await network.wait_for_calls(1)
    network.end(4)
    await after
    assert network.exclusive[2:] == [False] * 3, "windows met a moment ago"
    monkeypatch.setattr(scheduling, "EXCLUSIVE_AFTER_SECS", 0.0)
    later = submit(encoder, 5)
    await network.wait_for_calls(1)
    network.end(5)
    await later
    assert network.exclusive[5]


async def test_queued_windows_are_not_exclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "EXCLUSIVE_AFTER_SECS", 0.05)
    network = Network()
    encoder = Encoder(network.encode, calls=1, windows_per_call=at_most(1))
    tasks = [submit(encoder, number) for number in range(3)]
    for call in range(3):
        await network.wait_for_calls(1)
        await asyncio.sleep(0.1)
        network.end(call)
    await asyncio.gather(*tasks)
    assert network.exclusive == [False, False, True]


async def test_failed_call_fails_only_its_windows() -> None:
    network = Network()
    encoder = Encoder(network.encode, calls=1, windows_per_call=at_most(2))
    tasks = [submit(encoder, number) for number in range(2)]
    await network.wait_for_calls(1)
    network.error = RuntimeError("encoder failed: out of memory")
    network.end(0)
    for task in tasks:
        with pytest.raises(RuntimeError, match="out of memory"):
            await task
    network.error = None
    after = submit(encoder, 2)
    await network.wait_for_calls(1)
    network.end(1)
    assert int((await after).frames[0, 0]) == 2


async def test_rows_join_and_leave_between_calls() -> None:
    network = RandomTransducer(3, blank_bias=4.0)
    batches: list[int] = []
    joined: list[Callable[[], None]] = []

    count = counting(network, batches)

    def step(frames: Floats, last_tokens: Any, states: States) -> tuple[Floats, States]:
        if joined and len(batches) == 2:
            joined.pop()()
        return count(frames, last_tokens, states)

    decoder = Decoder(step, network.joint, 4, nothing_comes)
    frames = [random_frames(i, length) for i, length in enumerate((40, 25, 20))]
    rows = [Row(f, network.fresh(), 10, UNLIMITED) for f in frames]
    late: list[asyncio.Task[None]] = []
    joined.append(lambda: late.append(asyncio.ensure_future(decoder.decode(rows[2]))))
    await asyncio.gather(decoder.decode(rows[0]), decoder.decode(rows[1]))
    await asyncio.gather(*late)
    for row, row_frames in zip(rows, frames, strict=True):
        assert_same(row.tokens, decode_frame_by_frame(network, row_frames, 10))
    assert batches[0] == 2
    assert {1, 2, 3} == set(batches)
    assert len(late) == 1


async def test_patient_rows_gather_while_others_come() -> None:
    network = RandomTransducer(3)
    batches: list[int] = []
    coming = True
    decoder = Decoder(counting(network, batches), network.joint, 100, lambda: coming)

    def start(patience_secs: float) -> asyncio.Task[None]:
        return asyncio.ensure_future(decoder.decode(Row(random_frames(1, 5), network.fresh(), 10, 1), patience_secs))

    patient = [start(0.1) for _ in range(3)]
    await asyncio.sleep(0.05)
    assert batches == []
    await asyncio.gather(*patient)
    assert batches == [3], "the first row's patience was over"
    patient = [start(60) for _ in range(2)]
    await asyncio.sleep(0)
    await start(0)
    assert batches == [3, 3], "an impatient row takes the patient ones along"
    await asyncio.gather(*patient)
    patient = [start(60) for _ in range(2)]
    await asyncio.sleep(0)
    coming = False
    await start(60)
    assert batches == [3, 3, 3], "no more rows are coming"
    await asyncio.gather(*patient)
    await start(60)
    assert batches == [3, 3, 3, 1]


async def test_last_rows_wait_while_others_come() -> None:
    network = RandomTransducer(3, blank_bias=4.0)
    batches: list[int] = []
    coming = False
    decoder = Decoder(counting(network, batches), network.joint, 4, lambda: coming)
    frames = [random_frames(i, length) for i, length in enumerate((4, 40, 40, 40, 40, 40))]
    rows = [Row(f, network.fresh(), 10, UNLIMITED) for f in frames]
    tasks = [asyncio.ensure_future(decoder.decode(row, 60)) for row in rows[1:5]]
    hasty = asyncio.ensure_future(decoder.decode(rows[0]))
    await asyncio.sleep(0)
    coming = True
    await hasty
    await asyncio.sleep(0.05)
    assert batches == [5] * len(batches), "the patient rows wait"
    tasks.append(asyncio.ensure_future(decoder.decode(rows[5], 60)))
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in tasks), "more rows are coming"
    coming = False
    await decoder.decode(Row(random_frames(6, 4), network.fresh(), 10, UNLIMITED), 60)
    await asyncio.gather(*tasks)
    assert 6 in batches, "all rows continue together"
    for row, row_frames in zip(rows, frames, strict=True):
        assert_same(row.tokens, decode_frame_by_frame(network, row_frames, 10))


async def test_row_waits_at_most_its_patience() -> None:
    network = RandomTransducer(3, blank_bias=4.0)
    coming = True
    decoder = Decoder(network, network.joint, 4, lambda: coming)
    rows = [Row(random_frames(i, length), network.fresh(), 10, UNLIMITED) for i, length in enumerate((200, 400, 4))]
    hasty = asyncio.ensure_future(decoder.decode(rows[0], 0.1))
    patient = asyncio.ensure_future(decoder.decode(rows[1], 60))
    await asyncio.sleep(0.05)
    assert not rows[0].position
    await asyncio.wait_for(hasty, 5)
    assert rows[1].position, "the patient row joined the other's calls"
    assert not patient.done()
    coming = False
    await decoder.decode(rows[2], 60)
    await asyncio.wait_for(patient, 5)


async def test_failed_call_fails_only_its_rows() -> None:
    network = RandomTransducer(3)
    failures = [RuntimeError("decoder_joint failed: gone")]

    def step(*arguments: object) -> object:
        if failures:
            raise failures.pop()
        return network(*arguments)  # type: ignore[arg-type]

    decoder = Decoder(step, network.joint, 4, nothing_comes)  # type: ignore[arg-type]
    frames = random_frames(1, 10)
    rows = [Row(frames, network.fresh(), 10, UNLIMITED) for _ in range(3)]
    both = await asyncio.gather(decoder.decode(rows[0]), decoder.decode(rows[1]), return_exceptions=True)
    assert [str(error) for error in both] == ["decoder_joint failed: gone"] * 2
    await decoder.decode(rows[2])
    assert_same(rows[2].tokens, decode_frame_by_frame(network, frames, 10))


async def test_non_finite_logits_fail_only_their_row() -> None:
    network = RandomTransducer(3)
    decoder = Decoder(network, network.joint, 4, nothing_comes)
    frames = random_frames(1, 10)
    broken = frames.copy()
    broken[:, 6] = np.nan
    rows = [Row(frames, network.fresh(), 10, UNLIMITED) for frames in (frames, broken, frames)]
    results = await asyncio.gather(*map(decoder.decode, rows), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), ValueError, type(None)]
    assert str(results[1]) == "token 0 has probability nan at frame 6: the logits are not finite"
    for row in (rows[0], rows[2]):
        assert_same(row.tokens, decode_frame_by_frame(network, frames, 10))


async def test_call_runs_in_its_first_callers_context() -> None:
    name: ContextVar[str] = ContextVar("name", default="")
    seen: list[str] = []
    network = RandomTransducer(3)

    def encode(windows: Sequence[Window], exclusive: bool) -> list[Encoded]:  # noqa: ARG001 (an ``Encode``)
        seen.append(name.get())
        return [Encoded(random_frames(1, 5), 5) for _ in windows]

    def step(*arguments: object) -> object:
        seen.append(name.get())
        return network(*arguments)  # type: ignore[arg-type]

    encoder, decoder = Encoder(encode, 1, at_most(8)), Decoder(step, network.joint, 100, nothing_comes)  # type: ignore[arg-type]

    async def serve(who: str) -> None:
        name.set(who)
        encoded = await encoder.encode(window(1, LIVE))
        await decoder.decode(Row(encoded.frames, network.fresh(), 10, 1))

    await asyncio.gather(serve("first"), serve("second"))
    assert set(seen) == {"first"}
