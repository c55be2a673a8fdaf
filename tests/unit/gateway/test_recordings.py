"""The engine of recordings: order, read-ahead, failures and leaving; in virtual time, with scripted decoders."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest

from gateway.audio import RATE
from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.limits.auth import ANONYMOUS
from gateway.limits.places import Places, Share
from gateway.limits.quotas import Bill, Quotas
from gateway.recordings.cut import Lengths
from gateway.recordings.transcribe import MAX_UNDELIVERED, Recording
from gateway.transcript.segments import Segment
from gateway.transcript.transcript import Answer
from tests.support.virtual import run_virtual

Samples = npt.NDArray[np.int16]
LENGTHS = Lengths(1 * RATE, 2 * RATE, 3 * RATE)


@dataclass
class Tape:
    """A recording whose samples are the number of their second; it records how much was read.

    Attributes:
        secs: length.
        channels: number of channels.
        breaks_at: second at which it is damaged.
        read: seconds read so far.
    """

    secs: int
    channels: int = 1
    breaks_at: int | None = None
    read: int = 0

    async def __aiter__(self) -> AsyncIterator[Samples]:
        for second in range(self.secs):
            if second == self.breaks_at:
                raise ApiError(ErrorKind.UNDECODABLE_AUDIO, "damaged")
            self.read += 1
            await asyncio.sleep(0)
            yield np.full((self.channels, RATE), second, np.int16)


@dataclass
class Decoders:
    """Decoders of pieces; the text of each is the second at which its piece begins.

    Attributes:
        takes_secs: duration of the decoding of a piece, by the second at which the piece begins.
        fails_at: second whose piece cannot be decoded.
        given_up: number of decoders whose answer is no longer awaited.
        most: maximum number that decode at once.
    """

    takes_secs: Callable[[int], float]
    fails_at: int | None = None
    given_up: int = 0
    at_work: int = 0
    most: int = 0
    sizes: list[int] = field(default_factory=list)

    def __call__(self) -> _Decoder:
        return _Decoder(self)


@dataclass
class _Decoder:
    decoders: Decoders

    async def send(self, samples: Samples, *, end: bool) -> Answer:
        assert end
        decoders, second = self.decoders, int(samples[0])
        decoders.sizes.append(len(samples))
        decoders.at_work += 1
        decoders.most = max(decoders.most, decoders.at_work)
        try:
            await asyncio.sleep(decoders.takes_secs(second))
        finally:
            decoders.at_work -= 1
        if decoders.fails_at is not None and second >= decoders.fails_at:
            raise ApiError(ErrorKind.BACKEND_FAILED, "failed")
        length = len(samples) / RATE
        words = [{"word": f"s{second}", "start": 0.1, "end": length, "confidence": 0.5}] if second % 10 != 9 else []
        confidence = 0.5 if words else math.nan
        return Answer(f"s{second}" if words else "", [second] * bool(words), words, confidence, 0, True, len(samples), 7, 3)  # type: ignore[arg-type]

    def give_up(self) -> None:
        self.decoders.given_up += 1


def recording(decoders: Decoders, places: Places, quotas: Quotas | None = None, caller: int = ANONYMOUS) -> Recording:
    bill = Bill(quotas or Quotas(Settings()), caller)
    return Recording("amira", 1e6, LENGTHS, bill, decoders, places, Share())


def places(number: int) -> Places:
    return Places(Settings(max_concurrent_batches=number))


async def all_segments(work: Recording, tape: Tape, *, separate: bool = False) -> list[Segment]:
    async with aclosing(work.segments(tape, separate=separate)) as segments:
        return [segment async for segment in segments]


def test_segments_are_in_order_for_any_order_of_decoding() -> None:
    async def scenario() -> None:
        decoders = Decoders(lambda second: 5 - second % 5)
        work = recording(decoders, places(4))
        segments = await all_segments(work, Tape(60))
        starts = [segment.tokens[0] for segment in segments]
        assert starts == sorted(starts)
        assert len(starts) > 20
        assert decoders.most == 4
        assert [segment.id for segment in segments] == list(range(len(segments)))
        for segment in segments:
            (word,) = segment.words
            assert word["start"] == segment.start == segment.tokens[0] + 0.1
            assert word["end"] == segment.end <= 60
        whole = work.transcription
        assert whole.samples == 60 * RATE
        assert (whole.features, whole.frames) == (7 * len(decoders.sizes), 3 * len(decoders.sizes))
        assert whole.text == " ".join(f"s{start}" for start in starts)
        assert whole.confidence == 0.5

    run_virtual(scenario())


def test_a_recording_without_speech_has_no_segments() -> None:
    async def scenario() -> None:
        work = recording(Decoders(lambda _: 1), places(1))
        assert await all_segments(work, Tape(0)) == []
        assert (work.transcription.text, work.transcription.confidence) == ("", None)

    run_virtual(scenario())


def test_no_more_is_read_than_is_decoded() -> None:
    """All places are taken, one more piece waits, and the cutter looks ahead."""

    async def scenario() -> None:
        tape = Tape(1000)
        async with aclosing(recording(Decoders(lambda _: 1e6), places(4)).segments(tape)) as segments:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(segments), 100)
            assert tape.read <= 5 * 2 + 3 + 1
        await asyncio.sleep(2e6)

    run_virtual(scenario())


def test_a_slow_client_stops_the_reading() -> None:
    async def scenario() -> None:
        tape = Tape(1000)
        async with aclosing(recording(Decoders(lambda _: 0.1), places(4)).segments(tape)) as segments:
            await anext(segments)
            await asyncio.sleep(1000)
            assert tape.read <= (MAX_UNDELIVERED + 3) * 2 + 3 + 1
            await anext(segments)
            await asyncio.sleep(10)

    run_virtual(scenario())


def test_the_first_segment_comes_before_the_rest_is_read() -> None:
    async def scenario() -> None:
        tape = Tape(1000)
        async with aclosing(recording(Decoders(lambda _: 1), places(2)).segments(tape)) as segments:
            assert (await anext(segments)).id == 0
            assert asyncio.get_running_loop().time() == 1
            assert tape.read < 20

    run_virtual(scenario())


def test_closing_the_iterator_stops_everything() -> None:
    async def scenario() -> None:
        tape, decoders, limited = Tape(1000), Decoders(lambda second: 50 if second else 0.5), places(4)
        async with aclosing(recording(decoders, limited).segments(tape)) as segments:
            await anext(segments)
        read = tape.read
        await asyncio.sleep(0)
        assert decoders.given_up == decoders.at_work > 0
        await asyncio.sleep(49)
        assert tape.read == read
        assert decoders.at_work, "what Triton works on keeps its places"
        await asyncio.sleep(10)
        assert decoders.at_work == 0
        assert [await limited.decoding(Share()) for _ in range(4)]

    run_virtual(scenario())


@pytest.mark.parametrize("waits_for", ["a segment", "a place"])
def test_cancelling_stops_everything(waits_for: str) -> None:
    async def scenario() -> None:
        limited = places(1)
        held = await limited.decoding(Share()) if waits_for == "a place" else None
        work = asyncio.create_task(all_segments(recording(Decoders(lambda _: 5), limited), Tape(100)))
        await asyncio.sleep(2)
        work.cancel()
        await asyncio.wait({work})
        assert work.cancelled()
        if held:
            held.release()
        await asyncio.sleep(10)
        assert await limited.decoding(Share())

    run_virtual(scenario())


def test_damage_ends_the_recording_after_the_segments_before_it() -> None:
    async def scenario() -> None:
        found: list[Segment] = []
        segments = recording(Decoders(lambda _: 1), places(2)).segments(Tape(100, breaks_at=50))

        async def listen() -> None:
            async for segment in segments:
                found.append(segment)  # noqa: PERF401 (those before the error count)

        with pytest.raises(ApiError) as error:
            await listen()
        assert error.value.kind is ErrorKind.UNDECODABLE_AUDIO
        assert len(found) > 15
        await asyncio.sleep(10)

    run_virtual(scenario())


def test_a_piece_that_fails_ends_the_recording() -> None:
    async def scenario() -> None:
        tape, decoders, limited = Tape(1000), Decoders(lambda _: 1, fails_at=20), places(3)
        with pytest.raises(ApiError) as error:
            await all_segments(recording(decoders, limited), tape)
        assert error.value.kind is ErrorKind.BACKEND_FAILED
        assert tape.read < 60
        await asyncio.sleep(10)
        assert [await limited.decoding(Share()) for _ in range(3)]

    run_virtual(scenario())


def test_separate_channels_are_labelled() -> None:
    async def scenario() -> None:
        work = recording(Decoders(lambda _: 1), places(4))
        segments = await all_segments(work, Tape(30, channels=2), separate=True)
        assert {segment.channel for segment in segments} == {0, 1}
        assert all(word["channel"] == segment.channel for segment in segments for word in segment.words)
        for channel in (0, 1):
            starts = [segment.start for segment in segments if segment.channel == channel]
            assert starts == sorted(starts)
        assert work.transcription.samples == 30 * RATE, "the length of the recording, not of its channels"

    run_virtual(scenario())


def test_a_quota_is_charged_as_audio_is_read() -> None:
    """A recording that has begun goes on; its excess delays the caller's next one."""

    async def scenario() -> None:
        quotas = Quotas(Settings(max_audio_rate_per_key=1.0), asyncio.get_running_loop().time)
        limited = places(1)
        segments = recording(Decoders(lambda _: 1), limited, quotas, caller=1).segments(Tape(1000))
        async with aclosing(segments):
            await anext(segments)
        quotas.spend(1, 0.0)  # audio that was not read is not charged
        assert len(await all_segments(recording(Decoders(lambda _: 0.01), limited, quotas, caller=1), Tape(200))) > 50
        with pytest.raises(ApiError) as error:
            await all_segments(recording(Decoders(lambda _: 1), limited, quotas, caller=1), Tape(5))
        assert error.value.kind is ErrorKind.QUOTA_EXCEEDED
        assert error.value.retry_after_secs is not None
        assert 100 < error.value.retry_after_secs < 200

    run_virtual(scenario())
