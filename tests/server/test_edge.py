"""Small inputs that must not stop the server, and clients that must be served."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import struct
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import httpx
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from amira.ports import LOOPBACK, Ports, free_ports
from gateway.config.settings import Settings
from tests.support import hostile
from tests.support.clients import END, KEEPALIVE, converse, open_socket, transcribe
from tests.support.commands import AMIRA, gateway_process
from tests.support.hostile import TEXT, frame, peer
from tests.support.servers import Gateway, Recordings

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]
RAW = {"Content-Type": "audio/pcm"}
SILENCE = bytes(3200)
KEY, OTHER_KEY = "first-key-0123456789", "other-key-0123456789"

pytestmark = pytest.mark.usefixtures("no_sequence_left")


async def begin_post(port: int) -> asyncio.StreamWriter:
    """Send a request's head and a part of its body."""
    _, writer = await asyncio.open_connection(LOOPBACK, port)
    writer.write(hostile.POST + bytes(100))
    await writer.drain()
    return writer


async def test_missing_bodies_hold_no_place(make_gateway: MakeGateway, http: httpx.AsyncClient) -> None:
    async with make_gateway(max_concurrent_batches=1, inference_queue_size=1) as gateway:
        writers = [await begin_post(gateway.server.port) for _ in range(20)]
        await asyncio.sleep(0.3)
        assert (await http.post(gateway.batch_url(), content=SILENCE, headers=RAW)).status_code == 200
        detailed = (await http.get(f"{gateway.url}/health/detailed")).json()
        assert detailed["batches"]["active"] == 0
        for writer in writers:
            writer.close()


@pytest.mark.parametrize(("limit", "what"), [({"max_batches_per_key": 2}, "key"), ({"max_batches_per_address": 2}, "address")])
async def test_batches_have_a_quota(
    make_gateway: MakeGateway, http: httpx.AsyncClient, limit: dict[str, int], what: str
) -> None:
    async with make_gateway(api_keys=[KEY, OTHER_KEY], **limit) as gateway:
        head = hostile.POST.replace(b"Host: x\r\n", f"Host: x\r\nX-API-Key: {KEY}\r\n".encode())
        writers = []
        for _ in range(2):
            _, writer = await asyncio.open_connection(LOOPBACK, gateway.server.port)
            writer.write(head)
            writers.append(writer)
        await asyncio.sleep(0.3)
        refused = await http.post(gateway.batch_url(), content=SILENCE, headers={**RAW, "X-API-Key": KEY})
        assert refused.status_code == 429
        assert f"2 batch requests of this {what}" in refused.json()["error"]["message"]
        assert "Retry-After" in refused.headers
        other = await http.post(gateway.batch_url(), content=SILENCE, headers={**RAW, "X-API-Key": OTHER_KEY})
        assert other.status_code == (200 if what == "key" else 429)
        for writer in writers:
            writer.close()
        await asyncio.sleep(0.3)
        again = await http.post(gateway.batch_url(), content=SILENCE, headers={**RAW, "X-API-Key": KEY})
        assert again.status_code == 200


async def test_streams_of_an_address_have_a_quota(make_gateway: MakeGateway) -> None:
    async with make_gateway(max_streams_per_address=1) as gateway, open_socket(gateway.stream_url()):
        with pytest.raises(InvalidStatus) as refused:
            await converse(gateway.stream_url(), [END])
        assert refused.value.response.status_code == 429


