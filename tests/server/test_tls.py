"""The gateway's own TLS, which openai-node requires for realtime sessions."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import httpx
import numpy as np
import pytest
import soxr

from amira.paths import ROOT
from gateway.config.settings import ConfigError, Settings
from gateway.server import build_server
from tests.support.clients import transcribe
from tests.support.servers import Gateway, Recordings, Samples

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]
NODE = ROOT / "examples" / "node"
RATE = 16_000


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "server.pem", folder / "server.key"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", "req", *kind, *names, *files], check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module")
async def secure(make_gateway: MakeGateway, certificate: tuple[Path, Path]) -> AsyncIterator[Gateway]:
    path, key = map(str, certificate)
    async with make_gateway(tls_certificate=path, tls_key=key) as running:
        yield Gateway(running.url.replace("http", "https", 1), running.server)


@pytest.fixture(scope="module")
def node_packages() -> None:
    if not shutil.which("npm"):
        pytest.skip("no npm")
    if not (NODE / "node_modules" / "openai").exists():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=NODE, check=True, capture_output=True)


@pytest.fixture
def speech(recordings: Recordings) -> Samples:
    pause = np.zeros(RATE, np.int16)
    spoken: Samples = np.concatenate((pause, recordings["jfk"][: 3 * RATE], pause))
    return spoken


async def test_rest_and_streams_over_tls(secure: Gateway, certificate: tuple[Path, Path], speech: Samples) -> None:
    trusted = ssl.create_default_context(cafile=str(certificate[0]))
    async with httpx.AsyncClient(verify=trusted) as client:
        assert (await client.get(f"{secure.url}/health")).json()["status"] == "healthy"
    final = (await transcribe(secure.stream_url(), speech, ssl=trusted)).final
    assert "fellow" in final["text"]


async def test_plain_http_gets_no_answer_from_tls(secure: Gateway) -> None:
    async with httpx.AsyncClient() as client:
        with pytest.raises(httpx.TransportError):
            await client.get(f"{secure.url.replace('https', 'http', 1)}/health")


@pytest.mark.usefixtures("node_packages")
async def test_openai_node_over_tls(secure: Gateway, certificate: tuple[Path, Path], speech: Samples, tmp_path: Path) -> None:
    audio = tmp_path / "speech.pcm"
    audio.write_bytes(soxr.resample(speech, RATE, 24_000).tobytes())
    process = await asyncio.create_subprocess_exec(
        *("node", "realtime.js", str(audio), f"{secure.url}/v1"),
        cwd=NODE,
        env={**os.environ, "NODE_EXTRA_CA_CERTS": str(certificate[0])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    printed, problems = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, problems.decode()
    assert "fellow" in printed.decode()


def test_unusable_certificate_stops_the_start(certificate: tuple[Path, Path]) -> None:
    _, key = certificate
    with pytest.raises(ConfigError, match=r"tls_certificate = '.*server\.key'.* must hold"):
        build_server(Settings(tls_certificate=str(key), tls_key=str(key)))
