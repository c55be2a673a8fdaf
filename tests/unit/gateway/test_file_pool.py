"""Files are decoded in processes of their own: what one file costs, it costs nobody else."""

from __future__ import annotations

import asyncio
import io
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import soundfile

from gateway.audio import RATE, jobs, pool, reader, worker
from gateway.audio.files import decode_audio
from gateway.audio.pool import FilePool
from gateway.audio.sniff import OGG
from gateway.errors import ApiError, ErrorKind
from tests.support.media import decode_body

SPEECH = sorted((Path(__file__).parents[2] / "speech").glob("*.flac"))
FLAC = SPEECH[0].read_bytes()
PCM = bytes(range(256)) * 100
PATIENCE_SECS = 20


def encode(container: str, subtype: str, samples: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, 0.3 * np.sin(np.arange(samples) / 9), RATE, subtype, format=container)
    return file.getvalue()


SLOW = encode("OGG", "OPUS", samples=1) * 12_000
"""An Ogg file of as many links, each of which has to be opened: seconds of CPU time for a file without audio."""


@pytest.fixture
async def files() -> AsyncIterator[FilePool]:
    files = FilePool(places=2)
    yield files
    await files.close()


async def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECS
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def workers(files: FilePool) -> list[psutil.Process]:
    """The processes that decode a file now."""
    if not files._server:
        return []
    return [child for child in psutil.Process(files._server.pid).children() if child.status() != psutil.STATUS_ZOMBIE]


async def begin(files: FilePool, number: int = 1) -> list[asyncio.Task[object]]:
    """Begin to decode slow files."""
    tasks: list[asyncio.Task[object]] = [asyncio.create_task(decode_body(files, SLOW, "", 3600)) for _ in range(number)]
    await until(lambda: len(workers(files)) >= min(number, 2))
    return tasks


@pytest.mark.parametrize(
    "name", ["flac", "wav", "vorbis", "opus", "chained", "unfinished", "tagged", "mp3", "aiff", "pcm", "large"]
)
async def test_samples_are_those_of_decoding_here(files: FilePool, name: str) -> None:
    bodies = {
        "flac": FLAC,
        "wav": encode("WAV", "PCM_24"),
        "vorbis": encode("OGG", "VORBIS"),
        "opus": encode("OGG", "OPUS"),
        "chained": encode("OGG", "OPUS") * 3,
        "unfinished": encode("WAV", "PCM_16").replace(b"data" + (2 * RATE).to_bytes(4, "little"), b"data" + bytes(4)),
        "tagged": b"ID3\4\0\0\0\0\2\0" + bytes(256) + FLAC,
        "mp3": encode("MP3", "MPEG_LAYER_III"),
        "aiff": encode("AIFF", "PCM_24"),
        "pcm": PCM,
        "large": encode("WAV", "PCM_16", samples=100 * RATE),
    }
    samples = await decode_body(files, bodies[name], "", 3600)
    assert samples.dtype == np.int16
    np.testing.assert_array_equal(samples, decode_audio(bodies[name], "", 3600))


@pytest.mark.parametrize(
    ("body", "content_type", "max_secs", "kind"),
    [
        (b"", "", 60, ErrorKind.EMPTY_BODY),
        (FLAC[:-1000], "", 60, ErrorKind.UNDECODABLE_AUDIO),
        (FLAC, "", 1, ErrorKind.AUDIO_TOO_LONG),
        (FLAC, "text/plain", 60, ErrorKind.UNSUPPORTED_MEDIA),
        (PCM[1:], "", 60, ErrorKind.ODD_LENGTH),
    ],
)
async def test_errors_are_those_of_decoding_here(
    files: FilePool, body: bytes, content_type: str, max_secs: float, kind: ErrorKind
) -> None:
    with pytest.raises(ApiError) as here:
        decode_audio(body, content_type, max_secs)
    with pytest.raises(ApiError) as there:
        await decode_body(files, body, content_type, max_secs)
    assert here.value.kind is there.value.kind is kind
    assert (here.value.message, here.value.param) == (there.value.message, there.value.param)


