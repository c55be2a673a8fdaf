"""Hostile clients in a process of their own: ``python hostile.py KIND PORT SECONDS CLIENTS``.

They send bytes over TCP, since no WebSocket library would send such frames. The process has the lowest priority. It prints the
amount that the clients did and their own CPU seconds, so that a test can separate these from the server's cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr

HOST = "127.0.0.1"
RATE = 16_000
SPEECH = Path(__file__).parents[1] / "speech" / "jfk.flac"
TEXT, BINARY, PING, CONTINUATION = 1, 2, 9, 0
UPGRADE = (
    b"GET /v2/decode/stream/amira HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
POST = b"POST /v2/decode/batch/amira HTTP/1.1\r\nHost: x\r\nContent-Type: audio/pcm\r\nContent-Length: 320000\r\n\r\n"
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 s: a close is a reset, as of a client whose machine is gone."""


class Peer(socket.socket):
    """One connection."""

    async def begin(self, port: int, *, receive_bytes: int | None = None) -> None:
        self.setblocking(False)
        if receive_bytes:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        await asyncio.get_running_loop().sock_connect(self, (HOST, port))

    async def send_bytes(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self, data)

    async def upgrade(self) -> bool:
        """Upgrade to a WebSocket; return False if the server refuses."""
        await self.send_bytes(UPGRADE)
        answer = await asyncio.get_running_loop().sock_recv(self, 4096)
        return answer.startswith(b"HTTP/1.1 101")

    def vanish(self) -> None:
        self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


@asynccontextmanager
async def peer(port: int, *, receive_bytes: int | None = None) -> AsyncIterator[Peer]:
    with Peer() as connection:
        await connection.begin(port, receive_bytes=receive_bytes)
        yield connection


