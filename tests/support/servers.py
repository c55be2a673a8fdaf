"""Fixtures: one real Triton with the bundled model for each process of the tests, and gateways in front of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest

from amira.engine.process import TritonProcess
from amira.engine.wheel import Engine
from amira.paths import ENGINE_HOME, ONNXRUNTIME_BACKEND, SPEECH
from amira.ports import LOOPBACK, Ports, free_ports
from gateway.app import create_app
from gateway.audio.files import decode_audio
from gateway.config.settings import Settings
from gateway.logs import configure_logging
from gateway.server import GatewayServer
from tests.support.cache import published, remembered_growth
from tests.support.clients import decoder_metric
from tests.support.repositories import REPORT_SECS, served_repository
from tests.support.synthetic import Kind

Samples = npt.NDArray[np.int16]
Recordings = dict[str, Samples]
KINDS: tuple[Kind, ...] = ("rnnt", "tdt")


@dataclass(frozen=True)
class Gateway:
    """A running gateway."""

    url: str
    server: GatewayServer

    def stream_url(self, model: str = "amira") -> str:
        return f"{self.url.replace('http', 'ws', 1)}/v2/decode/stream/{model}"

    def batch_url(self, model: str = "amira") -> str:
        return f"{self.url}/v2/decode/batch/{model}"


@asynccontextmanager
async def run_gateway(**settings: Any) -> AsyncIterator[Gateway]:
    defaults = {"server_host": LOOPBACK, "server_port": 0, "drain_timeout_secs": 1.0, "max_connects_per_address": 10_000}
    chosen = Settings(**{**defaults, **settings})
    configure_logging(chosen)
    server = GatewayServer(create_app(chosen), chosen)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        if serving.done():
            serving.result()
        await asyncio.sleep(0.01)
    try:
        yield Gateway(f"http://{LOOPBACK}:{server.port}", server)
    finally:
        server.should_exit = True
        await serving


@pytest.fixture(scope="session")
async def triton(pytestconfig: pytest.Config) -> AsyncIterator[Ports]:
    """Ports of the Triton with the bundled model that all tests of this process share.

    A model's process ends itself when the machine stalls for a second. Triton is then restarted, so that one test fails and not
    all after it. It gets no canaries, since tests count what it decodes.
    """
    ports = Ports(LOOPBACK, *free_ports(LOOPBACK, 3))
    engine = Engine.prepare(ENGINE_HOME, ONNXRUNTIME_BACKEND)
    log_path = ENGINE_HOME / f"triton-tests-{os.getpid()}.log"
    server = TritonProcess(engine, served_repository(), ports, log_path, ensembles=())
    await server.start()
    keeper = asyncio.create_task(server.keep_alive())
    yield ports
    keeper.cancel()
    await asyncio.gather(keeper, return_exceptions=True)
    # Only in the seconds of an orderly end do the models' processes write which lines they ran.
    await server.stop(timeout_secs=20 if pytestconfig.getoption("cov_source", None) else 0)


@pytest.fixture(scope="module")
def quick_restarts() -> Iterator[None]:
    """Restart a Triton that is kept alive at once, however often it ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("amira.engine.process.RESTART_DELAY_RANGE_SECS", (0.1, 0.2))
        yield


@pytest.fixture(scope="session")
def make_gateway(triton: Ports) -> Callable[..., AbstractAsyncContextManager[Gateway]]:
    """Factory of gateways in front of the shared Triton: ``async with make_gateway(stream_timeout_secs=1) as gateway``."""

    def make(**settings: Any) -> AbstractAsyncContextManager[Gateway]:
        # Tests count the decoder's calls, so canaries are rare.
        defaults = {"triton_endpoint": f"{triton.host}:{triton.grpc}", "canary_interval_secs": 3600}
        return run_gateway(**{**defaults, **settings})

    return make


@pytest.fixture(scope="session")
async def gateway(make_gateway: Callable[..., AbstractAsyncContextManager[Gateway]]) -> AsyncIterator[Gateway]:
    """A gateway with room for many streams and otherwise default settings."""
    async with make_gateway(max_concurrent_streams=64) as running:
        yield running


@pytest.fixture(scope="session")
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def recordings() -> Recordings:
    return read_recordings()


def read_recordings() -> Recordings:
    """The bundled recordings at 16 kHz by name, the shortest first."""
    samples = {path.stem: decode_audio(path.read_bytes(), "audio/flac", max_secs=60) for path in SPEECH.glob("*.flac")}
    return dict(sorted(samples.items(), key=lambda item: len(item[1])))


@pytest.fixture
async def no_sequence_left(triton: Ports) -> AsyncIterator[None]:
    """Fail a test that leaves a sequence in the decoder; sequences from before, as of killed gateways, do not count."""
    before = await decoder_metric(triton, "asr_decoder_sequences", settle_secs=0)
    yield
    for _ in range(50):
        if await decoder_metric(triton, "asr_decoder_sequences", settle_secs=3 * REPORT_SECS) <= before:
            return
    pytest.fail("the decoder still holds a stream")


@pytest.fixture(scope="session")
def quick_imports() -> Iterator[None]:
    """Measure the memory of each encoder once, not at each import."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("amira.models.importing.measure_growth", remembered_growth)
        yield


@pytest.fixture(scope="session")
def sources(quick_imports: None) -> dict[str, Path]:  # noqa: ARG001 (needed for its effect)
    """Directories of synthetic models by kind, in the layout that models are published in. Tests must not change them."""
    return {kind: published(kind) for kind in KINDS}
