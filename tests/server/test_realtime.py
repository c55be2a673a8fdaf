"""OpenAI's realtime transcription sessions, by OpenAI's own client and by plain WebSockets."""

from __future__ import annotations

import asyncio
import base64
import io
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
import soundfile
import soxr
from agents.voice import StreamedAudioInput, STTModelSettings
from agents.voice.models.openai_stt import OpenAISTTModel
from openai import AsyncOpenAI
from openai.resources.realtime.realtime import AsyncRealtimeConnection
from websockets.exceptions import InvalidStatus

from tests.support.clients import Conversation, cut, gateway_metrics, listen, open_socket, transcribe
from tests.support.commands import until
from tests.support.servers import Gateway, Recordings, Samples

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]
Event = dict[str, Any]

KEY = "a-key-of-tests"
COMPLETED = "conversation.item.input_audio_transcription.completed"
DELTA = "conversation.item.input_audio_transcription.delta"
FAILED = "conversation.item.input_audio_transcription.failed"
RATE = 16_000


@pytest.fixture(scope="module")
async def keyed(make_gateway: MakeGateway) -> AsyncIterator[Gateway]:
    async with make_gateway(max_concurrent_streams=8, api_keys=(KEY,), session_key="sixteen characters") as running:
        yield running


@pytest.fixture
async def client(keyed: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(api_key=KEY, base_url=f"{keyed.url}/v1", max_retries=0) as running:
        yield running


@pytest.fixture(scope="module")
def speech(recordings: Recordings) -> Samples:
    """Two utterances between pauses."""
    first, second = recordings["jfk"], recordings["2033-164914-0000"]
    pause = np.zeros(RATE, np.int16)
    spoken: Samples = np.concatenate((pause, first[: 5 * RATE], pause, second[: 5 * RATE], pause))
    return spoken


def at_24_khz(samples: Samples) -> Samples:
    resampled: Samples = soxr.resample(samples, RATE, 24_000)
    return resampled


def append(samples: Samples) -> Event:
    return append_bytes(samples.tobytes())


def update(**audio_input: Any) -> Event:
    return {"type": "session.update", "session": {"type": "transcription", "audio": {"input": audio_input}}}


def append_bytes(audio: bytes) -> Event:
    return {"type": "input_audio_buffer.append", "audio": base64.b64encode(audio).decode()}


def encode(samples: Samples, format_: Event) -> bytes:
    """Return 16 kHz samples in a format; G.711 by libsndfile."""
    kind, rate = format_["type"], format_.get("rate", 8000)
    resampled = soxr.resample(samples, RATE, rate)
    if kind == "audio/pcm":
        return bytes(resampled.tobytes())
    file = io.BytesIO()
    soundfile.write(file, resampled, rate, "ULAW" if kind == "audio/pcmu" else "ALAW", format="RAW")
    return file.getvalue()


def check(events: list[Event]) -> dict[str, str]:
    """Check ids, order and deltas; return the transcript of each item that has one."""
    assert len({event["event_id"] for event in events}) == len(events)
    assert events[0]["type"] == "session.created"
    transcripts: dict[str, str] = {}
    deltas: defaultdict[str, str] = defaultdict(str)
    order: defaultdict[str, list[str]] = defaultdict(list)
    for event in events:
        item_id = event.get("item_id") or event.get("item", {}).get("id")
        if item_id:
            order[item_id].append(event["type"].removeprefix("conversation.item.input_audio_transcription."))
        if event["type"] == DELTA:
            deltas[item_id] += event["delta"]
        elif event["type"] == COMPLETED:
            assert event["transcript"] == deltas[item_id]
            transcripts[item_id] = event["transcript"]
    for kinds in order.values():
        steps = [kind for kind in kinds if kind != "delta"]
        prefix = ["input_audio_buffer.speech_started", "input_audio_buffer.speech_stopped"] if len(steps) > 4 else []
        expected = ["input_audio_buffer.committed", "conversation.item.added", "conversation.item.done"]
        assert steps[:-1] == prefix + expected
        assert kinds[-1] in ("completed", "failed")
    return transcripts


async def finish(connection: AsyncRealtimeConnection) -> list[Event]:
    """End the audio as the agents SDK does, and return all events until everything is transcribed."""
    await send(connection, {"type": "input_audio_buffer.commit", "event_id": "last"}, {"type": "input_audio_buffer.clear"})
    events: list[Event] = []
    while not settled(events):
        events.append(orjson.loads(await asyncio.wait_for(connection.recv_bytes(), 60)))
    return events


def settled(events: list[Event]) -> bool:
    kinds = Counter(event["type"] for event in events)
    committed = kinds["input_audio_buffer.committed"]
    return bool(kinds["input_audio_buffer.cleared"]) and committed == kinds[COMPLETED] + kinds[FAILED]


async def send(connection: AsyncRealtimeConnection, *events: Event) -> None:
    for event in events:
        await connection.send(event)  # type: ignore[arg-type]


async def test_commits_of_the_client(client: AsyncOpenAI, keyed: Gateway, speech: Samples) -> None:
    plain = (await transcribe(keyed.stream_url(), speech, additional_headers={"Authorization": f"Bearer {KEY}"})).final["text"]
    async with client.realtime.connect(model="amira") as connection:
        await send(connection, update(format=PCM_16, turn_detection=None, transcription={"model": "gpt-4o-transcribe"}))
        for _ in range(2):
            for piece in cut(speech, 3200):
                await connection.input_audio_buffer.append(audio=base64.b64encode(piece).decode())
            await connection.input_audio_buffer.commit()
        events = await finish(connection)
    assert events[1]["type"] == "session.updated"
    assert events[1]["session"]["audio"]["input"]["turn_detection"] is None
    assert list(check(events).values()) == [plain, plain]
    (error,) = (event["error"] for event in events if event["type"] == "error")
    assert (error["code"], error["event_id"]) == ("input_audio_buffer_commit_empty", "last")
    usage = next(event["usage"] for event in events if event["type"] == COMPLETED)
    assert usage == {"type": "duration", "seconds": pytest.approx(len(speech) / RATE, abs=0.001)}


PCM_24: Event = {"type": "audio/pcm", "rate": 24_000}
PCM_16: Event = {"type": "audio/pcm", "rate": 16_000}
PCM_8: Event = {"type": "audio/pcm", "rate": 8_000}
ULAW, ALAW = {"type": "audio/pcmu"}, {"type": "audio/pcma"}
SERVER_VAD = {"type": "server_vad"}
SEMANTIC_VAD = {"type": "semantic_vad", "eagerness": "high"}
TURNS = pytest.mark.parametrize("detection", [None, SERVER_VAD], ids=["commits", "server_vad"])


@pytest.mark.parametrize(
    ("detection", "format_"),
    [
        (SERVER_VAD, PCM_24),
        (SEMANTIC_VAD, PCM_24),
        (SERVER_VAD, PCM_16),
        (SERVER_VAD, PCM_8),
        (SERVER_VAD, ULAW),
        (SERVER_VAD, ALAW),
    ],
)
async def test_turns_of_the_detector(client: AsyncOpenAI, speech: Samples, detection: Event, format_: Event) -> None:
    audio = encode(speech, format_)
    async with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        await send(connection, update(turn_detection=detection, format=format_))
        for at in range(0, len(audio), 4800):
            await connection.input_audio_buffer.append(audio=base64.b64encode(audio[at : at + 4800]).decode())
        events = await finish(connection)
    transcripts = check(events)
    assert len([text for text in transcripts.values() if text]) >= 2
    starts = [event["audio_start_ms"] for event in events if event["type"] == "input_audio_buffer.speech_started"]
    stops = [event["audio_end_ms"] for event in events if event["type"] == "input_audio_buffer.speech_stopped"]
    assert starts[0] == pytest.approx(1000, abs=500)
    assert len(stops) == len(starts)
    assert all(0.5 < stop - start < 12_000 for start, stop in zip(starts, stops, strict=True))
    committed = [event for event in events if event["type"] == "input_audio_buffer.committed"]
    followed = [None, *(event["item_id"] for event in committed)][: len(committed)]
    assert [event["previous_item_id"] for event in committed] == followed


async def test_updates_commits_and_clears_in_any_order(gateway: Gateway, speech: Samples) -> None:
    second = speech[RATE : 2 * RATE]
    steps: list[tuple[Event, str | None]] = [  # with the error that it causes
        (CLEAR, None),
        (COMMIT, "input_audio_buffer_commit_empty"),
        (update(turn_detection=None, format=PCM_16), None),
        (append(second), None),
        (update(format=ULAW), None),  # within an item
        (append_bytes(encode(second, ULAW)), None),
        (COMMIT, None),
        (CLEAR, None),
        (append_bytes(encode(second, ULAW)), None),
        (CLEAR, None),
        (COMMIT, "input_audio_buffer_commit_empty"),
        (update(turn_detection=SERVER_VAD, format=PCM_16), None),
        (append(speech[: 3 * RATE]), None),
        (update(turn_detection=SEMANTIC_VAD), None),  # within speech
        (append(speech[3 * RATE : 4 * RATE]), None),
        (COMMIT, None),
        (update(turn_detection=None, transcription={"model": "whisper-1", "delay": "minimal"}), None),
        (append(second), None),
        (update(turn_detection=SERVER_VAD), None),  # within an item without detection
        (COMMIT, None),
        (update(format=PCM_8), None),
        (append_bytes(encode(second[:800], PCM_8)), None),
        (COMMIT, "input_audio_buffer_commit_empty"),
        (CLEAR, None),
    ]
    cleared = [event for event, _ in steps].count(CLEAR)
    async with open_socket(realtime_url(gateway)) as socket:
        for event, _ in steps:
            await socket.send(orjson.dumps(event).decode())
        messages: list[Event] = []
        while not (settled(messages) and [each["type"] for each in messages].count("input_audio_buffer.cleared") == cleared):
            messages.append(orjson.loads(await asyncio.wait_for(socket.recv(), 60)))
    transcripts = check(messages)
    assert [each["error"]["code"] for each in messages if each["type"] == "error"] == [code for _, code in steps if code]
    assert len(transcripts) == 3
    usages = [each["usage"]["seconds"] for each in messages if each["type"] == COMPLETED]
    assert (usages[0], usages[2]) == (pytest.approx(2, abs=0.01), pytest.approx(1, abs=0.01))


@pytest.mark.parametrize("query", ["?intent=transcription&model=gpt-realtime-whisper", ""])
async def test_model_without_turn_detection_waits_for_commits(gateway: Gateway, speech: Samples, query: str) -> None:
    begin = update(format=PCM_16, transcription={"model": "gpt-realtime-whisper"})
    heard = await talk(gateway, begin, append(speech), COMMIT, until_type=COMPLETED, query=query)
    (transcript,) = check(heard.messages).values()
    assert "fellow" in transcript
    assert {"error", "input_audio_buffer.speech_started"}.isdisjoint(message["type"] for message in heard.messages)
    assert heard.messages[1]["session"]["audio"]["input"]["turn_detection"] is None


async def test_client_secret_opens_sessions_until_it_expires(client: AsyncOpenAI, keyed: Gateway) -> None:
    session: Any = {"type": "transcription", "audio": {"input": {"turn_detection": None, "transcription": {"language": "en"}}}}
    secret = await client.realtime.client_secrets.create(expires_after={"anchor": "created_at", "seconds": 10}, session=session)
    assert secret.value.startswith("ek_")
    assert secret.session.type == "transcription"
    assert secret.session.object == "realtime.transcription_session"
    by_header: dict[str, Any] = {"additional_headers": {"Authorization": f"Bearer {secret.value}"}}
    by_subprotocol: dict[str, Any] = {"subprotocols": ["realtime", f"openai-insecure-api-key.{secret.value}"]}
    for options, subprotocol in ((by_header, None), (by_subprotocol, "realtime")):
        async with open_socket(realtime_url(keyed), **options) as socket:
            created = orjson.loads(await socket.recv())["session"]["audio"]["input"]
            assert created["turn_detection"] is None
            assert created["transcription"] == {"language": "en"}
            assert socket.subprotocol == subprotocol
    assert (await refused(keyed, f"{secret.value}x"))["code"] == "invalid_api_key"
    async with httpx.AsyncClient() as http:
        url = f"{keyed.url}/v1/realtime/client_secrets"
        again = await http.post(url, headers={"Authorization": f"Bearer {secret.value}"})
        assert again.status_code == 401, "a client secret makes client secrets"
        for wrong in ({"expires_after": {"seconds": 9}}, {"session": {"audio": {"input": {"format": {"type": "mp3"}}}}}):
            answer = await http.post(url, json=wrong, headers={"Authorization": f"Bearer {KEY}"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def realtime_url(gateway: Gateway, query: str = "") -> str:
    return f"{gateway.url.replace('http', 'ws', 1)}/v1/realtime{query}"


async def refused(gateway: Gateway, key: str, query: str = "") -> dict[str, Any]:
    """Return the error by which an upgrade is refused."""
    with pytest.raises(InvalidStatus) as caught:
        async with open_socket(realtime_url(gateway, query), additional_headers={"Authorization": f"Bearer {key}"}):
            pass
    error: dict[str, Any] = orjson.loads(caught.value.response.body or b"")["error"]
    return {**error, "status": caught.value.response.status_code}


async def test_refused_before_the_upgrade(keyed: Gateway) -> None:
    assert (await refused(keyed, "wrong"))["status"] == 401
    unknown = await refused(keyed, KEY, "?model=nobody")
    assert (unknown["status"], unknown["code"], unknown["type"]) == (404, "model_not_found", "invalid_request_error")


async def talk(gateway: Gateway, *events: Event | str, until_type: str = "", query: str = "") -> Conversation:
    """Send events, and collect what comes until an event of a type, or the close."""
    async with open_socket(realtime_url(gateway, query)) as socket:
        for event in events:
            await socket.send(event if isinstance(event, str) else orjson.dumps(event).decode())
        if not until_type:
            return await listen(socket)
        messages: list[Event] = []
        while not messages or messages[-1]["type"] != until_type:
            messages.append(orjson.loads(await asyncio.wait_for(socket.recv(), 60)))
        return Conversation(messages, None)


CLEAR = {"type": "input_audio_buffer.clear"}
COMMIT = {"type": "input_audio_buffer.commit"}


async def test_settings_without_effect_are_accepted(gateway: Gateway) -> None:
    transcription = {"model": "whisper-1", "prompt": "names", "keywords": ["a"], "languages": ["en"], "delay": "low"}
    given = {
        "noise_reduction": {"type": "near_field"},
        "transcription": transcription,
        "turn_detection": {"type": "server_vad", "create_response": True, "interrupt_response": True},
    }
    session = {"type": "transcription", "audio": {"input": given}, "include": ["item.input_audio_transcription.logprobs"]}
    heard = await talk(gateway, {"type": "session.update", "session": session}, until_type="session.updated")
    assert [message["type"] for message in heard.messages] == ["session.created", "session.updated"]
    answered = heard.messages[-1]["session"]
    assert answered["audio"]["input"]["transcription"] == transcription
    assert answered["audio"]["input"]["turn_detection"]["silence_duration_ms"] == 500
    assert answered["include"] == session["include"]


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ("no JSON", "invalid_json"),
        ("[]", "invalid_json"),
        ({"type": "response.create"}, "unknown_event"),
        ({"type": "input_audio_buffer.append", "audio": "*"}, "invalid_value"),
        ({"type": "input_audio_buffer.append"}, "invalid_value"),
        ({"type": "session.update"}, "invalid_value"),
        (update(format={"type": "audio/mp3"}), "invalid_value"),
        (update(turn_detection={"type": "server_vad", "threshold": 2}), "invalid_value"),
        (update(transcription={"model": "nobody"}), "model_not_found"),
    ],
)
async def test_wrong_event_is_answered_and_the_session_goes_on(gateway: Gateway, event: Event | str, code: str) -> None:
    given = {**event, "event_id": "mine"} if isinstance(event, dict) else event
    heard = await talk(gateway, given, CLEAR, until_type="input_audio_buffer.cleared")
    (error,) = (message["error"] for message in heard.messages if message["type"] == "error")
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    assert error["event_id"] == ("mine" if isinstance(event, dict) else None)


@pytest.mark.parametrize("format_", [ULAW, ALAW, PCM_8])
async def test_audio_of_the_telephone(gateway: Gateway, speech: Samples, format_: Event) -> None:
    audio = encode(speech[: 6 * RATE], format_)
    pieces = [append_bytes(audio[at : at + 801]) for at in range(0, len(audio), 801)]
    heard = await talk(gateway, update(format=format_, turn_detection=None), *pieces, COMMIT, until_type=COMPLETED)
    (transcript,) = check(heard.messages).values()
    assert {"so", "my", "fellow"} <= set(transcript.split())
    assert heard.messages[-1]["usage"]["seconds"] == pytest.approx(6, abs=0.001)


@pytest.mark.usefixtures("no_sequence_left")
async def test_cleared_audio_is_not_transcribed(gateway: Gateway, speech: Samples) -> None:
    begin = update(format=PCM_16, turn_detection=None)
    heard = await talk(gateway, begin, append(speech), CLEAR, COMMIT, until_type="error")
    assert heard.messages[-1]["error"]["code"] == "input_audio_buffer_commit_empty"
    assert "input_audio_buffer.committed" not in [message["type"] for message in heard.messages]


async def test_logprobs_on_request(gateway: Gateway, speech: Samples) -> None:
    begin = update(format=PCM_16, turn_detection=None)
    begin["session"]["include"] = ["item.input_audio_transcription.logprobs"]
    completed = (await talk(gateway, begin, append(speech), COMMIT, until_type=COMPLETED)).messages[-1]
    assert "".join(entry["token"] for entry in completed["logprobs"]) == completed["transcript"]
    assert all(entry["logprob"] <= 0 for entry in completed["logprobs"])


@pytest.mark.usefixtures("no_sequence_left")
async def test_one_connection_holds_one_place(make_gateway: MakeGateway, speech: Samples) -> None:
    async with make_gateway(max_concurrent_streams=1) as gateway:
        begin = update(format=PCM_16, turn_detection=None)
        turns = [event for at in range(5) for event in (append(speech[at * RATE : (at + 2) * RATE]), COMMIT)]
        async with open_socket(realtime_url(gateway)) as socket:
            for event in (begin, *turns):
                await socket.send(orjson.dumps(event).decode())
            assert (await refused(gateway, ""))["status"] == 503
            messages: list[Event] = []
            while [message["type"] for message in messages].count(COMPLETED) < 5:
                messages.append(orjson.loads(await asyncio.wait_for(socket.recv(), 60)))
        assert len(check(messages)) == 5

        async def free() -> bool:
            return (await gateway_metrics(gateway.url))["asr_active_connections", ()] == 0

        await until(free)


@TURNS
async def test_idle_session_ends_with_an_event_and_1000(
    make_gateway: MakeGateway, speech: Samples, detection: Event | None
) -> None:
    async with make_gateway(realtime_timeout_secs=0.5) as gateway:
        begin = update(format=PCM_16, turn_detection=detection)
        heard = await talk(gateway, begin, append(speech[: 3 * RATE]))
    assert heard.close_code == 1000
    assert heard.messages[-1]["error"]["code"] == "session_expired"
    assert len(check(heard.messages)) == 1, "what came is not transcribed"


@TURNS
async def test_long_session_ends_with_an_event_and_1000(
    make_gateway: MakeGateway, speech: Samples, detection: Event | None
) -> None:
    async with make_gateway(max_stream_audio_secs=3) as gateway:
        begin = update(format=PCM_16, turn_detection=detection)
        heard = await talk(gateway, begin, append(speech[: 3 * RATE]), append(speech[:1600]))
    assert heard.close_code == 1000
    assert heard.messages[-1]["error"]["code"] == "session_expired"
    assert len(check(heard.messages)) == 1


@TURNS
async def test_drain_ends_with_the_transcription_and_1012(
    make_gateway: MakeGateway, speech: Samples, detection: Event | None
) -> None:
    async with make_gateway(drain_timeout_secs=0.1) as gateway, open_socket(realtime_url(gateway)) as socket:
        for event in (update(format=PCM_16, turn_detection=detection), append(speech[: 3 * RATE])):
            await socket.send(orjson.dumps(event).decode())
        listener = asyncio.create_task(listen(socket))
        await asyncio.sleep(0.5)
        gateway.server.should_exit = True
        heard = await listener
    assert heard.close_code == 1012
    assert heard.messages[-1]["type"] == COMPLETED
    assert len(check(heard.messages)) == 1


async def test_silent_session_loses_its_place_to_another(make_gateway: MakeGateway) -> None:
    async with (
        make_gateway(max_concurrent_streams=1, reclaim_silent_secs=1) as gateway,
        open_socket(realtime_url(gateway)) as silent,
    ):
        await asyncio.sleep(1.1)
        async with open_socket(realtime_url(gateway)) as other:
            assert orjson.loads(await other.recv())["type"] == "session.created"
            heard = await listen(silent)
    assert heard.close_code == 1000
    assert heard.messages[-1]["error"]["code"] == "session_expired"


async def test_failed_item_leaves_the_session(make_gateway: MakeGateway, speech: Samples) -> None:
    """The audio exceeds the caller's quota."""
    async with make_gateway(api_keys=("key",), max_audio_rate_per_key=0.05) as gateway:
        begin = update(format=PCM_16, turn_detection=None)
        async with open_socket(realtime_url(gateway), additional_headers={"Authorization": "Bearer key"}) as socket:
            for event in (begin, append(speech[: 4 * RATE]), COMMIT, append(speech[:RATE]), COMMIT, CLEAR):
                await socket.send(orjson.dumps(event).decode())
            messages: list[Event] = []
            while len([message for message in messages if message["type"] in (FAILED, COMPLETED)]) < 2:
                messages.append(orjson.loads(await asyncio.wait_for(socket.recv(), 60)))
    check(messages)
    failed = [message["error"]["code"] for message in messages if message["type"] == FAILED]
    assert "quota_exceeded" in failed


async def test_agents_sdk(gateway: Gateway, speech: Samples) -> None:
    """Its default session: semantic_vad, 24 kHz, and a commit at the end."""
    audio = StreamedAudioInput()  # type: ignore[no-untyped-call]
    for piece in cut(at_24_khz(speech[: -RATE // 2]), 2400):
        await audio.add_audio(np.frombuffer(piece, np.int16))
    await audio.add_audio(None)
    async with AsyncOpenAI(api_key="any", base_url=f"{gateway.url}/v1") as client:
        model = OpenAISTTModel("gpt-4o-transcribe", client)
        session = await model.create_session(audio, STTModelSettings(), False, False)
        turns = [turn async for turn in session.transcribe_turns()]
    assert "fellow" in turns[0]
    assert len(turns) >= 2
