"""The live engine without a protocol: each state and each ending of a session, on a real Triton."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr

from amira.ports import LOOPBACK, Ports
from gateway.audio import RATE
from gateway.config.settings import Settings
from gateway.errors import ApiError, ErrorKind
from gateway.live.events import Acknowledged, Event, Failed, Final, Partial, SegmentFinal, Snapshot
from gateway.live.session import Session
from gateway.live.sessions import Sessions
from gateway.live.states import Ending, State
from gateway.resources import Resources
from tests.support.chaos import Proxy
from tests.support.clients import transcribe
from tests.support.servers import Gateway, Recordings, Samples

CALLER = 0
KEY = SecretStr("one for all gateways")
PIECE = 1600

pytestmark = pytest.mark.usefixtures("no_sequence_left")


@asynccontextmanager
async def engine(target: Ports | Proxy, **settings: Any) -> AsyncIterator[Sessions]:
    """Run an engine; afterwards it must hold nothing."""
    port = target.port if isinstance(target, Proxy) else target.grpc
    chosen = Settings(triton_endpoint=f"{LOOPBACK}:{port}", session_key=KEY, **settings)
    resources = Resources.from_settings(chosen)
    await resources.triton.start()
    sessions = Sessions(resources)
    before = asyncio.all_tasks()
    try:
        yield sessions
        shared = sessions._shared
        assert not shared.running
        assert shared.usage.used == 0
        assert not shared.priority._members
        left = {task for task in asyncio.all_tasks() - before if "session" in task.get_name()}
        assert not left
    finally:
        await resources.triton.close()


@pytest.fixture
async def sessions(triton: Ports) -> AsyncIterator[Sessions]:
    async with engine(triton) as running:
        yield running


@pytest.fixture(scope="module")
def speech(recordings: Recordings) -> Samples:
    """Return audio of several segments."""
    pause = np.zeros(40_000, np.int16)
    everything: Samples = np.concatenate([part for samples in recordings.values() for part in (samples, pause)])
    return everything[: 20 * RATE]


async def send(session: Session, samples: Samples, piece: int = PIECE) -> None:
    for start in range(0, len(samples), piece):
        await session.append(samples[start : start + piece])


async def events_of(session: Session) -> list[Event]:
    return [event async for event in session]


async def say(session: Session, samples: Samples, piece: int = PIECE) -> list[Event]:
    """Send everything, end, and collect the events."""
    collecting = asyncio.create_task(events_of(session))
    await send(session, samples, piece)
    session.end()
    return await collecting


def final_of(events: list[Event]) -> Snapshot:
    (final,) = (event for event in events if isinstance(event, Final))
    assert events[-1] is final
    return final.transcript


def error_of(events: list[Event]) -> ErrorKind:
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert events[-1] is failed
    return failed.error.kind


async def until(session: Session, kind: type[Any]) -> Any:
    async for event in session:
        if isinstance(event, kind):
            return event
    raise AssertionError(f"no {kind}")


async def test_session_goes_through_its_states(sessions: Sessions, speech: Samples) -> None:
    session = sessions.open("amira", CALLER)
    seen = [(session.state, session.ending)]

    def look() -> None:
        seen.append((session.state, session.ending))

    async with session:
        await asyncio.sleep(0.05)
        look()
        collecting = asyncio.create_task(events_of(session))
        await session.append(speech[:PIECE])
        look()
        await session.append(speech[PIECE : 5 * RATE])
        session.end()
        look()
        await session.append(speech)  # dropped
        events = await collecting
        look()
        assert session.received_secs == 5
    assert seen == [
        (State.CONNECTING, None),
        (State.CONNECTING, None),
        (State.OPEN, None),
        (State.ENDING, Ending.CLIENT),
        (State.ENDED, Ending.CLIENT),
    ]
    assert final_of(events).samples == 5 * RATE


async def test_events_are_what_the_face_sends(sessions: Sessions, gateway: Gateway, speech: Samples) -> None:
    async with sessions.open("amira", CALLER) as session:
        events = await say(session, speech)
    final = final_of(events)
    sent = (await transcribe(gateway.stream_url(), speech)).final
    assert (final.text, list(final.tokens), list(final.words)) == (sent["text"], sent["tokens"], sent["words"])
    assert final.text


async def test_segments_join_to_the_final(sessions: Sessions, speech: Samples) -> None:
    async with sessions.open("amira", CALLER) as session:
        events = await say(session, speech)
    final = final_of(events)
    segments = [event.transcript for event in events if isinstance(event, SegmentFinal)]
    assert segments
    ends = [*segments, final]
    assert "".join(end.text[end.settled.chars :] for end in ends) == final.text
    assert [token for end in ends for token in end.tokens[end.settled.tokens :]] == list(final.tokens)
    words = [word for segment in segments for word in segment.words]
    assert words == final.words[: len(words)]
    for event in events:
        assert isinstance(event, Partial | SegmentFinal | Final), "tokens are for resumable sessions"
        stable = event.transcript.text[: event.transcript.stable_chars]
        assert final.text.startswith(stable)


@pytest.mark.parametrize("samples", [0, 1, 15_360])
async def test_end_without_speech_gives_an_empty_final(sessions: Sessions, samples: int) -> None:
    async with sessions.open("amira", CALLER) as session:
        final = final_of(await say(session, np.zeros(samples, np.int16)))
    assert (final.text, final.tokens, final.words, final.confidence, final.samples) == ("", (), [], None, samples)


async def test_cuts_do_not_change_the_final(sessions: Sessions, speech: Samples) -> None:
    finals = []
    for piece in (160, 7001, len(speech)):
        async with sessions.open("amira", CALLER) as session:
            finals.append(final_of(await say(session, speech, piece)))
    assert finals[0] == finals[1] == finals[2]


async def test_sessions_of_one_connection_run_side_by_side(sessions: Sessions, speech: Samples) -> None:
    """Each session has its own options."""
    with sessions.admit(CALLER):
        balanced = sessions.open("amira", CALLER)
        low = sessions.open("amira", CALLER, options={"latency": "low"})
        async with balanced, low:
            slow, fast = await asyncio.gather(say(balanced, speech[: 8 * RATE], 800), say(low, speech[: 8 * RATE], 800))
    assert final_of(slow).samples == final_of(fast).samples
    assert len(fast) > len(slow)


async def test_drain_gives_the_final(sessions: Sessions, gateway: Gateway, speech: Samples) -> None:
    async with sessions.open("amira", CALLER) as session:
        collecting = asyncio.create_task(events_of(session))
        await send(session, speech[: 5 * RATE])
        sessions.drain()
        assert (session.state, session.ending) == (State.ENDING, Ending.DRAIN)
        await session.append(speech)  # dropped
        final = final_of(await collecting)
    assert session.ending is Ending.DRAIN
    assert final.text == (await transcribe(gateway.stream_url(), speech[: 5 * RATE])).final["text"]


async def test_drained_client_resumes_elsewhere(sessions: Sessions, triton: Ports, speech: Samples) -> None:
    """With a token there is no final: the stream continues at the token's position on another gateway."""
    async with sessions.open("amira", CALLER, resumable=True) as session:
        whole = final_of(await say(session, speech))
    async with sessions.open("amira", CALLER, resumable=True) as session:
        await session.append(speech[: 12 * RATE])
        acknowledged = await until(session, Acknowledged)
        assert isinstance(acknowledged, Acknowledged)
        text = ""
        while acknowledged.samples < 3 * RATE:
            event = await anext(session)
            if isinstance(event, Acknowledged):
                acknowledged = event
            elif isinstance(event, Partial | SegmentFinal):
                text = event.transcript.text
        session.drain()
        rest = await events_of(session)
        assert not [event for event in rest if isinstance(event, Final)]
        assert (session.state, session.ending) == (State.ENDED, Ending.DRAIN)
    settled = text[: acknowledged.settled.chars]
    async with engine(triton) as other, other.open("amira", CALLER, resumable=True) as session:
        session.resume(acknowledged.token)
        assert session.state is State.CONNECTING
        resumed = final_of(await say(session, speech[acknowledged.samples :]))
        assert session.received_secs == len(speech) / RATE
    assert settled + resumed.text == whole.text
    assert resumed.samples == whole.samples