async def test_json_may_not_be_large_without_audio(gateway: Gateway, http: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json"}
    too_large = b'{"audio_buffer":[' + b"0," * (Settings().max_json_size // 2) + b"0]}"
    ignored = b'{"audio_buffer":[0,0],"junk":[' + b"[]," * 10**6 + b"0]}"
    for body in (too_large, ignored):
        answer = await http.post(gateway.batch_url(), content=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


async def test_thirty_seconds_of_audio_fit_into_json(gateway: Gateway, http: httpx.AsyncClient, recordings: Recordings) -> None:
    audio = (recordings["jfk"].tobytes() * 3)[: 30 * 32_000]
    plain = await http.post(gateway.batch_url(), content=audio, headers=RAW)
    answer = await http.post(gateway.batch_url(), json={"audio_buffer": [*audio], "opaque": 7})
    assert answer.status_code == 200
    assert answer.json() == {**plain.json(), "opaque": 7}


@asynccontextmanager
async def limited_gateway(triton: Ports, soft: int, hard: int) -> AsyncIterator[tuple[int, asyncio.subprocess.Process]]:
    """Run a gateway in a process with these limits on open files."""
    (port,) = free_ports(LOOPBACK, 1)
    command = ("prlimit", f"--nofile={soft}:{hard}", AMIRA)
    async with gateway_process(port, triton, command, subprocess.PIPE) as process:
        yield port, process


async def events_of(process: asyncio.subprocess.Process) -> list[str]:
    process.terminate()
    assert process.stderr
    lines = (await process.stderr.read()).splitlines()
    return [json.loads(line)["event"] for line in lines if line.startswith(b"{")]


async def test_limit_on_open_files_is_raised(triton: Ports) -> None:
    async with limited_gateway(triton, 64, 512) as (_, process):
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE) == (512, 512)
        assert "open-file limit raised" in await events_of(process)


async def test_kept_connections_do_not_use_up_the_open_files(triton: Ports, http: httpx.AsyncClient) -> None:
    async with limited_gateway(triton, 256, 256) as (port, process), AsyncExitStack() as stack:
        for _ in range(400):
            connection = await stack.enter_async_context(peer(port))
            await connection.send_bytes(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.sleep(0.015)  # 153 connections, above which keep-alive is short, take 2.3 s
        answer = await http.get(f"http://{LOOPBACK}:{port}/health/live")
        assert answer.status_code == 200
        url = f"http://{LOOPBACK}:{port}/v2/decode/batch/amira"
        assert (await http.post(url, content=SILENCE, headers=RAW)).status_code == 200
        assert "keep-alive shortened" in await events_of(process)


async def test_silent_stream_loses_its_place(make_gateway: MakeGateway, recordings: Recordings) -> None:
    async with make_gateway(max_concurrent_streams=2, reclaim_silent_secs=1.0) as gateway:
        url = gateway.stream_url()
        async with open_socket(url) as silent, open_socket(url) as speaking:
            with pytest.raises(InvalidStatus) as refused:
                await converse(url, [END])
            assert refused.value.response.status_code == 503
            for _ in range(6):
                await silent.send(KEEPALIVE)
                await speaking.send(SILENCE)
                await asyncio.sleep(0.25)
            conversation = await transcribe(url, recordings["jfk"])
            assert "ask not" in conversation.final["text"].lower()
            error = json.loads(await silent.recv())
            assert (error["close_code"], error["error"]["code"]) == (4408, "stream_idle")
            assert "another stream needs the place" in error["error"]["message"]
            with pytest.raises(ConnectionClosed):
                await silent.recv()
            assert silent.close_code == 4408
            await speaking.send(END)
            assert json.loads(await speaking.recv())["type"] == "final"


async def test_invalid_text_is_closed_without_a_traceback(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    async with peer(gateway.server.port) as client:
        assert await client.upgrade()
        await client.send_bytes(frame(b"\xff\xfe", TEXT))
        answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 100), 5)
        assert answer[0] == 0x88
        assert struct.unpack("!H", answer[2:4])[0] == 1007
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("pause_secs", [0.0, 0.3])
async def test_half_closed_request_is_answered(gateway: Gateway, recordings: Recordings, pause_secs: float) -> None:
    body = recordings["jfk"].tobytes()
    head = hostile.POST.replace(b"320000", str(len(body)).encode())
    reader, writer = await asyncio.open_connection(LOOPBACK, gateway.server.port)
    writer.write(head + body)
    await asyncio.sleep(pause_secs)
    writer.write_eof()
    answer = await asyncio.wait_for(reader.read(), 20)
    assert b"HTTP/1.1 200 OK" in answer
    assert b'"text":' in answer
    writer.close()


async def test_half_closed_part_of_a_request_ends_the_connection(gateway: Gateway) -> None:
    reader, writer = await asyncio.open_connection(LOOPBACK, gateway.server.port)
    writer.write(hostile.POST + bytes(1000))
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()


async def test_own_origin_may_stream_and_foreign_ones_may_not(gateway: Gateway, http: httpx.AsyncClient) -> None:
    """websocket-client sends the server's own origin by default."""
    assert (await converse(gateway.stream_url(), [END], origin=gateway.url)).close_code == 1000
    with pytest.raises(InvalidStatus) as refused:
        await converse(gateway.stream_url(), [END], origin="https://evil.example")
    assert refused.value.response.status_code == 403
    assert b"allowed_origins" in refused.value.response.body
    for origin, status in ((gateway.url, 200), ("https://evil.example", 403), ("null", 403)):
        answer = await http.post(gateway.batch_url(), content=SILENCE, headers={**RAW, "Origin": origin})
        assert answer.status_code == status
        if status == 403:
            assert "allowed_origins" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/health/detailed", "/metrics"])
async def test_head_is_answered_as_get_without_a_body(gateway: Gateway, http: httpx.AsyncClient, path: str) -> None:
    answer = await http.head(f"{gateway.url}{path}")
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("version", [b"HTTP/1.0\r\nConnection: Keep-Alive", b"HTTP/1.0", b"HTTP/1.1\r\nConnection: close"])
async def test_thousand_health_checks_are_answered(make_gateway: MakeGateway, version: bytes) -> None:
    """As `ab -n 1000 -c 10 [-k]` makes them."""
    async with make_gateway(max_connects_per_address=50) as gateway:
        request = b"GET /health " + version + b"\r\nHost: x\r\n\r\n"

        async def check(times: int) -> None:
            for _ in range(times):
                reader, writer = await asyncio.open_connection(LOOPBACK, gateway.server.port)
                writer.write(request)
                assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 200")
                writer.close()

        await asyncio.gather(*(check(100) for _ in range(10)))


async def test_reset_connection_frees_a_waiting_batch(make_gateway: MakeGateway, http: httpx.AsyncClient) -> None:
    """A client that has left is distinguished from one that only stopped sending."""
    async with make_gateway(max_batches_per_address=1) as gateway:
        client = socket.create_connection((LOOPBACK, gateway.server.port))
        client.sendall(hostile.POST[:-2] + b"Expect: 100-continue\r\n\r\n")
        await asyncio.sleep(0.2)
        client.close()
        await asyncio.sleep(0.5)
        assert (await http.post(gateway.batch_url(), content=SILENCE, headers=RAW)).status_code == 200
