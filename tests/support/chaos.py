"""Realistic load and faults, and the outcome of the load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import psutil
from websockets.exceptions import ConnectionClosed

from amira.engine.process import TritonProcess
from amira.engine.wheel import Engine
from amira.paths import ENGINE_HOME, MODEL_REPOSITORY, ONNXRUNTIME_BACKEND
from amira.ports import LOOPBACK, Ports, free_ports
from tests.support.clients import END, open_socket
from tests.support.repositories import served_repository
from tests.support.servers import Samples

RATE = 16_000
FRAME_SECS = 0.1
MODELS = len(list(MODEL_REPOSITORY.glob("*/config.pbtxt")))
READY_SECS = 150.0
"""Time limit for a restart of Triton, in seconds; the launcher ends one that hangs after 120 s."""

NOTICED_SECS = 30.0
"""Time limit for the restart of a Triton that lost a model's process, in seconds; the launcher delays it by up to 10 s."""


@dataclass
class Said:
    """Answers to one stream.

    Attributes:
        messages: with the time of their arrival, in seconds of time.monotonic.
        close_code: of the socket.
        latencies: of each message that told of more audio: its arrival, and how long it came after the audio was sent.
    """

    messages: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    close_code: int | None = None
    latencies: list[tuple[float, float]] = field(default_factory=list)

    @property
    def finals(self) -> list[str]:
        return [message["text"] for _, message in self.messages if message["type"] == "final"]


async def speak(url: str, samples: Samples, pace: float = 1.0, right_secs: float = 0.48) -> Said:
    """Stream a recording at ``pace`` times real time, and collect the answers."""
    said = Said()
    async with open_socket(url) as socket:
        began = time.monotonic()

        async def listen() -> None:
            heard_ms = 0
            with contextlib.suppress(ConnectionClosed):
                while True:
                    message = orjson.loads(await socket.recv())
                    now = time.monotonic()
                    said.messages.append((now, message))
                    processed_ms = message.get("audio_processed_ms", 0)
                    if message["type"] == "partial" and processed_ms > heard_ms:
                        heard_ms = processed_ms
                        said.latencies.append((now, now - began - (processed_ms / 1000 + right_secs) / pace))

        listener = asyncio.create_task(listen())
        with contextlib.suppress(ConnectionClosed):
            step = int(FRAME_SECS * RATE)
            for start in range(0, len(samples), step):
                await asyncio.sleep(began + start / RATE / pace - time.monotonic())
                await socket.send(samples[start : start + step].tobytes())
            await socket.send(END)
        await listener
        said.close_code = socket.close_code
    return said


async def transcribe_repeatedly(
    url: str, samples: Samples, until: asyncio.Event, pause_secs: float = 0.3
) -> list[tuple[int, str]]:
    """Send a recording as a batch repeatedly, at least once; return status and text of each answer."""
    answers: list[tuple[int, str]] = []
    headers = {"Content-Type": "audio/pcm"}
    async with httpx.AsyncClient(timeout=120) as http:
        while not answers or not until.is_set():
            answer = await http.post(url, content=samples.tobytes(), headers=headers)
            answers.append((answer.status_code, answer.json().get("text", "")))
            await asyncio.sleep(pause_secs)
    return answers


