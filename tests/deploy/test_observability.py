"""Prometheus' rules and Grafana's dashboards, against the real Prometheus and the real server."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import yaml
from tritonclient.utils import InferenceServerException
from websockets.exceptions import InvalidStatus

from amira.paths import SPEECH
from amira.ports import LOOPBACK, Ports, free_ports
from gateway.errors import ErrorKind
from perf.clients import GrpcClient
from tests.support.chaos import Backend, speak, stop_for
from tests.support.clients import transcribe
from tests.support.repositories import copy_repository
from tests.support.servers import Gateway, Recordings, Samples, run_gateway

Need = Callable[[str], str]
Targets = dict[str, list[str]]

RATE_WINDOW = "15s"
"""Value of $__rate_interval in the test."""

IDLE_SECS = 2
STREAMS = 5
"""Number of simultaneous timeouts that opens a breaker."""

SCRAPE_SECS = 0.25

OURS_TO_FAIL = {500, 502, 503, 504}
NO_FAILURE = {ErrorKind.NO_CAPACITY, ErrorKind.DRAINING}
"""Refusals that do not count as failures: one has an alert of its own, the other is part of a shutdown."""


class Query(NamedTuple):
    """A panel's query."""

    board: str
    panel: str
    expression: str

    @property
    def text(self) -> str:
        """The query without Grafana's variables."""
        return self.expression.replace("$__rate_interval", RATE_WINDOW)

    @property
    def here(self) -> bool:
        """Whether this machine's server has all its metrics."""
        return "nv_gpu_" not in self.expression

    @property
    def row(self) -> str:
        """Its row in docs/history/Dashboards.md, up to the value."""
        return f"| {self.panel} | `{self.expression.replace('|', chr(92) + '|')}` |"