async def test_bad_token_leaves_the_session_unchanged(sessions: Sessions, speech: Samples) -> None:
    async with sessions.open("amira", CALLER, resumable=True) as session:
        with pytest.raises(ApiError) as refused:
            session.resume("forged")
        assert refused.value.kind is ErrorKind.INVALID_SESSION
        assert session.state is State.CONNECTING
        assert final_of(await say(session, speech[: 2 * RATE])).samples == 2 * RATE


async def test_only_connecting_sessions_can_be_resumed(sessions: Sessions, speech: Samples) -> None:
    async with sessions.open("amira", CALLER) as plain, sessions.open("amira", CALLER, resumable=True) as begun:
        await begun.append(speech[:PIECE])
        for session in (plain, begun):
            with pytest.raises(RuntimeError, match="CONNECTING"):
                session.resume("any")


async def test_waiting_before_the_first_audio_holds_no_sequence(sessions: Sessions) -> None:
    """Nothing is sent to Triton before there is audio, so a late resumption is still possible."""
    endpoint = sessions._resources.triton.endpoints[0]
    async with sessions.open("amira", CALLER, resumable=True) as session:
        await asyncio.sleep(0.2)
        assert session.state is State.CONNECTING
        assert endpoint.sequences == 0


@pytest.mark.parametrize("moment", ["connecting", "open", "decoding", "ending"])
async def test_abandoning_frees_everything(sessions: Sessions, speech: Samples, moment: str) -> None:
    async with sessions.open("amira", CALLER) as session:
        collecting = asyncio.create_task(events_of(session))
        if moment != "connecting":
            await session.append(speech[: PIECE if moment == "open" else 10 * RATE])
        if moment in ("decoding", "ending"):
            while not sessions._resources.triton.endpoints[0].sequences:
                await asyncio.sleep(0.001)
        if moment == "ending":
            session.end()
        session.abandon()
        assert (session.state, session.ending) == (State.ENDED, Ending.ABANDONED)
        assert sessions._shared.usage.used == 0
        assert await collecting == []
        await session.append(speech)  # dropped
        session.end()
        session.drain()
        assert session.ending is Ending.ABANDONED
    assert sessions._resources.triton.endpoints[0].sequences == 0


