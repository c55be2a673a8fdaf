"""``make soak``: clients of every kind for ``MINUTES``, and the resources of the server meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timezone
from http import HTTPStatus
from typing import Any

import httpx
import numpy as np
import soundfile
from websockets.exceptions import InvalidStatus

from amira import LiveStream
from amira.paths import ROOT
from amira.ports import LOOPBACK, Ports, free_ports
from perf.server import cpu_model
from tests.support.chaos import RATE, Proxy, backends, pieces, speak
from tests.support.clients import END, converse, cut, open_socket, transcribe
from tests.support.commands import gateway_process
from tests.support.footprint import Footprint, look, problems
from tests.support.servers import Samples, read_recordings

SECS = float(os.environ.get("MINUTES") or 60) * 60
SAMPLES = 400
PACED, CAPACITY = 3, 8
SETTLE_SECS = 15.0
TIMEOUT_SECS = 5.0
"""The gateway's ``stream_timeout_secs``; short, so that silent streams end too."""

RAW = {"Content-Type": "audio/pcm"}
REPORT = ROOT / "perf" / "results" / "soak.md"
PICTURE = ROOT / "docs" / "soak.png"


class Load:
    """Clients of every kind until a deadline.

    Attributes:
        did: number of each event.
    """

    def __init__(self, port: int, speech: Sequence[Samples], texts: Sequence[str], secs: float) -> None:
        self._port = port
        self._speech = speech
        self._texts = texts
        self._until = time.monotonic() + secs
        self._random = random.Random(7)  # noqa: S311
        self.did: Counter[str] = Counter()

    @property
    def stream_url(self) -> str:
        return f"ws://{LOOPBACK}:{self._port}/v2/decode/stream/amira"

    @property
    def batch_url(self) -> str:
        return f"http://{LOOPBACK}:{self._port}/v2/decode/batch/amira"

    async def run(self) -> None:
        kinds = (
            *[self._speaks] * PACED,
            self._sends_recordings,
            self._vanishes,
            self._goes_on,
            self._is_refused,
            self._is_silent,
        )
        await asyncio.gather(*map(self._repeat, kinds))

    async def _repeat(self, act: Callable[[], Awaitable[None]]) -> None:
        while time.monotonic() < self._until:
            try:
                await act()
            except InvalidStatus as refused:  # while those of _is_refused take every place
                if refused.response.status_code != HTTPStatus.SERVICE_UNAVAILABLE:
                    raise
                self.did["streams refused"] += 1
            await asyncio.sleep(self._random.uniform(0, 1))

    def _saying(self) -> tuple[Samples, str]:
        number = self._random.randrange(len(self._speech))
        return self._speech[number], self._texts[number]

    async def _speaks(self) -> None:
        samples, text = self._saying()
        said = await speak(self.stream_url, samples)
        assert said.finals == [text]
        self.did["streams in real time"] += 1

    async def _sends_recordings(self) -> None:
        samples, _ = self._saying()
        bodies: list[dict[str, Any]] = [{"content": samples.tobytes(), "headers": RAW}]
        for container, subtype in (("WAV", "PCM_16"), ("FLAC", "PCM_24"), ("OGG", "OPUS")):
            file = io.BytesIO()
            soundfile.write(file, samples, RATE, subtype, format=container)
            bodies.append({"content": file.getvalue()})
        bodies += [{"files": {"file": bodies[1]["content"]}}, {"json": {"audio_buffer": list(samples.tobytes())}}]
        async with httpx.AsyncClient(timeout=30) as http:
            for body in bodies:
                assert (await http.post(self.batch_url, **body)).status_code == 200
                self.did["recordings"] += 1
                await asyncio.sleep(0.5)

    async def _vanishes(self) -> None:
        samples, _ = self._saying()
        frames = [*cut(samples, RATE // 5), END]
        socket = await open_socket(self.stream_url)
        for frame in frames[: self._random.randrange(len(frames) + 1)]:
            await socket.send(frame)
            await asyncio.sleep(0.02)
        socket.transport.abort()
        self.did["streams that vanished"] += 1

    async def _goes_on(self) -> None:
        samples, text = self._saying()
        proxy = Proxy(Ports(LOOPBACK, self._port, 0))
        async with proxy.running(), LiveStream(self.stream_url.replace(str(self._port), str(proxy.port))) as stream:
            for number, frame in enumerate(cut(samples, RATE // 10)):
                await stream.send(frame)
                await asyncio.sleep(0.1)
                if number % 30 == 29:
                    proxy.reset()
            assert (await stream.finish()).text == text
            self.did["streams that went on"] += 1
            self.did["connections lost"] += stream.reconnects

    async def _is_refused(self) -> None:
        bad: list[tuple[int, dict[str, Any]]] = [
            (400, {"content": b"", "headers": RAW}),
            (400, {"content": bytes(3), "headers": RAW}),
            (400, {"json": {"audio_buffer": "?"}}),
            (413, {"content": bytes(11 * 2**20), "headers": RAW}),
            (413, {"content": bytes(31 * 2 * RATE), "headers": RAW}),
            (415, {"content": b"PK\x03\x04" + bytes(100), "headers": {"Content-Type": "audio/mpeg"}}),
        ]
        async with httpx.AsyncClient(timeout=30) as http:
            for status, body in bad:
                with contextlib.suppress(httpx.WriteError, httpx.ReadError):  # the body is not read to its end
                    assert (await http.post(self.batch_url, **body)).status_code == status
                self.did["recordings refused"] += 1
        for frames, code in (([bytes(3)], 1007), (["text"], 1003), ([b"\x07"], 1007), ([bytes(2**19 - 2)], 1009)):
            assert (await converse(self.stream_url, [bytes(3200), *frames])).close_code == code
            self.did["streams ended by an error"] += 1
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(CAPACITY + 1):
                await stack.enter_async_context(open_socket(self.stream_url))

    async def _is_silent(self) -> None:
        conversation = await converse(self.stream_url, [bytes(3200)])
        assert conversation.close_code == 4408
        self.did["streams that fell silent"] += 1


async def test_nothing_grows() -> None:
    speech = [*itertools.chain(*(pieces([*read_recordings().values()], 3, secs) for secs in (3.0, 7.0, 12.0)))]
    (port,) = free_ports(LOOPBACK, 1)
    settings = {
        "max_concurrent_streams": str(CAPACITY),
        "stream_timeout_secs": str(TIMEOUT_SECS),
        "max_request_size": str(10 * 2**20),
        "max_batch_audio_length_secs": "30",
    }
    async with backends(1) as (backend,), gateway_process(port, backend.ports, **settings) as gateway:
        url = f"http://{LOOPBACK}:{port}"

        async def footprint() -> Footprint:
            return await look(backend, url, gateway.pid)

        stream_url = f"ws://{LOOPBACK}:{port}/v2/decode/stream/amira"
        # Every kind once, and each length alone: ONNX Runtime's arenas grow at the first use of a shape.
        texts = [(await transcribe(stream_url, samples)).final["text"] for samples in speech]
        load = Load(port, speech, texts, 0.1)
        async with httpx.AsyncClient(timeout=30) as http:
            for samples in speech:
                assert (await http.post(load.batch_url, content=samples.tobytes(), headers=RAW)).status_code == 200
        await load.run()
        before = await settled(footprint, None)
        load = Load(port, speech, texts, SECS)
        loading = asyncio.create_task(load.run())
        footprints: list[Footprint] = []
        interval_secs = max(1.0, SECS / SAMPLES)
        while not loading.done():
            await asyncio.wait({loading}, timeout=interval_secs)
            footprints.append(await footprint())
            left_secs = max(0.0, SECS - (footprints[-1].secs - before.secs))
            print(f"{left_secs:.0f} s left, {describe(footprints[-1])}; {sum(load.did.values())} things done", flush=True)  # noqa: T201
        loading.result()
        after = await settled(footprint, before)
    found = problems(before, footprints, after)
    write(before, footprints, after, load.did, found)
    assert found == []
    assert all(load.did[what] for what in ("streams in real time", "recordings", "streams that went on", "streams refused"))


async def settled(footprint: Callable[[], Awaitable[Footprint]], before: Footprint | None) -> Footprint:
    """Return the footprint when no more than before, or no sequence, is held; or after a timeout."""
    deadline = time.monotonic() + SETTLE_SECS
    await asyncio.sleep(TIMEOUT_SECS + 1)
    while True:
        now = await footprint()
        well = not problems(before, [now], now) if before else not now.sequences
        if well or time.monotonic() > deadline:
            return now
        await asyncio.sleep(0.5)


def describe(sample: Footprint) -> str:
    memory = ", ".join(f"{name} {memory.rss:.0f}" for name, memory in sample.memory.items())
    return f"{memory} MB; {sample.sequences} sequences, {sample.tasks} tasks"


def write(before: Footprint, samples: Sequence[Footprint], after: Footprint, did: Counter[str], found: Sequence[str]) -> None:
    """Write the report: a table, and a picture if Matplotlib is installed."""
    minutes = (samples[-1].secs - samples[0].secs) / 60
    when = datetime.now(timezone.utc).isoformat(" ", "minutes")
    middle = samples[len(samples) // 2]
    lines = [
        f"# {minutes:.0f} minutes of mixed load\n\n{when}, {cpu_model()}, `make soak MINUTES={SECS / 60:g}`.\n\n",
        "Resident memory and, behind it, the proportional share of it, in MB.\n\n",
        "| process | before | at half-time | at the end | afterwards | descriptors before, afterwards |\n",
        "|---|---|---|---|---|---|\n",
    ]
    for name in before.memory:
        cells = [
            f"{one.memory[name].rss:.0f}, {one.memory[name].pss:.0f}" if name in one.memory else ""
            for one in (before, middle, samples[-1], after)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {before.descriptors[name]}, {after.descriptors.get(name, 0)} |\n")
    shm = " | ".join(f"{one.shm_mb:.0f}" for one in (before, middle, samples[-1], after))
    lines.append(f"| /dev/shm | {shm} | |\n\n")
    lines.append(f"Sequences {before.sequences}, {after.sequences}; tasks {before.tasks}, {after.tasks}.\n")
    lines.append(f"{', '.join(f'{count:,} {what}' for what, count in did.items())}.\n\n")
    lines.append("".join(f"- {problem}\n" for problem in found) or "Nothing grew, nothing was left.\n")
    REPORT.write_text("".join(lines), encoding="utf-8")
    try:
        from matplotlib import pyplot as plt  # noqa: PLC0415 (an extra)
    except ImportError:
        return
    figure, axes = plt.subplots(figsize=(8, 4.5))
    times = np.array([one.secs - samples[0].secs for one in samples]) / 60
    for name in before.memory:
        axes.plot(times, [one.memory[name].rss if name in one.memory else np.nan for one in samples], label=name)
    axes.set(xlabel="minutes", ylabel="resident memory, MB", ylim=0)
    axes.legend(ncols=4, fontsize="small", frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(PICTURE, dpi=100, bbox_inches="tight")
    plt.close(figure)
