"""The real nginx in front of two real gateways."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
from openai import AsyncOpenAI
from websockets.exceptions import InvalidStatus

from amira import LiveStream, Word
from amira.paths import SPEECH
from amira.ports import LOOPBACK, Ports, free_ports
from gateway.audio import RATE
from gateway.config.settings import Settings
from gateway.service import Service
from tests.support.clients import END, cut, gateway_metrics, listen, open_socket, transcribe
from tests.support.commands import gateway_process
from tests.support.servers import Gateway, Recordings

Need = Callable[[str], str]
MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]

MIB = 2**20


@dataclass
class Proxy:
    """A running nginx."""

    url: str
    directory: Path
    process: asyncio.subprocess.Process

    def stream_url(self) -> str:
        return f"{self.url.replace('http', 'ws', 1)}/v2/decode/stream/amira"

    def workers(self) -> set[str]:
        """Return the process ids of the workers."""
        return set(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split())

    async def reload(self) -> None:
        """Reload the configuration, and wait for new workers."""
        before = self.workers()
        self.process.send_signal(signal.SIGHUP)
        while not self.workers() - before:
            await asyncio.sleep(0.02)


@asynccontextmanager
async def run_nginx(binary: str, deploy: Path, directory: Path, *gateways: str) -> AsyncIterator[Proxy]:
    """Run nginx with the project's configuration in front of these addresses; only its own address and paths differ."""
    (port,) = free_ports(LOOPBACK, 1)
    text = (deploy / "nginx" / "nginx.conf").read_text()
    for theirs, ours in (
        ("listen 8080 ", f"listen {LOOPBACK}:{port} "),
        ("/tmp/", f"{directory}/"),  # noqa: S108
        ("/dev/stderr", f"{directory}/error.log"),
        ("/dev/stdout", f"{directory}/access.log"),
        ("worker_processes auto", "worker_processes 2"),
        ("worker_rlimit_nofile 65536;", ""),
        ("worker_connections 32768", "worker_connections 256"),
    ):
        assert theirs in text
        text = text.replace(theirs, ours)
    user = "user root;\n" if os.geteuid() == 0 else ""  # workers of another user could not write to the test's directory
    (directory / "nginx.conf").write_text(f"daemon off;\n{user}{text}")
    upstream = (deploy / "nginx" / "upstream.conf").read_text()
    server = re.search(r"server gateway:8057 resolve (.*);", upstream)
    assert server
    servers = "\n".join(f"server {gateway} {server[1]};" for gateway in gateways)
    upstream = re.sub(r"^resolver .*$", "", upstream.replace(server[0], servers), flags=re.MULTILINE)
    (directory / "upstream.conf").write_text(upstream)
    process = await asyncio.create_subprocess_exec(binary, "-p", str(directory), "-c", str(directory / "nginx.conf"))
    proxy = Proxy(f"http://{LOOPBACK}:{port}", directory, process)
    try:
        async with httpx.AsyncClient() as client:
            while True:
                assert process.returncode is None, (directory / "error.log").read_text()
                try:
                    assert (await client.get(f"{proxy.url}/nginx-health")).status_code == 200
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
        yield proxy
    finally:
        process.terminate()
        await process.wait()


@pytest.fixture
async def gateways(make_gateway: MakeGateway) -> AsyncIterator[tuple[Gateway, Gateway]]:
    async with make_gateway(max_concurrent_streams=2) as first, make_gateway(max_concurrent_streams=2) as second:
        yield first, second


@pytest.fixture
async def proxy(need: Need, deploy: Path, tmp_path: Path, gateways: tuple[Gateway, Gateway]) -> AsyncIterator[Proxy]:
    addresses = [gateway.url.removeprefix("http://") for gateway in gateways]
    async with run_nginx(need("nginx"), deploy, tmp_path, *addresses) as running:
        yield running


@pytest.fixture
async def processes(triton: Ports) -> AsyncIterator[dict[str, asyncio.subprocess.Process]]:
    """Return two gateways that may be killed, by address."""
    first, second = free_ports(LOOPBACK, 2)
    async with gateway_process(first, triton) as one, gateway_process(second, triton) as other:
        yield {f"{LOOPBACK}:{first}": one, f"{LOOPBACK}:{second}": other}


def service(gateway: Gateway) -> Service:
    its: Service = gateway.server._app.state.service
    return its


def active(gateway: Gateway) -> int:
    return service(gateway).places.streams


