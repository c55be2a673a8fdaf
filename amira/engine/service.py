"""Run the gateway and the embedded Triton as one service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from amira.engine.errors import EngineError
from amira.engine.process import TritonProcess, check_shared_memory
from amira.engine.wheel import Engine
from amira.models.configs import check_ensembles
from amira.paths import ENGINE_HOME, ONNXRUNTIME_BACKEND
from amira.ports import LOOPBACK, Ports, check_free, gateway_listeners
from gateway.audio.files import decode_audio
from gateway.config.settings import Settings
from gateway.errors import ApiError
from gateway.server import build_server
from gateway.tracing import triton_options
from gateway.transcript.transcript import Answer
from gateway.triton.pool import TritonPool


@dataclass(frozen=True)
class Running:
    """A running service.

    Attributes:
        url: base URL of the gateway on this machine.
        ports: Triton's ports.
        log_path: Triton's log.
    """

    url: str
    ports: Ports
    log_path: Path


@asynccontextmanager
async def service(
    settings: Settings, model_repository: Path, ports: Ports, on_progress: Callable[[int, int], None]
) -> AsyncIterator[tuple[Running, asyncio.Task[None]]]:
    """Start Triton, wait for its models, and start the gateway; stop them in the opposite order.

    Yields:
        The service, and the task that ends when the gateway has stopped.

    Raises:
        PortError: a port is in use.
        ModelError: the model repository cannot be served with these settings.
        EngineError: Triton or a model cannot start.
    """
    check_free([*gateway_listeners(settings.server_host, settings.server_port, settings.riva_port), *ports.listeners()])
    check_ensembles(model_repository, settings.models.values())
    check_shared_memory()
    log_path = ENGINE_HOME / f"triton-{ports.grpc}.log"
    engine = Engine.prepare(ENGINE_HOME, ONNXRUNTIME_BACKEND)
    triton = TritonProcess(engine, model_repository, ports, log_path, triton_options(settings), settings.models.values())
    await triton.start(on_progress)
    keeper = asyncio.create_task(triton.keep_alive(), name="triton keeper")
    try:
        ours = {"triton_endpoint": f"http://{ports.host}:{ports.grpc}", "triton_endpoints": ()}
        server = build_server(settings.model_copy(update=ours))
        serving = asyncio.create_task(server.serve(), name="gateway")
        while not server.started:
            if serving.done():
                serving.result()
                raise EngineError("the gateway ended while it started; see its log")
            await asyncio.sleep(0.02)
        host = LOOPBACK if settings.server_host in ("0.0.0.0", "::") else settings.server_host  # noqa: S104
        scheme = "https" if settings.tls_certificate else "http"
        running = Running(f"{scheme}://{host}:{server.port}", ports, log_path)
        try:
            yield running, serving
        finally:
            server.should_exit = True
            await serving
    finally:
        keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeper
        await triton.stop()


async def transcribe_with_each(
    model_repository: Path, ensembles: Sequence[str], ports: Ports, recording: bytes
) -> AsyncIterator[tuple[str, Answer]]:
    """Start Triton with a model repository, and transcribe a recording with each ensemble.

    Args:
        model_repository: the repository.
        ensembles: names of the ensembles.
        ports: ports of Triton.
        recording: an audio file, decoded in one request.

    Yields:
        Name and answer of each ensemble.

    Raises:
        EngineError: Triton or a model cannot start, or an ensemble failed.
    """
    engine = Engine.prepare(ENGINE_HOME, ONNXRUNTIME_BACKEND)
    triton = TritonProcess(engine, model_repository, ports, ENGINE_HOME / "triton-check.log")
    await triton.start()
    client = TritonPool(Settings(triton_endpoint=f"{ports.host}:{ports.grpc}", models={name: name for name in ensembles}))
    try:
        await client.start()
        for name in ensembles:
            ensemble = client.ensemble(name)
            samples = decode_audio(recording, "application/octet-stream", ensemble.max_whole_secs)
            yield name, await client.recording(ensemble, {}).send(samples, end=True)
    except ApiError as error:
        raise EngineError(f"a transcription failed: {error.message}; see {ENGINE_HOME / 'triton-check.log'}") from error
    finally:
        await client.close()
        await triton.stop()