async def test_abandoning_a_waiting_session_sends_nothing(sessions: Sessions, speech: Samples) -> None:
    """A stream that waits for its turn leaves at once, and the streams behind it continue."""
    priority = sessions._shared.priority
    in_real_time = priority.join()
    async with priority.turn(in_real_time, -1.0), sessions.open("amira", CALLER) as session:
        await session.append(speech[: 10 * RATE])
        while session.state is not State.OPEN or not session._waits_in_line:
            await asyncio.sleep(0.01)
        session.abandon()
        await asyncio.wait_for(session.wait_freed(), 1)
        assert sessions._resources.triton.endpoints[0].sequences == 0
    priority.leave(in_real_time)
    async with sessions.open("amira", CALLER) as session:
        assert final_of(await say(session, speech[: 2 * RATE])).samples == 2 * RATE


@pytest.mark.parametrize("moment", ["waiting for audio", "decoding", "appending"])
async def test_cancelled_face_frees_everything(triton: Ports, speech: Samples, moment: str) -> None:
    async with engine(triton, audio_buffer_capacity=64_000, max_frame_bytes=64_000) as sessions:

        async def face() -> None:
            async with sessions.open("amira", CALLER) as session:
                if moment == "waiting for audio":
                    await session.append(speech[:PIECE])
                    await anext(session)
                elif moment == "decoding":
                    await session.append(speech[:32_000])
                    await events_of(session)
                else:  # no consumer takes the events, so the buffer fills
                    await send(session, speech)

        running = asyncio.create_task(face())
        while not sessions._resources.triton.endpoints[0].sequences and moment != "waiting for audio":
            await asyncio.sleep(0.001)
        await asyncio.sleep({"waiting for audio": 0.05, "decoding": 0, "appending": 2}[moment])
        assert not running.done()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert sessions._resources.triton.endpoints[0].sequences == 0


