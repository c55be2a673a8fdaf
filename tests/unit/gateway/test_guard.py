"""Limits of connections, on a real socket before a small application."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
import uvicorn
import uvloop
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from amira.ports import LOOPBACK
from gateway import guard
from gateway.framing import MAX_HEAD_BYTES, PIECE_BYTES, SMALL_BYTES, SMALL_FRAMES_PER_SEC
from gateway.guard import Config
from gateway.limits.connects import MAX_ADDRESSES, ConnectionLimits, ConnectRates

T = TypeVar("T")
EMPTY_PING = b"\x89\x80\0\0\0\0"
KEEPALIVE = b"\x82\x81\0\0\0\0\x01"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


class Application:
    """Answers HTTP, and collects the messages of WebSockets, in a thread with an event loop of its own."""

    def __init__(self, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.loop = new_loop()
        self.messages: list[dict[str, Any]] = []
        self.may_read = True
        self.flooding_secs: Callable[[], float] = float
        self.pauses = False  # now and then, with a message in hand

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the server's loop."""
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})
        elif scope["type"] == "websocket":
            self.flooding_secs = scope["state"]["flooding_secs"]
            await receive()
            await send({"type": "websocket.accept"})
            while True:
                while not self.may_read:
                    await asyncio.sleep(0.01)
                message = await receive()
                if self.pauses and len(self.messages) % 5 == 0:
                    await asyncio.sleep(0.002)
                self.messages.append(message)
                if message["type"] == "websocket.disconnect":
                    return
                if message.get("text") == "close":
                    await send({"type": "websocket.close", "code": 1000})


@asynccontextmanager
async def serve(application: Application, connects: float = 1000, **settings: Any) -> AsyncIterator[int]:
    config = Config(
        application,
        ConnectionLimits(connects, 1000, exempt=lambda _: False),
        host=LOOPBACK,
        port=0,
        lifespan="off",
        log_config=None,
        ws_per_message_deflate=False,
        ws_ping_interval=None,
        **settings,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=application.loop.run_until_complete, args=(server.serve(),))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await asyncio.to_thread(thread.join)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def application(request: pytest.FixtureRequest) -> Iterator[Application]:
    application = Application(request.param)
    yield application
    application.loop.close()


@pytest.fixture
async def port(application: Application) -> AsyncIterator[int]:
    async with serve(application) as port:
        yield port


