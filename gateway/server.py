"""The gateway as a process: uvicorn around the application, with a drain before its shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import socket
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gateway.app import create_app
from gateway.config.settings import Settings
from gateway.guard import Config
from gateway.limits.connects import Guard

LISTEN_BACKLOG = 2048
FORCE_EXIT_POLL_SECS = 0.1

KEEP_ALIVE_SECS = 75
"""A connection without a request stays open for longer than proxies keep theirs, 60 s as a rule: where the gateway closed it
just when a proxy sends a recording on it, the client would get 502."""

TICK_SECS = 0.1
"""Of uvicorn's main loop."""

GARBAGE_OBJECTS = 10_000
"""When there are so many more objects than at the last look, it is time for another; Python's default is 700."""

TRIM_SECS = 5.0
"""So often memory that was freed goes back to the system."""


class GatewayServer(uvicorn.Server):
    """Uvicorn that drains first: left to itself it closes every WebSocket at once when it is told to stop."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._app = app
        self._unread_secs = settings.stream_timeout_secs
        super().__init__(
            Config(
                app,
                Guard(settings.max_connects_per_address, 100_000),
                host=settings.server_host,
                port=settings.server_port,
                loop="uvloop",
                # Larger frames are refused by us, with an error frame; far larger ones by the library, without.
                ws_max_size=2 * settings.max_frame_bytes,
                ws_per_message_deflate=False,  # audio does not compress, and inflating is work for an attacker to give
                ws_ping_interval=None,  # the idle time decides; a socket that is not read for back-pressure can't answer pings
                backlog=LISTEN_BACKLOG,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECS,
                timeout_graceful_shutdown=5,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen for connections that end when their peer takes nothing for a stream's idle time, even while they are closing.

        Without this a peer that is gone holds its socket for a quarter of an hour, and one that never reads holds it for good
        (tcp(7), TCP_USER_TIMEOUT; connections have it from their listener).
        """
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self._unread_secs * 1000))

    async def on_tick(self, counter: int) -> bool:
        """Give back what glibc would keep for good: a megabyte for each stream that was ever open at once (malloc_trim(3)).

        Blocks of their own for large buffers (mallopt(3), M_MMAP_THRESHOLD) go back by themselves, but every request then pays
        for fresh pages: 1 ms at the median, 12 ms at the 99th percentile.
        """
        if counter % round(TRIM_SECS / TICK_SECS) == 0:
            with contextlib.suppress(AttributeError):  # another C library
                ctypes.CDLL(None).malloc_trim(0)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then stop; a second signal ends the drain."""
        drain = asyncio.create_task(self._app.state.service.drain())
        while not drain.done() and not self.force_exit:
            await asyncio.wait({drain}, timeout=FORCE_EXIT_POLL_SECS)
        drain.cancel()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a signal that was obeyed is not raised again: there may be more to stop, and the exit code is 0."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the drain, a second one ends it."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    @property
    def port(self) -> int:
        """The port that it listens on, once it is started."""
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port


def build_server(settings: Settings) -> GatewayServer:
    """A server for these settings; ``await serve()`` runs it.

    What there is by now stays for good, and is no longer looked through for garbage: that would hold up everything for 30 to
    100 ms now and then. The rest is looked through seldom: what 300 streams are about always counts as new, and takes 9 ms.
    """
    server = GatewayServer(create_app(settings), settings)
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS)
    return server
