"""The gRPC server of Riva's API, which runs in the gateway's event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import structlog

from gateway.api.riva import MAX_MESSAGE_BYTES, SpeechRecognition
from gateway.api.riva_health import Health, Reflection
from gateway.api.riva_schema import HEALTH, REFLECTION, SPEECH_RECOGNITION
from gateway.config.settings import ConfigError, Settings
from gateway.service import Service

REFLECTION_ALPHA = "grpc.reflection.v1alpha.ServerReflection"
"""Former name of reflection, with the same messages, which most tools still use."""

MAX_RPCS_PER_CONNECTION = 1000
"""Maximum number of RPCs of one connection at once; further ones wait at the client."""

MIN_PING_MS = 5_000
"""Minimum interval of a client's pings, in milliseconds; gRPC's default of 5 minutes closes connections of usual clients."""

CONNECTION_IDLE_MS = 600_000
"""Time after which a connection without an RPC is closed, in milliseconds; clients connect again by themselves."""

PING_TIMEOUT_MS = 10_000
"""Time in which a client has to answer a ping, in milliseconds; then the connection is lost, and with it its streams."""

STOP_SECS = 1.0
"""Time in which RPCs can end when the server stops, in seconds; the drain has passed by then."""

log = structlog.get_logger()


@dataclass(frozen=True)
class Running:
    """A running server; ``port`` is where it listens."""

    port: int


@asynccontextmanager
async def run(service: Service) -> AsyncIterator[Running]:
    """Serve gRPC on ``riva_port`` of the settings.

    Raises:
        ConfigError: the port is in use.
    """
    settings = service.settings
    server = grpc.aio.server(options=_options(settings))
    for name, handlers in (
        (SPEECH_RECOGNITION, SpeechRecognition(service).handlers()),
        (HEALTH, Health(service.ready).handlers()),
        (REFLECTION, (reflection := Reflection().handlers())),
        (REFLECTION_ALPHA, reflection),
    ):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    host = f"[{settings.server_host}]" if ":" in settings.server_host else settings.server_host
    target = f"{host}:{settings.riva_port}"
    try:
        credentials = _credentials(settings)
        port = server.add_secure_port(target, credentials) if credentials else server.add_insecure_port(target)
    except RuntimeError:
        raise ConfigError(f"riva_port = {settings.riva_port}: can't listen on {target}; choose another port") from None
    await server.start()
    log.info("riva server started", port=port)
    try:
        yield Running(port)
    finally:
        await server.stop(STOP_SECS)


def _options(settings: Settings) -> list[tuple[str, int]]:
    """Return the options of gRPC's core (grpc/impl/channel_arg_names.h)."""
    return [
        ("grpc.so_reuseport", 0),  # a second server on the port is an error
        ("grpc.max_receive_message_length", min(MAX_MESSAGE_BYTES, settings.max_request_size)),
        ("grpc.max_concurrent_streams", MAX_RPCS_PER_CONNECTION),
        ("grpc.max_connection_idle_ms", CONNECTION_IDLE_MS),
        ("grpc.keepalive_time_ms", round(settings.stream_timeout_secs * 1000)),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_MS),
        ("grpc.http2.bdp_probe", 0),  # it would raise what is received of a stream that waits, from 64 KiB to megabytes
    ]


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Return the certificate and key of the settings; None without TLS."""
    if settings.tls_certificate is None:
        return None
    certificate = Path(settings.tls_certificate).read_bytes()
    key = Path(settings.tls_key).read_bytes() if settings.tls_key else certificate
    return grpc.ssl_server_credentials([(key, certificate)])