async def test_no_process_before_the_first_file(files: FilePool) -> None:
    await decode_body(files, PCM, "", 60)
    assert files._server is None


async def test_raw_pcm_waits_for_no_file(files: FilePool) -> None:
    tasks = await begin(files, 4)
    began = time.monotonic()
    for _ in range(100):
        await decode_body(files, PCM, "", 60)
    assert time.monotonic() - began < 1
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()


async def test_no_more_processes_than_places(files: FilePool) -> None:
    tasks = await begin(files, 6)
    for _ in range(50):
        assert len(workers(files)) <= 2
        await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()


async def test_cancelling_ends_the_process_and_frees_its_place(files: FilePool) -> None:
    tasks = await begin(files, 10)
    held = workers(files)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.wait_for(decode_body(files, FLAC, "", 60), PATIENCE_SECS)
    await until(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in held))


async def test_cpu_time_is_limited(files: FilePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "CPU_SECS", 0.1)
    monkeypatch.setattr(pool, "SEARCHED_BYTES_PER_SEC", 2**40)
    with pytest.raises(ApiError, match=r"takes more than 1 s of CPU time") as caught:
        await decode_body(files, SLOW * 5, "", 30)
    assert caught.value.kind is ErrorKind.UNDECODABLE_AUDIO
    assert len(await decode_body(files, FLAC, "", 60)) > RATE


async def test_memory_is_limited(files: FilePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "MEMORY_BYTES", 20 * 2**20)
    monkeypatch.setattr(pool, "MEMORY_PER_BYTE", 0)
    with pytest.raises(ApiError, match="needs more than 20 MiB of memory") as caught:
        await decode_body(files, encode("WAV", "PCM_16", samples=1200 * RATE), "", 3600)
    assert caught.value.kind is ErrorKind.UNDECODABLE_AUDIO
    assert len(await decode_body(files, FLAC, "", 60)) > RATE


async def test_elapsed_time_is_limited(files: FilePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "WALL_FACTOR", 0.001)
    with pytest.raises(ApiError, match="not decoded within") as caught:
        await decode_body(files, SLOW, "", 3600)
    assert caught.value.kind is ErrorKind.NO_CAPACITY
    await until(lambda: not workers(files))


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGSEGV, ErrorKind.UNDECODABLE_AUDIO), (signal.SIGKILL, ErrorKind.NO_CAPACITY)]
)
async def test_a_crash_costs_one_request(files: FilePool, number: signal.Signals, kind: ErrorKind) -> None:
    first, second = await begin(files, 2)
    victim, other = workers(files)
    victim.send_signal(number)
    done, _ = await asyncio.wait({first, second}, timeout=PATIENCE_SECS, return_when=asyncio.FIRST_COMPLETED)
    (failed,) = done
    with pytest.raises(ApiError) as caught:
        failed.result()
    assert caught.value.kind is kind
    assert other.is_running()
    assert len(await decode_body(files, FLAC, "", 60)) > RATE
    for task in (first, second):
        task.cancel()


async def test_messages_of_decoders_are_no_log_lines(files: FilePool, capfd: pytest.CaptureFixture[str]) -> None:
    """libmpg123 prints a line to standard error, where the log goes, for each damaged frame of a file."""
    randomness = random.Random(1)  # noqa: S311
    file = bytearray(encode("MP3", "MPEG_LAYER_III", samples=29 * RATE))
    for at in range(len(file)):
        if at % 24 > 8 and randomness.random() < 0.3:
            file[at] = randomness.randrange(256)
    with suppress(ApiError):
        await decode_body(files, bytes(file), "audio/mpeg", 30)
    assert "mpg123" not in capfd.readouterr().err