def queries(deploy: Path) -> Iterator[Query]:
    for path in sorted((deploy / "grafana" / "json").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield Query(path.stem, panel["title"], target["expr"])


def test_rules_pass_promtool(need: Need, deploy: Path) -> None:
    for arguments in (
        ("check", "config", str(deploy / "prometheus" / "prometheus.yml")),
        ("check", "rules", *map(str, (deploy / "prometheus" / "rules").glob("*.yml"))),
        ("test", "rules", str(Path(__file__).with_name("alerts.test.yml"))),
    ):
        done = subprocess.run([need("promtool"), *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_its_runbook_and_its_unit_test(deploy: Path) -> None:
    operations = (deploy.parent / "docs" / "Monitoring.md").read_text()
    titles = re.findall(r"^#+ (.+)$", operations, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    tested = {
        alert["alertname"]
        for case in yaml.safe_load(Path(__file__).with_name("alerts.test.yml").read_text())["tests"]
        for alert in case.get("alert_rule_test", ())
        if alert.get("exp_alerts")
    }
    (group,) = yaml.safe_load((deploy / "prometheus" / "rules" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("warning", "critical")
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert page == "docs/Monitoring.md"
        assert anchor in anchors
        assert rule["alert"] in tested


def test_failures_are_all_errors_of_ours(deploy: Path) -> None:
    """Each kind of error is counted by the rules, or excluded explicitly; the dashboards count the same."""
    pattern = r'reason=~"([^"]+)"'
    (ours,) = re.findall(pattern, (deploy / "prometheus" / "rules" / "recording.yml").read_text())
    counted = {kind for kind in ErrorKind if re.fullmatch(ours, kind.code)}
    assert counted == {kind for kind in ErrorKind if kind.status in OURS_TO_FAIL} - NO_FAILURE
    shown = {query.panel: re.findall(pattern, query.expression) for query in queries(deploy)}
    assert shown["Failed by us"] == [ours]
    (turned_away,) = shown["Turned away"]
    assert {kind for kind in ErrorKind if re.fullmatch(turned_away, kind.code)} == {*NO_FAILURE, ErrorKind.QUOTA_EXCEEDED}


def test_the_limit_of_memory_is_that_of_the_manifests(deploy: Path) -> None:
    (limit,) = re.findall(r"limits: \{ memory: (\d+)Gi \}", (deploy / "kubernetes" / "base" / "gateway.yaml").read_text())
    (counted,) = re.findall(r"> 0\.9 \* (\d+) \* 2\^30", (deploy / "prometheus" / "rules" / "alerts.yml").read_text())
    assert counted == limit


def test_the_address_is_put_before_runbooks(deploy: Path, tmp_path: Path) -> None:
    (line,) = re.findall(r"^\$ (sed .*runbook_url.*)$", (deploy.parent / "docs" / "Monitoring.md").read_text(), re.MULTILINE)
    copy = tmp_path / "deploy" / "prometheus" / "rules" / "alerts.yml"
    copy.parent.mkdir(parents=True)
    copy.write_text((deploy / "prometheus" / "rules" / "alerts.yml").read_text())
    subprocess.run(shlex.split(line), cwd=tmp_path, check=True)
    (group,) = yaml.safe_load(copy.read_text())["groups"]
    for rule in group["rules"]:
        assert re.fullmatch(r"https://[\w./-]+/docs/Monitoring\.md#[a-z-]+", rule["annotations"]["runbook_url"])


@pytest.mark.skipif(sys.version_info < (3, 11), reason="grafana-foundation-sdk needs Python 3.11")
def test_dashboards_are_generated() -> None:
    from deploy.grafana.dashboards import JSON, as_json  # noqa: PLC0415 (not available for Python 3.10)

    made = dict(as_json())
    assert set(made) == set(JSON.glob("*.json"))
    for path, text in made.items():
        assert path.read_text() == text, "run python -m deploy.grafana.dashboards"


def test_every_panel_is_documented(deploy: Path) -> None:
    page = (deploy.parent / "docs" / "history" / "Dashboards.md").read_text()
    _, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    documented = {
        (section.split("\n")[0].lower(), row)
        for section in sections
        for row in re.findall(r"^(\| .+ \| `.+` \|) .+ \|$", section, re.MULTILINE)
    }
    assert documented == {(query.board, query.row) for query in queries(deploy)}


def test_dashboards_use_provisioned_sources(deploy: Path) -> None:
    provisioning = deploy / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "datasources.yml").read_text())["datasources"]
    uids = {source["uid"]: source["type"] for source in sources}
    used = set()
    for path in (deploy / "grafana" / "json").glob("*.json"):
        board = json.loads(path.read_text())
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        for panel in board["panels"]:
            for target in panel.get("targets", ()):
                assert panel["datasource"] == target["datasource"]
                used.add((target["datasource"]["uid"], target["datasource"]["type"]))
    assert used == {("prometheus", uids["prometheus"])}


def test_alloy_reads_the_fields_that_the_gateway_writes(deploy: Path) -> None:
    """Alloy is not installed here: the test checks that its components exist and the fields are those of the log."""
    text = re.sub(r"^\s*//.*$", "", (deploy / "alloy" / "config.alloy").read_text(), flags=re.MULTILINE)
    components = {".".join(match) for match in re.findall(r'^([a-z.]+) "(\w+)" \{', text, re.MULTILINE)}
    for name in re.findall(r"= \[?([a-z]+\.[a-z.]+\.\w+)\.(?:targets|output|receiver)\]?$", text, re.MULTILINE):
        assert name in components
    (expressions,) = re.findall(r"expressions = \{(.*?)\}", text, re.DOTALL)
    fields = set(re.findall(r"(\w+)\s+= \"\"", expressions))
    assert fields == {"event", "level", "request_id", "timestamp", "trace_id"}
    assert set(re.findall(r"(\w+)\s+= \"\"", text)) == fields
    assert text.count("{") == text.count("}")


class Prometheus:
    """A running Prometheus."""

    def __init__(self, http: httpx.AsyncClient, url: str) -> None:
        self._http = http
        self.url = url

    async def ready(self) -> bool:
        try:
            return (await self._http.get(f"{self.url}/-/ready")).status_code == 200
        except httpx.TransportError:
            return False

    async def query(self, text: str) -> list[dict[str, Any]]:
        return await self._result("query", query=text)

    async def lately(self, text: str) -> list[float]:
        """Return a query's results within the last seconds; a breaker may be open for less than one."""
        now = time.time()
        series = await self._result("query_range", query=text, start=now - 5, end=now, step=SCRAPE_SECS)
        return [float(value) for one in series for _, value in one["values"]]

    async def _result(self, kind: str, **params: str | float) -> list[dict[str, Any]]:
        answer = (await self._http.get(f"{self.url}/api/v1/{kind}", params=params)).json()
        assert answer["status"] == "success", f"{params}: {answer}"
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    async def alerts(self) -> set[str]:
        answer = (await self._http.get(f"{self.url}/api/v1/alerts")).json()
        return {alert["labels"]["alertname"] for alert in answer["data"]["alerts"]}


@asynccontextmanager
async def run_prometheus(
    binary: str, deploy: Path, directory: Path, targets: Targets, http: httpx.AsyncClient, **more: Any
) -> AsyncIterator[Prometheus]:
    """Run Prometheus with the project's configuration, shorter intervals and these targets.

    Args:
        more: further parts of the configuration.
    """
    config = {**yaml.safe_load((deploy / "prometheus" / "prometheus.yml").read_text()), **more}
    config["global"] = {"scrape_interval": f"{SCRAPE_SECS * 1000:.0f}ms", "evaluation_interval": "1s"}
    config["rule_files"] = [str(deploy / "prometheus" / pattern) for pattern in config["rule_files"]]
    assert {job["job_name"] for job in config["scrape_configs"]} == set(targets)
    config["scrape_configs"] = [{"job_name": job, "static_configs": [{"targets": found}]} for job, found in targets.items()]
    file = directory / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    (port,) = free_ports(LOOPBACK, 1)
    process = await asyncio.create_subprocess_exec(
        binary,
        f"--config.file={file}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={LOOPBACK}:{port}",
        "--log.level=error",
    )
    prometheus = Prometheus(http, f"http://{LOOPBACK}:{port}")
    try:
        while not await prometheus.ready():
            assert process.returncode is None
            await asyncio.sleep(0.1)
        yield prometheus
    finally:
        process.terminate()
        await process.wait()


@pytest.fixture(scope="module")
async def victim(
    tmp_path_factory: pytest.TempPathFactory,
    quick_restarts: None,  # noqa: ARG001 (needed for its effect)
) -> AsyncIterator[Backend]:
    """A Triton with a short idle timeout of sequences; the last test stops it."""
    models = copy_repository(tmp_path_factory.mktemp("victim") / "models", warm=False)
    config = models / "rnnt_greedy_bls" / "config.pbtxt"
    config.write_text(config.read_text().replace("microseconds: 60000000", f"microseconds: {IDLE_SECS * 1_000_000}"))
    backend = Backend("trouble", models)
    await backend.start()
    yield backend
    await backend.stop()


async def forget(backend: Backend) -> None:
    """Leave a sequence idle until the decoder evicts it, and continue it then."""
    client, silence = GrpcClient(backend.target), np.zeros(1600, np.int16)
    await client.request(silence, 1, start=True, end=False)
    await asyncio.sleep(IDLE_SECS + 1)
    with pytest.raises(InferenceServerException, match="START"):
        await client.request(silence, 1, start=False, end=False)
    await client.request(silence, 2, start=True, end=True)  # each request evicts idle sequences
    await client.close()


async def make_trouble(backend: Backend, samples: Samples) -> None:
    """Fill a gateway, request one more stream, and stop Triton for longer than a stream of another gateway waits."""
    await forget(backend)
    settings: dict[str, Any] = {
        "triton_endpoint": backend.target,
        "inference_timeout_secs": 1,
        "max_concurrent_streams": STREAMS,
    }
    async with run_gateway(**settings, recovery_timeout_secs=0) as hasty, run_gateway(**settings) as patient:
        streams = [asyncio.create_task(speak(url, samples)) for url in (hasty.stream_url(), *[patient.stream_url()] * STREAMS)]
        await asyncio.sleep(1.2)  # the answers so far are no more than the first failures
        with pytest.raises(InvalidStatus):
            await transcribe(patient.stream_url(), samples)
        await stop_for(backend, 3.5)
        lost, *recovered = await asyncio.gather(*streams)
    assert lost.close_code == 4503
    assert [said.close_code for said in recovered] == [1000] * STREAMS
    async with run_gateway(triton_endpoint=backend.target) as gateway:
        decoding = asyncio.create_task(transcribe(gateway.stream_url(), np.tile(samples, 4)))
        await asyncio.sleep(0.5)
        backend.signal(signal.SIGKILL)
        assert (await decoding).close_code == 1000


async def test_every_panel_has_data(
    need: Need,
    deploy: Path,
    tmp_path: Path,
    gateway: Gateway,
    triton: Ports,
    victim: Backend,
    http: httpx.AsyncClient,
    recordings: Recordings,
) -> None:
    """Every query returns data; those about failures are 0 at first, and above 0 after failures."""
    targets = {
        "gateway": [gateway.url.removeprefix("http://")],  # all gateways of this test run in this process
        "triton": [f"{ports.host}:{ports.metrics}" for ports in (triton, victim.ports)],
    }
    wanted = {query for query in queries(deploy) if query.here}
    of_trouble = {query for query in wanted if query.board == "trouble" or query.panel == "Failures of ours"}
    values: dict[Query, float] = {}
    jfk = recordings["jfk"]

    async def load() -> None:
        """Send a real-time stream, two fast streams, a recording, and a recording that is refused."""
        while True:
            fast = (transcribe(gateway.stream_url(), jfk) for _ in range(2))
            await asyncio.gather(speak(gateway.stream_url(), jfk), *fast)
            await http.post(gateway.batch_url(), content=(SPEECH / "jfk.flac").read_bytes())
            await http.post(gateway.batch_url(), content=b"")

    async def look(prometheus: Prometheus, wanted: set[Query], until: Callable[[], bool]) -> None:
        for _ in range(40):
            await asyncio.sleep(1)
            for query in wanted:
                if values.get(query):
                    continue
                if finite := [value for value in await prometheus.lately(query.text) if math.isfinite(value)]:
                    values[query] = max(values.get(query, 0), *finite)
            if until():
                return

    async with run_prometheus(need("prometheus"), deploy, tmp_path, targets, http) as prometheus:
        loading = asyncio.create_task(load())
        try:
            await look(prometheus, wanted, lambda: wanted <= set(values))
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
        alarmed = await prometheus.alerts()
        trouble = asyncio.create_task(make_trouble(victim, jfk))
        await look(prometheus, of_trouble, lambda: trouble.done() and all(values.get(query) for query in of_trouble))
        await trouble
    for query in queries(deploy):
        print(query.row, f"{values[query]:.4g} |" if query in values else "no GPU here |")
    assert wanted == set(values)
    assert not alarmed & {"AsrTritonDown", "AsrGatewayDown", "AsrFailures"}
    assert {query for query in of_trouble if not values[query]} == set()


async def test_alert_reaches_its_receiver(
    need: Need, deploy: Path, tmp_path: Path, gateway: Gateway, victim: Backend, http: httpx.AsyncClient
) -> None:
    """Prometheus is configured as docs/Monitoring.md says, Alertmanager has a receiver, and Triton is stopped."""
    operations = (deploy.parent / "docs" / "Monitoring.md").read_text()
    (alerting,) = re.findall(r"^```yaml\n(alerting:\n.*?)^```$", operations, re.MULTILINE | re.DOTALL)
    received: list[dict[str, Any]] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Receive a request with a body, and answer it."""
        head = await reader.readuntil(b"\r\n\r\n")
        if length := re.search(rb"content-length: (\d+)", head, re.IGNORECASE):
            received.extend(json.loads(await reader.readexactly(int(length[1])))["alerts"])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    people = await asyncio.start_server(take, LOOPBACK, 0)
    webhook = f"http://{LOOPBACK}:{people.sockets[0].getsockname()[1]}/"
    (port,) = free_ports(LOOPBACK, 1)
    (tmp_path / "alertmanager.yml").write_text(
        yaml.safe_dump(
            {
                "route": {"receiver": "people", "group_by": ["..."], "group_wait": "0s"},
                "receivers": [{"name": "people", "webhook_configs": [{"url": webhook}]}],
            }
        )
    )
    rules = (deploy / "prometheus" / "rules" / "alerts.yml").read_text()
    (tmp_path / "alerts.yml").write_text(re.sub(r"for: \d+m", "for: 1s", rules))
    alertmanager = await asyncio.create_subprocess_exec(
        need("prometheus-alertmanager"),
        f"--config.file={tmp_path / 'alertmanager.yml'}",
        f"--storage.path={tmp_path / 'alertmanager'}",
        f"--web.listen-address={LOOPBACK}:{port}",
        "--cluster.listen-address=",
        "--log.level=error",
    )
    more = yaml.safe_load(alerting.replace("alertmanager:9093", f"{LOOPBACK}:{port}"))
    more["rule_files"] = [str(tmp_path / "alerts.yml")]
    target = f"{LOOPBACK}:{victim.ports.metrics}"
    targets = {"gateway": [gateway.url.removeprefix("http://")], "triton": [target]}

    def told() -> list[dict[str, Any]]:
        # An alert without an instance is about missing targets.
        return [alert for alert in received if alert["labels"].get("instance")]

    try:
        async with run_prometheus(need("prometheus"), deploy, tmp_path, targets, http, **more) as prometheus:
            while len(await prometheus.query("up == 1")) < 2:
                await asyncio.sleep(0.2)
            assert told() == []
            await victim.stop()
            for _ in range(150):
                if told():
                    break
                await asyncio.sleep(0.2)
    finally:
        alertmanager.terminate()
        await alertmanager.wait()
        people.close()
    (alert,) = told()
    assert alert["labels"] == {"alertname": "AsrTritonDown", "job": "triton", "instance": target, "severity": "critical"}
    assert alert["annotations"]["summary"] == f"Triton {target} does not answer"
    assert alert["status"] == "firing"