async def test_requests_and_streams_pass(proxy: Proxy, http: httpx.AsyncClient, recordings: Recordings) -> None:
    flac = (SPEECH / "jfk.flac").read_bytes()
    answer = await http.post(f"{proxy.url}/v2/decode/batch/amira", content=flac, headers={"X-Request-ID": "mine"})
    assert answer.status_code == 200
    assert answer.headers["X-Request-ID"] == "mine"
    through = await transcribe(proxy.stream_url(), recordings["jfk"])
    assert through.close_code == 1000
    assert "fellow" in through.final["text"]
    answer = await http.get(f"{proxy.url}/health/ready")
    assert answer.headers["X-Request-ID"] in (proxy.directory / "access.log").read_text()


async def test_the_gateway_refuses_bodies_itself(proxy: Proxy, deploy: Path) -> None:
    (limit,) = re.findall(r"client_max_body_size (\d+)m", (deploy / "nginx" / "nginx.conf").read_text())
    allowed = Settings().max_request_size
    assert allowed < int(limit) * MIB
    assert b"body_too_large" in await declare(proxy, allowed + 1)
    assert (await declare(proxy, int(limit) * MIB + 1)).startswith(b"HTTP/1.1 413 ")


async def declare(proxy: Proxy, size: int) -> bytes:
    """Declare the size of a body, send its beginning, and return the answer."""
    url = httpx.URL(proxy.url)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = f"POST /v2/decode/batch/amira HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + bytes(1000))
    answer = await asyncio.wait_for(reader.read(), 30)  # to the end of the connection
    writer.close()
    return answer


async def test_operator_pages_stay_inside(proxy: Proxy, http: httpx.AsyncClient) -> None:
    for path in ("/metrics", "/health/detailed"):
        assert (await http.get(f"{proxy.url}{path}")).status_code == 404
    assert (await http.get(f"{proxy.url}/health")).json()["status"] == "healthy"


async def test_timeouts_fit_the_settings(deploy: Path) -> None:
    text = (deploy / "nginx" / "nginx.conf").read_text()
    defaults = Settings()
    hours = {name: int(hours) * 3600 for name, hours in re.findall(r"(\w+) (\d+)h;", text)}
    assert hours["proxy_read_timeout"] >= defaults.max_stream_audio_secs
    assert hours["worker_shutdown_timeout"] >= defaults.max_stream_audio_secs
    (send_timeout,) = re.findall(r"proxy_send_timeout (\d+)s;", text)
    assert int(send_timeout) > defaults.stream_timeout_secs


async def test_streams_spread_and_go_where_room_is(proxy: Proxy, gateways: tuple[Gateway, Gateway]) -> None:
    """Each gateway accepts two; the fifth stream gets the gateway's refusal."""
    first, second = gateways
    sockets = [await open_socket(proxy.stream_url()) for _ in range(4)]
    assert (active(first), active(second)) == (2, 2)
    with pytest.raises(InvalidStatus) as refused:
        await open_socket(proxy.stream_url())
    assert refused.value.response.status_code == 503
    assert b"no_capacity" in refused.value.response.body
    assert "Retry-After" in refused.value.response.headers
    for socket in sockets:
        await socket.close()


async def test_stream_finds_the_gateway_with_room(
    need: Need, deploy: Path, tmp_path: Path, make_gateway: MakeGateway, recordings: Recordings
) -> None:
    """While gateways are replaced, those that drain have the fewest streams and are tried first."""
    async with AsyncExitStack() as stack:
        gateways = [await stack.enter_async_context(make_gateway()) for _ in range(5)]
        addresses = [gateway.url.removeprefix("http://") for gateway in gateways]
        proxy = await stack.enter_async_context(run_nginx(need("nginx"), deploy, tmp_path, *addresses))
        busy = await open_socket(f"{gateways[-1].url.replace('http', 'ws', 1)}/v2/decode/stream/amira")
        for gateway in gateways[:-1]:
            service(gateway).places.drain()
        for _ in range(5):
            assert (await transcribe(proxy.stream_url(), recordings["jfk"][:16_000])).close_code == 1000
        await busy.close()