async def test_twice_cancelled_face_frees_everything_later(sessions: Sessions, speech: Samples) -> None:
    """The engine does not depend on its face."""

    async def face() -> None:
        async with sessions.open("amira", CALLER) as session:
            await session.append(speech[:32_000])
            await events_of(session)

    running = asyncio.create_task(face())
    while not sessions._resources.triton.endpoints[0].sequences:
        await asyncio.sleep(0.001)
    for _ in range(2):
        running.cancel()
        await asyncio.sleep(0)
    await asyncio.gather(running, return_exceptions=True)
    await sessions.close(5)
    assert sessions._resources.triton.endpoints[0].sequences == 0


async def test_full_buffer_delays_the_client(triton: Ports, gateway: Gateway, speech: Samples) -> None:
    """Until the consumer takes its events; no audio is lost."""
    small = {"audio_buffer_capacity": 64_000, "max_frame_bytes": 64_000}
    async with engine(triton, **small) as sessions, sessions.open("amira", CALLER) as session:
        sending = asyncio.create_task(send(session, speech))
        await asyncio.sleep(2)
        assert not sending.done(), "the consumer has taken nothing, and more than the buffer was taken"
        assert session.received_secs < 10
        collecting = asyncio.create_task(events_of(session))
        await sending
        session.end()
        final = final_of(await collecting)
    assert final.text == (await transcribe(gateway.stream_url(), speech)).final["text"]


async def test_failing_triton_fails_the_session(triton: Ports, speech: Samples) -> None:
    proxy = Proxy(triton)
    async with proxy.running(), engine(proxy, inference_timeout_secs=0.5, recovery_timeout_secs=0) as sessions:
        async with sessions.open("amira", CALLER) as session:
            await session.append(speech[: 2 * RATE])
            await until(session, Partial)
            proxy.silent = True
            await session.append(speech[2 * RATE : 8 * RATE])
            events = await asyncio.wait_for(events_of(session), 10)
            assert error_of(events) is ErrorKind.BACKEND_TIMEOUT
            assert (session.state, session.ending) == (State.ENDED, Ending.FAILED)
            await session.append(speech)  # dropped
            proxy.silent = False
            proxy.reset()
        while sessions._resources.triton.endpoints[0].sequences:
            await asyncio.sleep(0.05)


async def test_recovery_of_triton_is_not_an_event(triton: Ports, gateway: Gateway, speech: Samples) -> None:
    proxy = Proxy(triton)
    async with (
        proxy.running(),
        engine(proxy, inference_timeout_secs=1) as sessions,
        sessions.open("amira", CALLER) as session,
    ):
        await session.append(speech[: 2 * RATE])
        await until(session, Partial)
        proxy.reset()
        final = final_of(await say(session, speech[2 * RATE : 6 * RATE]))
    assert final.text == (await transcribe(gateway.stream_url(), speech[: 6 * RATE])).final["text"]


async def test_used_up_quota_fails_the_session(triton: Ports, speech: Samples) -> None:
    async with engine(triton, max_audio_rate_per_key=0.05) as sessions, sessions.open("amira", CALLER) as session:
        collecting = asyncio.create_task(events_of(session))
        await send(session, speech)
        assert session.ending is Ending.FAILED
        assert error_of(await collecting) is ErrorKind.QUOTA_EXCEEDED
        assert session.received_secs == pytest.approx(3, abs=0.5)  # the burst, and the quota added meanwhile


async def test_stream_that_is_too_long_fails(triton: Ports, speech: Samples) -> None:
    async with engine(triton, max_stream_audio_secs=2) as sessions, sessions.open("amira", CALLER) as session:
        collecting = asyncio.create_task(events_of(session))
        await send(session, speech)
        assert error_of(await collecting) is ErrorKind.AUDIO_TOO_LONG