class Backend:
    """A Triton that tests can break; it is restarted as the launcher does it."""

    def __init__(
        self,
        name: str,
        model_repository: Path | None = None,
        options: Sequence[str] = (),
        ensembles: Sequence[str] = ("asr_ensemble",),
    ) -> None:
        self.ports = Ports(LOOPBACK, *free_ports(LOOPBACK, 3))
        engine = Engine.prepare(ENGINE_HOME, ONNXRUNTIME_BACKEND)
        repository = model_repository or served_repository()
        self.triton = TritonProcess(engine, repository, self.ports, ENGINE_HOME / f"triton-{name}.log", options, ensembles)
        self._keeper: asyncio.Task[None] | None = None

    @property
    def target(self) -> str:
        return f"{self.ports.host}:{self.ports.grpc}"

    @property
    def shm_prefix(self) -> str:
        """Prefix of its files in /dev/shm."""
        return self.triton._shm_prefix

    async def start(self) -> None:
        await self.triton.start()
        self._keeper = asyncio.create_task(self.triton.keep_alive())

    async def stop(self) -> None:
        if self._keeper:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self.triton.stop(timeout_secs=0)

    def signal(self, number: int) -> None:
        assert self.triton.pid
        os.kill(self.triton.pid, number)

    def stubs(self, model: str) -> list[psutil.Process]:
        """Return the processes of a Python model."""
        return [p for p in psutil.Process(self.triton.pid).children() if f"{model}_0" in " ".join(p.cmdline())]

    async def ready_again(self) -> float:
        """Wait until all models are ready; return the time, in seconds of time.monotonic."""
        url = f"http://{self.ports.host}:{self.ports.http}/v2"
        deadline = time.monotonic() + READY_SECS
        async with httpx.AsyncClient(timeout=1) as http:
            while True:
                assert time.monotonic() < deadline, f"Triton is not ready after {READY_SECS:g} s"
                with contextlib.suppress(httpx.HTTPError):
                    states = (await http.post(f"{url}/repository/index")).json()
                    if sum(model.get("state") == "READY" for model in states) == MODELS:
                        return time.monotonic()
                await asyncio.sleep(0.05)

    async def started_anew(self, before: int | None) -> float:
        """Wait until a Triton with another process id is ready; return the time, in seconds of time.monotonic."""
        deadline = time.monotonic() + NOTICED_SECS
        while self.triton.pid in (before, None):
            assert time.monotonic() < deadline, "Triton was not restarted"
            await asyncio.sleep(0.05)
        return await self.ready_again()


@asynccontextmanager
async def backends(count: int, *, warm: bool = True) -> AsyncIterator[list[Backend]]:
    running = [Backend(f"chaos-{i}", served_repository(warm=warm)) for i in range(count)]
    try:
        await asyncio.gather(*(backend.start() for backend in running))
        yield running
    finally:
        await asyncio.gather(*(backend.stop() for backend in running))