async def test_stopping_gateway_hands_over(
    proxy: Proxy, gateways: tuple[Gateway, Gateway], recordings: Recordings, http: httpx.AsyncClient
) -> None:
    sockets = [await open_socket(proxy.stream_url()) for _ in range(2)]
    assert [active(gateway) for gateway in gateways] == [1, 1]
    frames = cut(recordings["jfk"], 16_000)
    listeners = {asyncio.create_task(listen(socket)): socket for socket in sockets}
    for socket in sockets:
        for frame in frames[:3]:
            await socket.send(frame)
    server = gateways[0].server
    server.should_exit = True
    while not service(gateways[0]).places.draining:
        await asyncio.sleep(0.01)
    # It drains for a second: nginx sends new streams to the other gateway, and its own streams end with a final.
    assert (await transcribe(proxy.stream_url(), recordings["jfk"])).close_code == 1000
    (ended,), (going_on,) = await asyncio.wait(listeners, return_when=asyncio.FIRST_COMPLETED)
    assert ended.result().close_code == 1012
    assert ended.result().final["audio_processed_ms"] == 3000
    for frame in frames[3:]:
        await listeners[going_on].send(frame)
    await listeners[going_on].send(END)
    assert (await going_on).close_code == 1000
    assert "fellow" in (await going_on).final["text"]
    while server.servers[0].is_serving():
        await asyncio.sleep(0.05)
    # After its end, no client is affected.
    for _ in range(3):
        assert (await http.post(f"{proxy.url}/v2/decode/batch/amira", content=bytes(32_000))).status_code == 200
        assert (await transcribe(proxy.stream_url(), recordings["jfk"][:16_000])).close_code == 1000


async def test_reload_keeps_live_streams(proxy: Proxy, recordings: Recordings) -> None:
    frames = cut(recordings["jfk"], 16_000)
    async with open_socket(proxy.stream_url()) as socket:
        listener = asyncio.create_task(listen(socket))
        for frame in frames[:5]:
            await socket.send(frame)
        await proxy.reload()
        assert (await transcribe(proxy.stream_url(), recordings["jfk"])).close_code == 1000  # by a new worker
        for frame in frames[5:]:
            await socket.send(frame)
        await socket.send(END)
        conversation = await listener
    assert conversation.close_code == 1000
    assert "fellow" in conversation.final["text"]


async def test_stream_outlives_its_gateway(
    need: Need, deploy: Path, tmp_path: Path, processes: dict[str, asyncio.subprocess.Process], recordings: Recordings
) -> None:
    async with run_nginx(need("nginx"), deploy, tmp_path, *processes) as proxy:
        plain = (await transcribe(proxy.stream_url(), recordings["jfk"])).final
        async with LiveStream(proxy.stream_url()) as stream:
            frames = cut(recordings["jfk"], 16_000)
            for frame in frames[:6]:
                await stream.send(frame)
            assert (await anext(aiter(stream))).text
            live = {
                address: (await gateway_metrics(f"http://{address}"))["asr_active_connections", ()] for address in processes
            }
            (address,) = (address for address, streams in live.items() if streams)
            processes[address].kill()
            for frame in frames[6:]:
                await stream.send(frame)
            final = await stream.finish()
        assert stream.reconnects == 1
        words = tuple(Word(word["word"], word["start"], word["end"], word["confidence"]) for word in plain["words"])
        assert (final.text, final.tokens, final.words) == (plain["text"], tuple(plain["tokens"]), words)


async def test_recording_is_never_sent_twice(
    need: Need, deploy: Path, tmp_path: Path, processes: dict[str, asyncio.subprocess.Process], http: httpx.AsyncClient
) -> None:
    """One gateway gets it and dies; the other must not get it too."""
    async with run_nginx(need("nginx"), deploy, tmp_path, *processes) as proxy:
        for process in processes.values():
            process.send_signal(signal.SIGSTOP)
        recording = asyncio.create_task(http.post(f"{proxy.url}/v2/decode/batch/amira", content=bytes(32_000)))
        await asyncio.sleep(0.5)  # it has been sent by now; there is no event for this
        for process in processes.values():
            process.kill()
        assert (await recording).status_code == 502
    last = json.loads((tmp_path / "access.log").read_text().splitlines()[-1])
    assert last["upstream"] in processes, "one address alone"


async def test_events_are_not_held_back(
    need: Need, deploy: Path, tmp_path: Path, make_gateway: MakeGateway, recordings: Recordings
) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.concatenate([*recordings.values()] * 2), RATE, format="FLAC")
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(make_gateway(max_concurrent_batches=1))
        proxy = await stack.enter_async_context(run_nginx(need("nginx"), deploy, tmp_path, gateway.url.removeprefix("http://")))
        client = await stack.enter_async_context(AsyncOpenAI(base_url=f"{proxy.url}/v1", api_key="any"))
        began, came = time.monotonic(), list[float]()
        form: dict[str, Any] = {"file": ("a.flac", file.getvalue()), "model": "whisper-1"}
        async for _ in await client.audio.transcriptions.create(**form, stream=True):
            came.append(time.monotonic() - began)
    assert len(came) > 3
    assert came[0] < 0.7 * came[-1]
