"""Resumption: a stream continues after its connection, or its gateway, is lost."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any

import numpy as np
import orjson
import pytest
from pydantic import SecretStr
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

from amira import LiveStream, Message, StreamError, Word
from amira.ports import LOOPBACK, Ports, free_ports
from gateway.config.settings import Settings
from gateway.live.resume import SessionToken, SessionTokens
from gateway.triton.breaker import BreakerState
from tests.support.chaos import Proxy, backends
from tests.support.clients import END, converse, cut, gateway_metrics, listen, open_socket, transcribe
from tests.support.commands import gateway_process, until
from tests.support.servers import Gateway, Recordings, Samples

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]
V2: dict[str, Any] = {"subprotocols": ["amira.v2"]}


@pytest.fixture(scope="module")
def speech(recordings: Recordings) -> Samples:
    """Return audio of several segments; at the end of the first, only times and scores of words change."""
    pause = np.zeros(40_000, np.int16)
    spoken = [recordings["jfk"][: 8 * 16_000], pause, *(part for samples in recordings.values() for part in (samples, pause))]
    everything: Samples = np.concatenate(spoken)
    return everything[: 32 * 16_000]


@pytest.fixture(scope="module")
async def plain(gateway: Gateway, speech: Samples) -> dict[str, Any]:
    """Return the final of the speech, sent without faults."""
    return (await transcribe(gateway.stream_url(), speech)).final


async def talk(stream: LiveStream, samples: Samples, pace: float = 8.0) -> None:
    for frame in cut(samples, 1600):
        await stream.send(frame)
        await asyncio.sleep(0.1 / pace)


def same(final: Message, plain: dict[str, Any]) -> bool:
    words = tuple(Word(word["word"], word["start"], word["end"], word["confidence"]) for word in plain["words"])
    return (final.text, final.tokens, final.words) == (plain["text"], tuple(plain["tokens"]), words)


async def drain(messages: AsyncIterable[Message]) -> None:
    async for _ in messages:
        pass


async def test_acks_advance_with_the_audio(gateway: Gateway, speech: Samples, plain: dict[str, Any]) -> None:
    conversation = await converse(gateway.stream_url(), [*cut(speech, 1600), END], pause_secs=0.02, **V2)
    acks = [message for message in conversation.messages if message["type"] == "ack"]
    assert len(acks) > 10
    assert [ack["samples"] for ack in acks] == sorted(ack["samples"] for ack in acks)
    assert acks[-1]["samples"] > len(speech) - 16_000 * 7
    assert acks[-1]["settled"]["chars"] > 0, "no segment was final"
    assert conversation.final == plain


async def test_stream_resumes_from_every_ack(make_gateway: MakeGateway, speech: Samples) -> None:
    async with (
        make_gateway(session_key="one for all gateways") as first,
        make_gateway(session_key="one for all gateways") as second,
    ):
        whole = await converse(first.stream_url(), [*cut(speech, 1600), END], pause_secs=0.01, **V2)
        text, acks = "", []
        words: list[dict[str, Any]] = []
        settled_words = words
        for message in whole.messages:
            if message["type"] == "ack":
                settled_words = words[: message["settled"]["words"]]
                assert settled_words == whole.final["words"][: len(settled_words)]
                acks.append((message, text[: message["settled"]["chars"]], settled_words))
            else:
                text, words = message["text"], settled_words + message["words"]
        for ack, settled, settled_words in acks[:: max(1, len(acks) // 3)]:
            resume = orjson.dumps({"type": "resume", "session": ack["session"]}).decode()
            async with open_socket(second.stream_url(), **V2) as socket:
                await socket.send(resume)
                for frame in [*cut(speech[ack["samples"] :], 16_000), END]:
                    await socket.send(frame)
                rest = (await listen(socket)).final
            assert settled + rest["text"] == whole.final["text"]
            assert whole.final["tokens"][ack["settled"]["tokens"] :] == rest["tokens"]
            assert settled_words + rest["words"] == whole.final["words"]
            assert rest["audio_processed_ms"] == whole.final["audio_processed_ms"]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("hello", "text_frame"),
        ("{}", "text_frame"),
        ('{"type":"resume"}', "text_frame"),
        ('{"type":"resume","session":7}', "text_frame"),
        ('{"type":"resume","session":"forged"}', "invalid_session"),
    ],
)
async def test_invalid_resume_is_refused(gateway: Gateway, text: str, code: str) -> None:
    async with open_socket(gateway.stream_url(), **V2) as socket:
        await socket.send(text)
        conversation = await listen(socket)
    assert conversation.error["code"] == code


async def test_token_of_another_service_is_refused(make_gateway: MakeGateway, speech: Samples) -> None:
    async with make_gateway() as first, make_gateway() as second:
        messages = (await transcribe(first.stream_url(), speech[: 16_000 * 8], **V2)).messages
        session = next(message["session"] for message in messages if message["type"] == "ack")
        async with open_socket(second.stream_url(), **V2) as socket:
            await socket.send(orjson.dumps({"type": "resume", "session": session}).decode())
            assert (await listen(socket)).error["code"] == "invalid_session"


async def test_client_resumes_after_every_lost_connection(
    triton: Ports, make_gateway: MakeGateway, speech: Samples, plain: dict[str, Any]
) -> None:
    assert triton
    async with make_gateway(max_concurrent_streams=4) as gateway:
        port = gateway.server.port
        proxy = Proxy(Ports(LOOPBACK, port, 0))
        async with proxy.running(), LiveStream(f"ws://{LOOPBACK}:{proxy.port}/v2/decode/stream/amira") as stream:
            talking = asyncio.create_task(talk(stream, speech))
            for _ in range(3):
                await asyncio.sleep(1.2)
                proxy.reset()
            await talking
            final = await asyncio.wait_for(stream.finish(), 60)
            assert stream.reconnects >= 3
            assert [message async for message in stream] == [final], "the final was lost"
        assert (await gateway_metrics(gateway.url))["asr_active_connections", ()] == 0
    assert same(final, plain)


@pytest.fixture(scope="module")
async def own_triton() -> AsyncIterator[Ports]:
    """A Triton for this module: a killed gateway leaves sequences behind until they time out."""
    async with backends(1, warm=False) as (backend,):
        yield backend.ports


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
async def test_client_resumes_at_the_next_gateway(
    own_triton: Ports, speech: Samples, plain: dict[str, Any], number: signal.Signals
) -> None:
    (port,) = free_ports(LOOPBACK, 1)
    async with LiveStream(f"ws://{LOOPBACK}:{port}/v2/decode/stream/amira") as stream:
        async with gateway_process(port, own_triton) as first:
            talking = asyncio.create_task(talk(stream, speech))
            await asyncio.sleep(2.5)
            first.send_signal(number)
            await first.wait()
        async with gateway_process(port, own_triton):
            await talking
            final = await asyncio.wait_for(stream.finish(), 60)
    assert same(final, plain)


async def test_slow_consumer_gets_the_newest_message(gateway: Gateway, speech: Samples) -> None:
    async with LiveStream(gateway.stream_url()) as stream:

        async def until_heard(ms: int) -> None:
            """Wait until a message about this much audio is ready; the consumer takes none meanwhile."""
            await until(lambda: stream._unread and stream._unread.audio_processed_ms > ms)

        messages = aiter(stream)
        await talk(stream, speech[: 16_000 * 10])
        await until_heard(5000)
        first = await anext(messages)
        await talk(stream, speech[16_000 * 10 :])
        await until_heard(20_000)
        newer = await anext(messages)
        final = await asyncio.wait_for(stream.finish(), 60)
        assert first.audio_processed_ms > 5000
        assert newer.audio_processed_ms > 20_000
        assert [message async for message in messages] == [final]
        assert [message async for message in stream] == []


async def test_client_waits_for_a_slow_server(
    make_gateway: MakeGateway, speech: Samples, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pings are answered after the audio before them is read; the kernels buffer most of it."""
    monkeypatch.setattr("amira.client.live.connect", partial(connect, ping_interval=0.1, ping_timeout=0.5))
    async with (
        make_gateway(max_frame_bytes=32_000, audio_buffer_capacity=32_000) as gateway,
        LiveStream(gateway.stream_url()) as stream,
    ):
        await stream.send(speech.tobytes())
        final = await asyncio.wait_for(stream.finish(), 60)
        assert stream.reconnects == 0
    assert same(final, plain)