async def upgraded(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    writer.write(UPGRADE)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
    return reader, writer


@pytest.mark.parametrize("start", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_head_that_never_arrives_times_out(port: int, monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    monkeypatch.setattr(guard, "HEAD_SECS", 0.3)
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    began = time.monotonic()
    writer.write(start)
    rest = asyncio.create_task(reader.read())
    while not rest.done() and time.monotonic() - began < 2:
        await asyncio.sleep(0.05)
        writer.write(b"a" if start.endswith(b" ") else b"")
    assert await rest == b""
    assert 0.2 < time.monotonic() - began < 1
    writer.close()


async def test_head_that_never_ends_gets_400(port: int) -> None:
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    writer.write(b"GET / HTTP/1.1\r\nX-Long: " + b"a" * (MAX_HEAD_BYTES + 100))
    answer = await asyncio.wait_for(reader.read(), 5)
    assert answer.startswith(b"HTTP/1.1 400")
    writer.close()


@pytest.mark.parametrize(
    ("header", "status"),
    [(b"Cookie: " + b"x" * 9000, b"431"), (b"\r\n".join([b"X: x"] * 130), b"431"), (b"Content-Length: 4", b"400")],
)
async def test_invalid_upgrade_is_refused_by_status(application: Application, header: bytes, status: bytes) -> None:
    """And the server can stop afterwards."""
    async with serve(application) as port:
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
        writer.write(UPGRADE[:-2] + header + b"\r\n\r\n")
        assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 " + status)
    writer.close()


async def test_kept_connection_outlives_the_head_timeout(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between requests, and within a WebSocket, do not count as time of a head."""
    monkeypatch.setattr(guard, "HEAD_SECS", 0.2)
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    for _ in range(3):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200 OK" in await reader.readuntil(b"ok")
        await asyncio.sleep(0.4)
    writer.close()
    async with connect(f"ws://{LOOPBACK}:{port}") as socket:
        await asyncio.sleep(0.4)
        await (await socket.ping())


async def test_small_frames_are_rate_limited_without_loss(port: int, application: Application) -> None:
    frames = 4 * SMALL_FRAMES_PER_SEC
    _, writer = await upgraded(port)
    began = time.monotonic()
    writer.write(KEEPALIVE * frames)
    while len(application.messages) < frames:
        assert time.monotonic() - began < 10
        await asyncio.sleep(0.01)
    assert time.monotonic() - began > 1.5  # those of the first second pass at once
    assert application.messages == [{"type": "websocket.receive", "bytes": b"\x01"}] * frames
    writer.close()


async def test_audio_frames_are_not_rate_limited(port: int, application: Application) -> None:
    async with connect(f"ws://{LOOPBACK}:{port}", ping_interval=None) as socket:
        began = time.monotonic()
        for _ in range(4 * SMALL_FRAMES_PER_SEC):
            await socket.send(bytes(SMALL_BYTES))
        while len(application.messages) < 4 * SMALL_FRAMES_PER_SEC:
            await asyncio.sleep(0.01)
        assert time.monotonic() - began < 2
        assert application.flooding_secs() == 0


async def test_flood_is_reported(port: int, application: Application) -> None:
    _, writer = await upgraded(port)
    writer.write(KEEPALIVE * 20_000)
    await asyncio.sleep(1.5)
    assert 1 < application.flooding_secs() < 2
    writer.close()


async def test_ended_flood_is_not_reported(port: int, application: Application) -> None:
    _, writer = await upgraded(port)
    writer.write(KEEPALIVE * (SMALL_FRAMES_PER_SEC + 100))
    await asyncio.sleep(0.1)
    assert application.flooding_secs() > 0
    await asyncio.sleep(1.4)
    assert application.flooding_secs() == 0
    writer.close()


async def test_large_read_does_not_block_the_loop(port: int, application: Application) -> None:
    """40,000 frames in one segment are not parsed at once."""
    _, writer = await upgraded(port)
    for flood in (KEEPALIVE, EMPTY_PING):
        writer.write(flood * 40_000)

    async def longest_turn() -> float:
        """Return the longest turn of the loop in CPU seconds, so that other processes do not count."""
        longest, before = 0.0, time.thread_time()
        for _ in range(1000):
            await asyncio.sleep(0)
            now = time.thread_time()
            longest, before = max(longest, now - before), now
        return longest

    assert await application.run(longest_turn()) < 0.1
    assert len(application.messages) <= 2 * SMALL_FRAMES_PER_SEC
    writer.close()


async def test_client_that_does_not_read_is_not_read(port: int, application: Application) -> None:
    """Pongs would pile up in memory."""
    reader, writer = await upgraded(port)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    question = b"\x89\xfd" + bytes(4) + bytes(125)
    sent = 0

    async def ask() -> None:
        nonlocal sent
        while True:
            writer.write(question * 100)
            sent += 100 * len(question)
            await writer.drain()

    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(ask(), 2)
    assert sent < 20_000_000  # the buffers of two sockets
    writer.transport.abort()
    while not application.messages:  # the application got the disconnect
        await asyncio.sleep(0.01)


async def test_close_during_a_flood(port: int, application: Application) -> None:
    async with connect(f"ws://{LOOPBACK}:{port}", ping_interval=None) as socket:
        for _ in range(500):
            await socket.send(b"\x01")
        await socket.send("close")
        for _ in range(1000):
            await socket.send(b"\x01")
        await asyncio.wait_for(socket.wait_closed(), 10)
        assert socket.close_code == 1000
    parsed_with_it = PIECE_BYTES // len(KEEPALIVE)
    assert 501 < len(application.messages) <= 501 + parsed_with_it


async def test_slow_application_loses_no_frame(port: int, application: Application) -> None:
    application.may_read = False
    async with connect(f"ws://{LOOPBACK}:{port}", ping_interval=None) as socket:
        for i in range(700):
            await socket.send(i.to_bytes(2, "big") * SMALL_BYTES)
        await asyncio.sleep(0.2)
        application.may_read = True
        while len(application.messages) < 700:
            await asyncio.sleep(0.01)
    assert [message["bytes"][:2] for message in application.messages[:700]] == [i.to_bytes(2, "big") for i in range(700)]


async def test_messages_keep_their_order(port: int, application: Application) -> None:
    application.pauses = True
    messages = [f"{i}" if i % 7 == 0 else i.to_bytes(2, "big") * SMALL_BYTES for i in range(600)]
    async with connect(f"ws://{LOOPBACK}:{port}", ping_interval=None) as socket:
        for i, message in enumerate(messages):
            await socket.send([message] if i % 11 == 0 else message)  # some in fragments
            if i % 100 < 60:  # and some in a burst
                await asyncio.sleep(0.003)
        while len(application.messages) < len(messages):
            await asyncio.sleep(0.01)
    assert [message.get("text", message.get("bytes")) for message in application.messages[: len(messages)]] == messages


async def test_one_read_is_parsed_over_many_turns_of_the_loop(port: int, application: Application) -> None:
    frame = b"\x82\xfe" + (1280).to_bytes(2, "big") + bytes(4 + 1280)

    async def messages_by_turn() -> list[int]:
        counts, seen = [], 0
        while seen < 100:
            await asyncio.sleep(0)
            counts.append(len(application.messages) - seen)
            seen = len(application.messages)
        return counts

    _, writer = await upgraded(port)
    counting = asyncio.create_task(application.run(messages_by_turn()))
    await asyncio.sleep(0.1)
    writer.write(frame * 100)
    assert max(await counting) <= 5  # 4 KB, and what was left of the piece before
    writer.close()


async def test_oversized_frame_closes_1009_while_it_is_sent(application: Application) -> None:
    """Without a reset, which would lose the close frame."""
    async with serve(application, ws_max_size=1000) as port:
        for _ in range(10):
            async with connect(f"ws://{LOOPBACK}:{port}", ping_interval=None, max_size=None) as socket:
                with contextlib.suppress(ConnectionClosed):
                    await socket.send(bytes(20_000_000))
                began = time.monotonic()
                await asyncio.wait_for(socket.wait_closed(), 5)
                assert socket.close_code == 1009
                assert time.monotonic() - began < 1.5


async def test_connects_beyond_the_rate_are_reset(application: Application) -> None:
    async with serve(application, connects=10) as port:
        served = 0
        for _ in range(60):
            reader, writer = await asyncio.open_connection(LOOPBACK, port)
            with contextlib.suppress(ConnectionError):
                writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
                served += (await reader.read(15)).startswith(b"HTTP/1.1 200")
            writer.close()
        assert 20 <= served <= 30
        await asyncio.sleep(0.3)
        reader, writer = await asyncio.open_connection(LOOPBACK, port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.read(15)).startswith(b"HTTP/1.1 200")
        writer.close()


def test_each_address_has_its_own_rate_and_expires() -> None:
    rates = ConnectRates(1, exempt=lambda _: False)
    assert [rates.admit("10.0.0.1") for _ in range(3)] == [True, True, False]
    assert rates.admit("10.0.0.2")
    for number in range(MAX_ADDRESSES):
        rates.admit(str(number))
    assert rates.admit("10.0.0.1")
    assert len(rates) == MAX_ADDRESSES