async def test_a_lost_server_is_replaced(files: FilePool) -> None:
    await decode_body(files, FLAC, "", 60)
    assert files._server
    files._server.kill()
    await until(lambda: files._server and files._server.returncode is not None)
    assert len(await decode_body(files, FLAC, "", 60)) > RATE


async def test_a_stopped_server_is_replaced(files: FilePool, monkeypatch: pytest.MonkeyPatch) -> None:
    await decode_body(files, FLAC, "", 60)
    stopped = files._server
    assert stopped
    stopped.send_signal(signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(reader, "START_SECS", 0.5)
        results = await asyncio.gather(*(decode_body(files, FLAC, "", 60) for _ in range(2)), return_exceptions=True)
    assert {error.kind for error in results if isinstance(error, ApiError)} == {ErrorKind.NO_CAPACITY}
    assert len(await decode_body(files, FLAC, "", 60)) > RATE
    assert stopped.returncode == -signal.SIGKILL


async def test_a_stopped_server_stops_nothing_else(files: FilePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More live streams begin at once than messages fit into its socket."""
    await decode_body(files, FLAC, "", 60)
    stopped = files._server
    assert stopped
    for module in (reader, pool):
        monkeypatch.setattr(module, "START_SECS", 1.5)
    monkeypatch.setattr(pool, "STOP_SECS", 0.1)
    stopped.send_signal(signal.SIGSTOP)
    rescue = threading.Timer(PATIENCE_SECS, stopped.send_signal, [signal.SIGCONT])  # else a failure would last for ever
    rescue.start()

    async def stream() -> None:
        async with files.stream(OGG, 60):
            pass

    streams = [asyncio.create_task(stream()) for _ in range(400)]
    slowest = 0.0
    while not all(task.done() for task in streams):
        began = time.monotonic()
        await asyncio.sleep(0.01)
        slowest = max(slowest, time.monotonic() - began)
    rescue.cancel()
    assert slowest < PATIENCE_SECS / 4
    errors = [error for error in await asyncio.gather(*streams, return_exceptions=True) if error]
    assert {error.kind for error in errors if isinstance(error, ApiError)} == {ErrorKind.NO_CAPACITY}
    monkeypatch.undo()
    assert len(await decode_body(files, FLAC, "", 60)) > RATE


@pytest.mark.parametrize("lack", ["descriptors", "processes"])
async def test_a_job_that_finds_no_room_costs_no_other(lack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = worker.Server(theirs)
    answer, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    wanted, demand = os.pipe()
    with control, theirs, answer, os.fdopen(demand, "wb"):
        socket.send_fds(control, [b"{}"], [wanted, its.fileno(), wanted])
        its.close()
        os.close(wanted)
        if lack == "processes":
            monkeypatch.setattr(os, "fork", Mock(side_effect=BlockingIOError))
            assert server._accept()
        else:
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                assert server._accept()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        answer.settimeout(PATIENCE_SECS)
        assert answer.recv(100) == (jobs.STARTED if lack == "processes" else b"")
        assert answer.recv(100) == b""
    for end in (server._selector, server._woken, server._wake):
        end.close()


async def test_closing_ends_every_process(files: FilePool) -> None:
    tasks = await begin(files, 2)
    assert files._server
    held = [psutil.Process(files._server.pid), *workers(files)]
    await files.close()
    await until(lambda: not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in held))
    for task in tasks:
        with suppress(ApiError):
            await task


PROGRAM = """
import asyncio, sys
from gateway.audio.pool import FilePool
from tests.support.media import decode_body

async def main():
    files = FilePool()
    await decode_body(files, open(sys.argv[1], "rb").read(), "", 60)
    print(files._server.pid, file=sys.stderr, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_processes_end_with_the_gateway() -> None:
    root = Path(__file__).parents[3]
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, SPEECH[0]), stderr=asyncio.subprocess.PIPE, cwd=root
    )
    assert program.stderr
    server = psutil.Process(int(await program.stderr.readline()))
    program.kill()
    await program.wait()
    await until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