class Proxy:
    """TCP proxy between a gateway and a Triton that tests can break.

    Attributes:
        target: where new connections go; the port is that of gRPC.
        delay_secs: how much later everything arrives.
        silent: whether pieces are swallowed, in both directions.
        deaf: whether what comes from the gateway is swallowed, as on a half-open connection.
    """

    def __init__(self, target: Ports) -> None:
        self.target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._forgotten: set[asyncio.StreamWriter] = set()
        self.delay_secs = 0.0
        self.silent = False
        self.deaf = False
        self.port = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Proxy]:
        server = await asyncio.start_server(self._connect, LOOPBACK, 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.reset()

    def forget(self) -> None:
        """Drop everything on the present connections without closing them, as a replaced router does."""
        self._forgotten |= self._writers

    def reset(self) -> None:
        """Break every connection."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            their_reader, their_writer = await asyncio.open_connection(self.target.host, self.target.grpc)
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, their_writer}
        await asyncio.gather(self._pass(reader, their_writer, True), self._pass(their_reader, writer, False))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, outward: bool) -> None:
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        delivery = asyncio.create_task(self._deliver(under_way, writer, outward))
        with contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                under_way.put_nowait((time.monotonic() + self.delay_secs, piece))
        under_way.put_nowait((time.monotonic() + self.delay_secs, b""))
        await delivery
        writer.transport.abort()

    async def _deliver(
        self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, outward: bool
    ) -> None:
        while True:
            due, piece = await under_way.get()
            await asyncio.sleep(due - time.monotonic())
            if not piece:
                return
            if not self.silent and not (self.deaf and outward) and writer not in self._forgotten:
                writer.write(piece)


@dataclass
class Outcome:
    """Outcome of the load.

    Attributes:
        lost: streams whose final is not that of the undisturbed run, or that have none or several.
        closes: close codes other than 1000.
        batches: answers to batch requests, by status.
        wrong_batches: answers with 200 and another text.
        recovery_secs: from ``ready_at`` until the last stream heard something again; None where nothing was to recover.
        p95_before, p95_during: of the latency of partials, in seconds.
    """

    lost: list[int]
    closes: list[int | None]
    batches: dict[int, int]
    wrong_batches: int
    recovery_secs: float | None
    p95_before: float
    p95_during: float


Fault = Callable[[], Awaitable[float | None]]


async def disturb(stream_url: str, batch_url: str, speech: Sequence[Samples], texts: Sequence[str], fault: Fault) -> Outcome:
    """Run a stream for each piece of speech and batches beside them, with a fault while they run.

    Args:
        stream_url, batch_url: of the gateway.
        speech: what each stream says.
        texts: the finals of an undisturbed run.
        fault: makes the fault; gives the moment at which everything was well again.
    """
    done = asyncio.Event()
    streams = [asyncio.create_task(speak(stream_url, samples)) for samples in speech]
    shortest = min(range(len(speech)), key=lambda i: len(speech[i]))
    batch_speech = speech[shortest][: 5 * RATE]
    batch = asyncio.create_task(transcribe_repeatedly(batch_url, batch_speech, done))
    await asyncio.sleep(len(speech[shortest]) / RATE * 0.4)
    fault_at = time.monotonic()
    ready_at = await fault()
    said = await asyncio.gather(*streams)
    done.set()
    answers = await batch
    good_texts = {text for status, text in answers if status == 200}
    statuses = [status for status, _ in answers]
    heard = [next((at for at, _ in one.messages if ready_at and at > ready_at), None) for one in said]
    return Outcome(
        lost=[i for i, (one, text) in enumerate(zip(said, texts, strict=True)) if one.finals != [text]],
        closes=[one.close_code for one in said if one.close_code != 1000],
        batches={status: statuses.count(status) for status in sorted(set(statuses))},
        wrong_batches=len(good_texts) - 1,
        recovery_secs=max((at - ready_at for at in heard if at), default=None) if ready_at else None,
        p95_before=p95([secs for one in said for at, secs in one.latencies if at < fault_at]),
        p95_during=p95([secs for one in said for at, secs in one.latencies if at >= fault_at]),
    )


def p95(values: Sequence[float]) -> float:
    """Return the 95th percentile; NaN without values."""
    return float(np.percentile(values, 95)) if values else float("nan")


def pieces(recordings: Sequence[Samples], count: int, seconds: float) -> list[Samples]:
    """Return different speech for this number of streams."""
    everything = np.concatenate(list(recordings))
    length = int(seconds * RATE)
    starts = np.random.default_rng(5).integers(0, len(everything), count)
    return [np.resize(np.roll(everything, -start), length) for start in starts]


async def kill(backend: Backend) -> float:
    """Kill Triton, as the kernel does when memory is short."""
    backend.signal(signal.SIGKILL)
    await asyncio.sleep(0.2)
    return await backend.ready_again()


async def kill_twice(backend: Backend) -> float:
    """Kill Triton, and again as soon as it is ready."""
    await kill(backend)
    await asyncio.sleep(0.5)
    return await kill(backend)


async def terminate(backend: Backend) -> float:
    """Terminate Triton, as an operator's restart does."""
    backend.signal(signal.SIGTERM)
    with contextlib.suppress(psutil.NoSuchProcess):
        await asyncio.to_thread(psutil.Process(backend.triton.pid).wait, 60)
    return await backend.ready_again()


async def kill_stub(backend: Backend, model: str) -> float:
    """Kill the process of a Python model, after which Triton is restarted."""
    before = backend.triton.pid
    (process, *_) = backend.stubs(model)
    process.kill()
    return await backend.started_anew(before)


async def stop_for(backend: Backend, seconds: float) -> float:
    """Stop Triton and its models' processes for a time, as swapping does; the models' processes then end themselves."""
    before = backend.triton.pid
    processes = [psutil.Process(before), *psutil.Process(before).children(recursive=True)]
    for process in processes:
        process.suspend()
    await asyncio.sleep(seconds)
    for process in processes:
        process.resume()
    return await backend.started_anew(before)