async def test_fault_of_ours_is_an_internal_error(sessions: Sessions, speech: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    async with sessions.open("amira", CALLER) as session:
        monkeypatch.setattr(session._publisher, "publish", lambda *_, **__: 1 / 0)
        events = await say(session, speech[: 2 * RATE])
        assert error_of(events) is ErrorKind.INTERNAL


@pytest.mark.parametrize("seed", range(4))
async def test_random_endings_free_everything(triton: Ports, speech: Samples, seed: int) -> None:
    """Many sessions at once, each ended in a random way at a random moment, by its client, its face or the server."""
    rng = np.random.default_rng(seed)

    async def one(sessions: Sessions, resumable: bool) -> None:
        async def face() -> list[Event]:
            async with sessions.open("amira", CALLER, resumable=resumable) as session:
                collecting = asyncio.create_task(events_of(session))
                sending = asyncio.create_task(send(session, speech[: int(rng.integers(0, 6 * RATE))], 3200))
                try:
                    await asyncio.sleep(rng.uniform(0, 0.5))
                    ending = rng.choice(["end", "drain", "abandon", "leave", "raise"])
                    if ending == "raise":
                        raise ZeroDivisionError
                    if ending != "leave":
                        getattr(session, ending)()
                        await asyncio.sleep(rng.uniform(0, 0.3))
                        late = rng.choice(["end", "drain", "abandon", "none"])
                        if late != "none":
                            getattr(session, late)()
                        return await collecting
                    return []
                finally:
                    session.abandon()
                    await asyncio.gather(sending, collecting, return_exceptions=True)

        running = asyncio.create_task(face())
        if rng.random() < 0.3:
            await asyncio.sleep(rng.uniform(0, 1))
            running.cancel()
        (events,) = await asyncio.gather(running, return_exceptions=True)
        if isinstance(events, BaseException):
            assert isinstance(events, ZeroDivisionError | asyncio.CancelledError), events
            return
        lasts = [event for event in events if isinstance(event, Final | Failed)]
        assert len(lasts) <= 1
        assert not lasts or (events[-1] is lasts[0] and isinstance(lasts[0], Final))

    settings = {"audio_buffer_capacity": 64_000, "max_frame_bytes": 64_000}
    async with engine(triton, **settings) as sessions:
        await asyncio.gather(*(one(sessions, bool(rng.integers(2))) for _ in range(16)))
        assert sessions._resources.triton.endpoints[0].sequences == 0


async def test_nothing_changes_after_the_final(sessions: Sessions, speech: Samples) -> None:
    async with sessions.open("amira", CALLER) as session:
        events = await say(session, speech[: 2 * RATE])
        for late in (session.end, session.drain, session.abandon):
            late()
        await session.append(speech)
        assert (session.state, session.ending) == (State.ENDED, Ending.CLIENT)
        assert await events_of(session) == []
    assert final_of(events).samples == 2 * RATE


async def test_places_and_quotas_are_held_while_admitted(triton: Ports) -> None:
    async with engine(triton, max_concurrent_streams=2, max_streams_per_key=1) as sessions:
        with sessions.admit(0):
            with pytest.raises(ApiError) as refused, sessions.admit(0):
                pass
            assert refused.value.kind is ErrorKind.QUOTA_EXCEEDED
            with sessions.admit(1), pytest.raises(ApiError) as refused, sessions.admit(2):
                pass
            assert refused.value.kind is ErrorKind.NO_CAPACITY
        with sessions.admit(0):
            pass


async def test_closing_the_engine_ends_what_is_left(sessions: Sessions, speech: Samples) -> None:
    async with sessions.open("amira", CALLER) as session:
        collecting = asyncio.create_task(events_of(session))
        await session.append(speech[: 4 * RATE])
        while not sessions._resources.triton.endpoints[0].sequences:
            await asyncio.sleep(0.001)
        await sessions.close(5)
        assert session.ending is Ending.ABANDONED
        await collecting
        assert sessions._resources.triton.endpoints[0].sequences == 0