async def test_client_leaves_a_silent_connection(
    gateway: Gateway, speech: Samples, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("amira.client.live.connect", partial(connect, ping_interval=0.2))
    monkeypatch.setattr("amira.client.live.SILENCE_SECS", 2.0)
    proxy = Proxy(Ports(LOOPBACK, gateway.server.port, 0))
    async with proxy.running(), LiveStream(f"ws://{LOOPBACK}:{proxy.port}/v2/decode/stream/amira") as stream:
        await asyncio.sleep(3)
        assert stream.reconnects == 0, "the client left a server that answers pings"
        talking = asyncio.create_task(talk(stream, speech))
        await asyncio.sleep(2)
        proxy.forget()
        await talking
        final = await asyncio.wait_for(stream.finish(), 20)  # sooner than the gateway finds it idle
        assert stream.reconnects == 1
    assert same(final, plain)


async def test_silence_does_not_count_as_time_without_a_server(gateway: Gateway, speech: Samples) -> None:
    proxy = Proxy(Ports(LOOPBACK, gateway.server.port, 0))
    async with proxy.running():
        url = f"ws://{LOOPBACK}:{proxy.port}/v2/decode/stream/amira"
        async with LiveStream(url, reconnect_secs=1) as stream:
            await asyncio.sleep(2.5)
            proxy.reset()
            await stream.send(speech[: 16_000 * 5].tobytes())
            assert (await asyncio.wait_for(stream.finish(), 60)).audio_processed_ms == 5000
            assert stream.reconnects == 1


async def test_client_gives_up_on_a_server_that_drops_connections() -> None:
    async def drop(socket: ServerConnection) -> None:
        socket.transport.abort()

    async with serve(drop, LOOPBACK, 0, subprotocols=[Subprotocol("amira.v2")]) as server:
        port = server.sockets[0].getsockname()[1]
        async with LiveStream(f"ws://{LOOPBACK}:{port}/", reconnect_secs=0.5) as stream:
            with pytest.raises(StreamError, match="closed with code 1006"):
                await asyncio.wait_for(stream.finish(), 10)
            assert stream.reconnects > 1


async def test_state_of_another_model_is_refused(make_gateway: MakeGateway, speech: Samples) -> None:
    """And this does not count as a failure of the Triton."""
    async with make_gateway(session_key="a key of one gateway") as gateway:
        endpoint = gateway.server._app.state.service.triton.endpoints[0]
        tokens = SessionTokens(Settings(session_key=SecretStr("a key of one gateway")))
        session = tokens.issue(SessionToken("amira", "balanced", 16_000, '{"version": 1}'))
        for _ in range(5):
            resume = orjson.dumps({"type": "resume", "session": session}).decode()
            conversation = await converse(gateway.stream_url(), [resume, speech[:32_000].tobytes(), END], **V2)
            assert conversation.close_code == 1007
            assert conversation.error["code"] == "invalid_session"
        assert endpoint.breaker.state is BreakerState.CLOSED


async def test_error_after_a_long_silence_is_retried() -> None:
    """Time without messages does not count as time without a server."""
    error = {"type": "backend", "code": "backend_failed", "message": "the recogniser failed", "retryable": True}
    final = {"type": "final", "text": "", "tokens": [], "words": [], "audio_processed_ms": 0}
    connections = 0

    async def fail_once(socket: ServerConnection) -> None:
        nonlocal connections
        connections += 1
        if connections == 1:
            await asyncio.sleep(2.5)
        await socket.send(orjson.dumps({"type": "error", "error": error} if connections == 1 else final).decode())

    async with serve(fail_once, LOOPBACK, 0, subprotocols=[Subprotocol("amira.v2")]) as server:
        port = server.sockets[0].getsockname()[1]
        async with LiveStream(f"ws://{LOOPBACK}:{port}/", reconnect_secs=1) as stream:
            await asyncio.wait_for(stream.finish(), 10)
            assert stream.reconnects == 1


async def test_iteration_raises_without_a_final(make_gateway: MakeGateway, gateway: Gateway, speech: Samples) -> None:
    async with make_gateway(max_stream_audio_secs=5) as strict, LiveStream(strict.stream_url()) as stream:
        messages = aiter(stream)
        await talk(stream, speech[: 16_000 * 5])
        await stream.send(b"\x00\x00")
        assert not (await anext(messages)).final
        with pytest.raises(StreamError) as failed:
            await drain(messages)
        assert failed.value.code == "audio_too_long"
    async with LiveStream(gateway.stream_url("nobody")) as stream:
        with pytest.raises(StreamError, match="404"):
            await drain(stream)
    async with LiveStream(gateway.stream_url()) as stream:
        await asyncio.sleep(0.1)
    for speaks_on in (drain(stream), stream.send(b"\x00\x00"), stream.finish()):
        with pytest.raises(StreamError) as left:
            await speaks_on
        assert left.value.code == "closed"


async def test_client_raises_permanent_errors(make_gateway: MakeGateway) -> None:
    async with make_gateway(api_keys=["key"]) as gateway, LiveStream(gateway.stream_url()) as stream:
        with pytest.raises(StreamError, match="401") as refused:
            await stream.finish()
        assert refused.value.code == "refused"
    (port,) = free_ports(LOOPBACK, 1)
    async with LiveStream(f"ws://{LOOPBACK}:{port}/", reconnect_secs=0.5) as stream:
        with pytest.raises(StreamError, match=r"no server for 0\.5 s") as unreachable:
            await stream.finish()
        assert unreachable.value.code == "unreachable"
        with pytest.raises(StreamError):
            await stream.send(b"\x00\x00")
        with pytest.raises(ValueError, match="3 bytes"):
            await stream.send(b"abc")
