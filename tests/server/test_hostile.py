"""Clients that are slow, silent, do not read, send too much, or vanish; ``make chaos`` runs many beside paced streams."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import psutil
import pytest
from starlette.websockets import WebSocket

from amira.ports import LOOPBACK, Ports
from tests.support import hostile
from tests.support.chaos import Proxy, p95, speak
from tests.support.clients import END, KEEPALIVE, converse, cut, gateway_metrics, growth, open_socket, transcribe
from tests.support.commands import until
from tests.support.hostile import PING, frame, peer
from tests.support.servers import Gateway, Recordings, run_gateway

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]
RAW = {"Content-Type": "audio/pcm"}

pytestmark = pytest.mark.usefixtures("no_sequence_left")


async def none_active(gateway: Gateway) -> bool:
    return not (await gateway_metrics(gateway.url))["asr_active_connections", ()]


async def dripping(body: bytes, piece_bytes: int, pause_secs: float) -> AsyncIterator[bytes]:
    for start in range(0, len(body), piece_bytes):
        yield body[start : start + piece_bytes]
        await asyncio.sleep(pause_secs)


async def test_missing_body_is_refused(make_gateway: MakeGateway, http: httpx.AsyncClient) -> None:
    """It holds no place meanwhile."""
    async with make_gateway(stream_timeout_secs=0.5, max_concurrent_batches=1, inference_queue_size=0) as gateway:
        reader, writer = await asyncio.open_connection(LOOPBACK, gateway.server.port)
        writer.write(hostile.POST + bytes(1000))
        await asyncio.sleep(0.2)
        assert (await http.post(gateway.batch_url(), content=bytes(3200), headers=RAW)).status_code == 200
        answer = await reader.readuntil(b"retry_after_ms")
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code":"body_too_slow"' in answer
        assert b"16000 bytes per second" in answer
        assert (await http.post(gateway.batch_url(), content=bytes(3200), headers=RAW)).status_code == 200
        writer.close()


async def test_slow_body_within_the_limit(make_gateway: MakeGateway, http: httpx.AsyncClient) -> None:
    async with make_gateway(stream_timeout_secs=0.5) as gateway:
        answer = await http.post(gateway.batch_url(), content=dripping(bytes(96_000), 8000, 0.1), headers=RAW)
        assert answer.status_code == 200


async def test_client_that_never_reads_is_freed(make_gateway: MakeGateway, recordings: Recordings) -> None:
    """Even its socket, although the client's kernel still acknowledges data."""
    async with make_gateway(stream_timeout_secs=1) as gateway:
        before = psutil.Process().num_fds()
        async with peer(gateway.server.port, receive_bytes=2304) as deaf:
            await deaf.upgrade()
            await deaf.send_bytes(frame(recordings["jfk"][:64_000].tobytes()))
            flood = frame(bytes(125), PING) * 1000
            with contextlib.suppress(asyncio.TimeoutError, OSError):
                while True:
                    await asyncio.wait_for(deaf.send_bytes(flood), 1)
            began = time.monotonic()
            while (await gateway_metrics(gateway.url))["asr_active_connections", ()]:
                await asyncio.sleep(0.05)
            while psutil.Process().num_fds() > before + 2:  # that of the client, and that of the request for metrics
                await asyncio.sleep(0.05)
            assert time.monotonic() - began < 5


