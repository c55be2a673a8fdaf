"""Probes, metrics and documentation of a running gateway."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import httpx
from prometheus_client.parser import text_string_to_metric_families

from amira.paths import ROOT
from amira.ports import Ports, free_ports
from gateway import __version__
from tests.support.clients import gateway_metrics, open_socket
from tests.support.servers import Gateway, run_gateway

MakeGateway = Callable[..., AbstractAsyncContextManager[Gateway]]

MODELS = {"asr_ensemble", "rnnt_greedy_bls", "detokenizer", "preprocessor", "encoder", "encoder_exclusive", "decoder_joint"}


async def test_health(gateway: Gateway, http: httpx.AsyncClient) -> None:
    answer = await http.get(f"{gateway.url}/health")
    assert answer.status_code == 200
    assert answer.json() == {"status": "healthy", "service": "amira-asr-server", "version": __version__}
    assert (await http.get(f"{gateway.url}/health/live")).status_code == 200


async def test_ready_lists_the_models(gateway: Gateway, http: httpx.AsyncClient) -> None:
    answer = await http.get(f"{gateway.url}/health/ready")
    assert answer.status_code == 200
    assert answer.json() == {"status": "ready", "models": {"amira": True}}


async def test_detailed_lists_models_and_work_in_flight(gateway: Gateway, http: httpx.AsyncClient) -> None:
    async with open_socket(gateway.stream_url()):
        body = (await http.get(f"{gateway.url}/health/detailed")).json()
    assert body["status"] == "ready"
    (endpoint,) = body["dependencies"]["triton"]
    assert endpoint["models"] == dict.fromkeys(MODELS, "ready")
    assert endpoint["reachable"] is True
    assert 0 < endpoint["latency_ms"] < 2000
    assert endpoint["breaker"] == "closed"
    assert body["streams"] == {"active": 1, "capacity": 64}
    assert body["batches"]["active"] == 0


async def test_gateway_without_triton_is_alive_but_not_ready(http: httpx.AsyncClient) -> None:
    async with run_gateway(triton_endpoint=f"localhost:{free_ports('127.0.0.1', 1)[0]}") as gateway:
        assert (await http.get(f"{gateway.url}/health")).status_code == 200
        assert (await http.get(f"{gateway.url}/health/live")).status_code == 200
        answer = await http.get(f"{gateway.url}/health/ready")
        assert answer.status_code == 503
        assert answer.json()["status"] == "initializing"
        answer = await http.post(gateway.batch_url(), content=bytes(3200), headers={"Content-Type": "application/octet-stream"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "not_ready"
        assert "Retry-After" in answer.headers
        body = (await http.get(f"{gateway.url}/health/detailed")).json()
        assert body["dependencies"]["triton"][0]["reachable"] is False


async def test_unknown_ensemble_degrades_readiness(make_gateway: MakeGateway, http: httpx.AsyncClient) -> None:
    async with make_gateway(models={"amira": "asr_ensemble", "other": "no_such_ensemble"}) as gateway:
        answer = await http.get(f"{gateway.url}/health/ready")
        assert answer.json() == {"status": "degraded", "models": {"amira": True, "other": False}}
        assert answer.status_code == 200
        body = (await http.get(f"{gateway.url}/health/detailed")).json()
        assert body["dependencies"]["triton"][0]["models"]["no_such_ensemble"] == "unknown"


async def test_model_without_decoder_is_not_ready(make_gateway: MakeGateway, http: httpx.AsyncClient) -> None:
    async with make_gateway(models={"amira": "encoder"}) as gateway:
        assert (await http.get(f"{gateway.url}/health/ready")).status_code == 503
        assert (await http.get(f"{gateway.url}/health/detailed")).json()["status"] == "initializing"


async def test_draining_is_not_ready(make_gateway: MakeGateway, http: httpx.AsyncClient) -> None:
    async with make_gateway(drain_timeout_secs=1) as gateway, open_socket(gateway.stream_url()):
        gateway.server.should_exit = True
        await asyncio.sleep(0.3)
        answer = await http.get(f"{gateway.url}/health/ready")
        assert answer.status_code == 503
        assert answer.json()["status"] == "draining"
        answer = await http.post(gateway.batch_url(), content=bytes(3200), headers={"Content-Type": "application/octet-stream"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "draining"
        assert (await gateway_metrics(gateway.url))["asr_draining", ()] == 1


async def test_metrics_equal_the_documented_ones(gateway: Gateway, triton: Ports, http: httpx.AsyncClient) -> None:
    """All exist from the start, and no others except those of Python and Triton."""
    _, _, section = (ROOT / "docs" / "Monitoring.md").read_text().partition("## Metrics\n")
    section, _, _ = section.partition("\n## ")
    entries = re.findall(r"^(?:\| (`.+?) \||- (`.+?):)", section, re.MULTILINE)
    documented = {name for entry in entries for name in re.findall(r"`(\w+)[`{]", "".join(entry))}
    pages = [(await http.get(url)).text for url in (f"{gateway.url}/metrics", f"http://{triton.host}:{triton.metrics}/metrics")]
    families = [family for page in pages for family in text_string_to_metric_families(page) if family.samples]
    exported = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    assert {name for name in exported if not name.startswith(("python_", "process_", "nv_"))} == documented
    samples = await gateway_metrics(gateway.url)
    assert ("asr_websocket_closes_total", (("code", "4413"),)) in samples
    assert ("asr_rejections_total", (("reason", "no_capacity"),)) in samples
    assert not [name for name, _ in samples if name.endswith("_created")]


async def test_openapi(gateway: Gateway, http: httpx.AsyncClient) -> None:
    assert (await http.get(f"{gateway.url}/docs")).status_code == 200
    schema = (await http.get(f"{gateway.url}/openapi.json")).json()
    batch = schema["paths"]["/v2/decode/batch/{model}"]["post"]
    assert {"application/octet-stream", "multipart/form-data", "application/json"} <= set(batch["requestBody"]["content"])
    assert {"200", "400", "401", "404", "413", "415", "422", "429", "502", "503", "504"} <= set(batch["responses"])
