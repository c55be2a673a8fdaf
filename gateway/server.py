"""Run the application in uvicorn, with a drain before the shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import ssl
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from gateway.app import create_app
from gateway.config.settings import ConfigError, Settings
from gateway.guard import Config
from gateway.limits.connects import ConnectionLimits
from gateway.process import max_connections, raise_descriptor_limit, trim_heap, tune_garbage_collection

LISTEN_BACKLOG = 2048

MAX_EVENT_BYTES = 4 * 2**20
"""Largest event of a realtime session, in bytes: a minute of audio at 24 kHz in base64."""
FORCE_EXIT_POLL_SECS = 0.1

KEEP_ALIVE_SECS = 75
"""Keep-alive timeout; longer than that of proxies, usually 60 s. If the gateway closed a connection while a proxy sends a
recording on it, the client would get 502."""

TICK_SECS = 0.1
"""Interval of uvicorn's main loop, in seconds."""

TRIM_SECS = 5.0
"""Interval at which freed memory is returned to the system, in seconds."""


class GatewayServer(uvicorn.Server):
    """uvicorn with a drain before its shutdown. Without a drain, the shutdown closes every WebSocket at once."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._app = app
        self._unread_secs = settings.stream_timeout_secs
        super().__init__(
            Config(
                app,
                ConnectionLimits(settings.max_connects_per_address, max_connections()),
                host=settings.server_host,
                port=settings.server_port,
                loop="uvloop",
                # The application refuses frames over max_frame_bytes with an error frame; websockets closes without one.
                ws_max_size=max(2 * settings.max_frame_bytes, MAX_EVENT_BYTES),
                ssl_certfile=settings.tls_certificate,
                ssl_keyfile=settings.tls_key,
                ws_per_message_deflate=False,  # audio does not compress, and decompression costs CPU
                ws_ping_interval=None,  # stream_timeout_secs limits idle streams; a peer that is held back cannot answer pings
                backlog=LISTEN_BACKLOG,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECS,
                timeout_graceful_shutdown=5,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and set TCP_USER_TIMEOUT to ``stream_timeout_secs``.

        Without the timeout, a vanished peer holds its socket for 15 minutes, and a peer that never reads holds it for ever
        (tcp(7); connections inherit the timeout from their listener).
        """
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self._unread_secs * 1000))

    async def on_tick(self, counter: int) -> bool:
        """Trim the heap every TRIM_SECS."""
        if counter % round(TRIM_SECS / TICK_SECS) == 0:
            trim_heap()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then stop. A second signal ends the drain."""
        drain = asyncio.create_task(self._app.state.service.drain())
        while not drain.done() and not self.force_exit:
            await asyncio.wait({drain}, timeout=FORCE_EXIT_POLL_SECS)
        drain.cancel()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals without raising them again as uvicorn does: the launcher must stop Triton, and the exit code is 0."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handlers = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the drain at the first signal, and end it at the second."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    @property
    def port(self) -> int:
        """Port of the started server."""
        port: int = self.servers[0].sockets[0].getsockname()[1]
        return port


def build_server(settings: Settings) -> GatewayServer:
    """Return a server for these settings; ``await serve()`` runs it.

    Raises:
        ConfigError: the TLS certificate is not usable.
    """
    _check_certificate(settings)
    raise_descriptor_limit()
    server = GatewayServer(create_app(settings), settings)
    tune_garbage_collection()
    return server


def _check_certificate(settings: Settings) -> None:
    if settings.tls_certificate is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certificate, settings.tls_key)
    except (ssl.SSLError, OSError) as error:
        given = f"tls_certificate = {settings.tls_certificate!r}, tls_key = {settings.tls_key!r}"
        reason = getattr(error, "reason", None) or error
        raise ConfigError(f"{given}: must hold a certificate and its key as PEM ({reason})") from None