def frame(payload: bytes, opcode: int = BINARY, *, fin: bool = True) -> bytes:
    """Return a WebSocket frame (RFC 6455, section 5.2), masked with zeros."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big") if size < 2**16 else b""
    if not length:
        length = b"\xff" + size.to_bytes(8, "big")
    return bytes([opcode | 0x80 * fin]) + length + bytes(4) + payload


def speech_frames(secs: float = 0.1) -> list[bytes]:
    """Return eleven seconds of speech."""
    samples, rate = soundfile.read(SPEECH, dtype="float32", always_2d=True)
    pcm = (soxr.resample(samples.mean(axis=1), rate, RATE) * 32767).astype(np.int16)
    step = int(secs * RATE)
    return [frame(pcm[start : start + step].tobytes()) for start in range(0, len(pcm), step)]


class Attack:
    """State of all clients of a run.

    Attributes:
        port: port of the gateway.
        until: end of the attack, in seconds of ``time.monotonic``.
        done: number of streams, connections or frames.
    """

    def __init__(self, port: int, secs: float) -> None:
        self.port = port
        self.until = time.monotonic() + secs
        self.done = 0
        self.speech = speech_frames()

    @property
    def on(self) -> bool:
        return time.monotonic() < self.until

    async def pace(self, interval_secs: float) -> AsyncIterator[int]:
        """Count at this interval until the end of the attack."""
        began = time.monotonic()
        for turn in itertools.count():
            if not self.on:
                return
            yield turn
            await asyncio.sleep(began + (turn + 1) * interval_secs - time.monotonic())

    async def never_read(self) -> None:
        """Stream in real time, with a ping per frame whose pong is not read."""
        async with peer(self.port, receive_bytes=2304) as connection:
            await connection.upgrade()
            question = frame(bytes(125), PING) * 1000
            async for turn in self.pace(0.1):
                await asyncio.wait_for(connection.send_bytes(self.speech[turn % len(self.speech)] + question), 5)
                self.done += 1

    async def half_open(self) -> None:
        """Connect and stop: before, within or after the headers, within the body, or after the upgrade."""
        starts = (b"", b"GET /hea", UPGRADE[:60], POST, POST + bytes(1000), UPGRADE)
        connections = [Peer() for _ in starts]
        try:
            for connection, start in zip(connections, starts, strict=True):
                await connection.begin(self.port)
                await connection.send_bytes(start)
                self.done += 1
            async for _ in self.pace(0.5):  # a byte of a header or body at intervals
                for connection in (connections[1], connections[4]):
                    with contextlib.suppress(OSError):
                        await connection.send_bytes(b"x")
        finally:
            for connection in connections:
                connection.close()

    async def compute(self) -> None:
        """No client: compute with a hundredth of a CPU that is otherwise idle."""
        async for _ in self.pace(100 * COMPUTE_SECS):
            until = time.thread_time() + COMPUTE_SECS
            while time.thread_time() < until:
                sum(range(1000))

    async def in_time(self) -> None:
        """A regular stream, for comparison."""
        await self.too_fast(1)

    async def too_fast(self, speed: int = 10) -> None:
        """Stream at ten times real time, one stream after the other."""
        while self.on:
            async with peer(self.port) as connection:
                if not await connection.upgrade():
                    await asyncio.sleep(0.1)
                    continue
                reader = asyncio.create_task(_read(connection))
                async for turn in self.pace(0.1 / speed):
                    await connection.send_bytes(self.speech[turn % len(self.speech)])
                    self.done += 1
                reader.cancel()

    async def tiny_frames(self) -> None:
        """Send as many tiny frames as the server reads: keepalives, single samples, pings, empty fragments."""
        flood = (
            frame(b"\x01") * 2000,
            frame(bytes(2)) * 2000,
            frame(b"", PING) * 2000,
            frame(b"", BINARY, fin=False) + frame(b"", CONTINUATION, fin=False) * 1999,
        )[self.done % 4]
        self.done += 1
        async with peer(self.port) as connection:
            await connection.upgrade()
            reader = asyncio.create_task(_read(connection))
            while self.on:
                await connection.send_bytes(flood)
                flood = flood.removeprefix(frame(b"", BINARY, fin=False))  # only the first fragment begins the message
            reader.cancel()

    async def connect(self) -> None:
        """Open a share of a thousand connections per second: request an upgrade, and disconnect."""
        async for turn in self.pace(CONNECTS / 1000):
            with contextlib.suppress(OSError):
                async with peer(self.port) as connection:
                    if turn % 2:
                        await connection.send_bytes(UPGRADE)
                    self.done += 1

    async def vanish(self) -> None:
        """Open streams, and disconnect each at a random moment: within the upgrade or a frame, in a pause, or after the end."""
        randomness = random.Random(self.done)  # noqa: S311
        async for _ in self.pace(VANISHERS / VANISHED_A_SECOND):
            self.done += 1
            async with peer(self.port) as connection:
                connection.vanish()
                if randomness.random() < 0.1:
                    await connection.send_bytes(UPGRADE[: randomness.randrange(len(UPGRADE))])
                elif await connection.upgrade():
                    said = b"".join(self.speech[: randomness.randrange(20)]) + frame(b"\x00")
                    await connection.send_bytes(said[: randomness.choice((len(said), randomness.randrange(len(said))))])
                    await asyncio.sleep(randomness.uniform(0, 0.2))


async def _read(connection: Peer) -> None:
    with contextlib.suppress(OSError):
        while await asyncio.get_running_loop().sock_recv(connection, 65536):
            pass


KINDS: dict[str, Callable[[Attack], Awaitable[None]]] = {
    "compute": Attack.compute,
    "in_time": Attack.in_time,
    "never_read": Attack.never_read,
    "half_open": Attack.half_open,
    "too_fast": Attack.too_fast,
    "tiny_frames": Attack.tiny_frames,
    "connect": Attack.connect,
    "vanish": Attack.vanish,
}
COMPUTE_SECS = 0.005
"""Duration of one computation of ``compute``."""

CONNECTS = 50
"""Number of clients that share a thousand connections per second."""

VANISHERS, VANISHED_A_SECOND = 40, 40
"""Number of clients that share the streams that vanish, and streams per second: fewer than an address may open."""


async def main(kind: str, port: int, secs: float, clients: int) -> None:
    attack = Attack(port, secs)

    async def begin(number: int) -> None:
        """Begin at a time of its own within a second: windows of streams that begin together would be decoded together."""
        await asyncio.sleep(number / clients)
        await KINDS[kind](attack)

    used_secs = time.process_time()
    results = await asyncio.gather(*map(begin, range(clients)), return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, (OSError, asyncio.TimeoutError)):
            raise result
    print(attack.done, time.process_time() - used_secs)  # noqa: T201


if __name__ == "__main__":
    os.nice(19)
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])))