async def test_slow_reader_is_closed_and_counted(
    make_gateway: MakeGateway, recordings: Recordings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads fast enough for TCP. Neither a partial nor the error that ends the stream arrives in time."""
    send = WebSocket.send

    async def send_slowly(socket: WebSocket, message: Any) -> None:
        if message["type"] == "websocket.send":
            await asyncio.sleep(60)
        await send(socket, message)

    monkeypatch.setattr(WebSocket, "send", send_slowly)
    async with make_gateway(stream_timeout_secs=1) as gateway, open_socket(gateway.stream_url()) as socket:
        before = await gateway_metrics(gateway.url)
        for second in cut(recordings["jfk"], 16_000):
            await socket.send(second)
        await socket.wait_closed()
        grown = growth(before, await gateway_metrics(gateway.url))
    assert grown("asr_rejections_total", reason="stream_idle") == 1
    assert grown("asr_websocket_closes_total", code="4408") == 1
    assert grown("asr_requests_total", endpoint="stream", model="amira", status="101") == 1


async def test_flood_of_small_frames_closes_4429(make_gateway: MakeGateway) -> None:
    async with make_gateway(stream_timeout_secs=1) as gateway:
        conversation = await converse(gateway.stream_url(), [KEEPALIVE] * 2500)
    assert conversation.close_code == 4429
    assert conversation.error["code"] == "quota_exceeded"
    assert "500 frames per second" in conversation.error["message"]


async def test_lost_client_stops_decoding(triton: Ports, recordings: Recordings) -> None:
    """22 s of audio wait for a slow Triton; only audio in flight is decoded."""
    proxy = Proxy(triton)
    proxy.delay_secs = 0.3
    async with proxy.running(), run_gateway(triton_endpoint=f"{LOOPBACK}:{proxy.port}") as gateway:
        earlier = await gateway_metrics(gateway.url)
        connection = await open_socket(gateway.stream_url())
        for piece in [*cut(recordings["jfk"], 16_000)] * 2:
            await connection.send(piece)
        await connection.send(END)
        connection.transport.abort()
        await until(lambda: none_active(gateway), 10)
        grown = growth(earlier, await gateway_metrics(gateway.url))
    assert grown("asr_audio_seconds_total", endpoint="stream", model="amira") < 15


async def test_fast_streams_give_way_to_real_time(make_gateway: MakeGateway, recordings: Recordings) -> None:
    """Beside ten streams that send as fast as possible, a paced stream gets its partials in time; the ten get their finals."""
    async with make_gateway(max_concurrent_streams=16) as gateway:
        jfk = recordings["jfk"]
        plain = (await transcribe(gateway.stream_url(), jfk)).final
        paced = asyncio.create_task(speak(gateway.stream_url(), jfk))
        await asyncio.sleep(1)
        began = time.monotonic()
        fast = await asyncio.gather(*(transcribe(gateway.stream_url(), jfk) for _ in range(10)))
        fast_secs = time.monotonic() - began
        said = await paced
    assert all(conversation.final == plain for conversation in fast)
    assert said.finals == [plain["text"]]
    # On a machine that is busy with other tests all streams are slower.
    assert p95([secs for _, secs in said.latencies]) < max(3, fast_secs / 2)


async def test_backpressure_reaches_the_client(triton: Ports) -> None:
    """The kernel's buffers are small; by default they would hold megabytes per stream beyond the gateway's limits."""
    proxy, capacity = Proxy(triton), 2**20
    async with (
        proxy.running(),
        run_gateway(triton_endpoint=f"{LOOPBACK}:{proxy.port}", audio_buffer_capacity=capacity) as gateway,
        peer(gateway.server.port) as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        assert await client.upgrade()
        proxy.silent = True
        second, sent_bytes = frame(bytes(32_000)), 0
        with contextlib.suppress(asyncio.TimeoutError):
            while True:
                await asyncio.wait_for(client.send_bytes(second), 0.5)
                sent_bytes += len(second)
        proxy.silent = False
        assert capacity < sent_bytes < capacity + 2**20


def in_use() -> tuple[int, int]:
    """Return the numbers of descriptors and of tasks, without the short tasks of the gateway's pollers."""
    tasks = [task for task in asyncio.all_tasks() if "Event.wait" not in repr(task.get_coro())]
    return psutil.Process().num_fds(), len(tasks)


async def test_hostile_clients_of_every_kind_at_once(make_gateway: MakeGateway, recordings: Recordings) -> None:
    jfk = recordings["jfk"]
    async with make_gateway(max_concurrent_streams=32, stream_timeout_secs=2) as gateway:
        text = (await transcribe(gateway.stream_url(), jfk)).final["text"]
        before = in_use()
        paced = asyncio.create_task(speak(gateway.stream_url(), jfk))
        await asyncio.sleep(1)
        crowds = {"never_read": 2, "half_open": 3, "tiny_frames": 4, "vanish": 8}
        command = (sys.executable, hostile.__file__)
        processes = [
            await asyncio.create_subprocess_exec(
                *command, kind, str(gateway.server.port), "6", str(count), stdout=asyncio.subprocess.DEVNULL
            )
            for kind, count in crowds.items()
        ]
        said = await paced
        assert [await process.wait() for process in processes] == [0] * len(processes)
        assert said.finals == [text]
        assert p95([secs for _, secs in said.latencies]) < 2.5
        began = time.monotonic()
        while in_use() > before:
            assert time.monotonic() - began < 10, "descriptors or tasks are left"
            await asyncio.sleep(0.1)
