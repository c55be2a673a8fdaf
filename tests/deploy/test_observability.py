"""Prometheus' rules and Grafana's dashboards, against the real Prometheus and the real server."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import yaml
from clients import transcribe
from conftest import Gateway, Recordings

from gateway.errors import ErrorKind
from launcher.engine import Ports, free_ports
from launcher.run import LOOPBACK, SPEECH

Need = Callable[[str], str]

RATE_WINDOW = "15s"
"""What $__rate_interval stands for while the test looks."""

OURS_TO_FAIL = {500, 502, 503, 504}
NO_FAILURE = {ErrorKind.NO_CAPACITY, ErrorKind.DRAINING}
"""Refusals that do not count as failures: they have their own alert, and are how a server stops."""


class Query(NamedTuple):
    """A panel's query."""

    board: str
    panel: str
    expression: str

    @property
    def text(self) -> str:
        """As Prometheus understands it."""
        return self.expression.replace("$__rate_interval", RATE_WINDOW)

    @property
    def here(self) -> bool:
        """Whether this machine's server has all metrics of it."""
        return "nv_gpu_" not in self.expression

    @property
    def row(self) -> str:
        """In docs/Dashboards.md, up to the value."""
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
    operations = (deploy.parent / "docs" / "Operations.md").read_text()
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
        assert page == "docs/Operations.md"
        assert anchor in anchors
        assert rule["alert"] in tested


def test_failures_are_all_errors_of_ours(deploy: Path) -> None:
    """A new kind of error must be sorted into the rules, or into those that are no failure."""
    rules = (deploy / "prometheus" / "rules" / "recording.yml").read_text()
    (pattern,) = re.findall(r'reason=~"([^"]+)"', rules)
    counted = {kind for kind in ErrorKind if re.fullmatch(pattern, kind.code)}
    assert counted == {kind for kind in ErrorKind if kind.status in OURS_TO_FAIL} - NO_FAILURE


@pytest.mark.skipif(sys.version_info < (3, 11), reason="grafana-foundation-sdk needs Python 3.11")
def test_dashboards_are_what_the_code_makes() -> None:
    from deploy.grafana.dashboards import JSON, as_json  # noqa: PLC0415 (not to be had on Python 3.10)

    made = dict(as_json())
    assert set(made) == set(JSON.glob("*.json"))
    for path, text in made.items():
        assert path.read_text() == text, "run python -m deploy.grafana.dashboards"


def test_every_panel_is_documented(deploy: Path) -> None:
    page = (deploy.parent / "docs" / "Dashboards.md").read_text()
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
    """The real Alloy can't be had here: what is checked is that components are there and fields are the log's."""
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
        answer = (await self._http.get(f"{self.url}/api/v1/query", params={"query": text})).json()
        assert answer["status"] == "success", f"{text}: {answer}"
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    async def alerts(self) -> set[str]:
        answer = (await self._http.get(f"{self.url}/api/v1/alerts")).json()
        return {alert["labels"]["alertname"] for alert in answer["data"]["alerts"]}


@asynccontextmanager
async def run_prometheus(
    binary: str, deploy: Path, directory: Path, targets: dict[str, str], http: httpx.AsyncClient
) -> AsyncIterator[Prometheus]:
    """Prometheus with the project's configuration, looking faster and at these targets."""
    config = yaml.safe_load((deploy / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(deploy / "prometheus" / pattern) for pattern in config["rule_files"]]
    assert {job["job_name"] for job in config["scrape_configs"]} == set(targets)
    config["scrape_configs"] = [{"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in targets.items()]
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


async def test_every_panel_has_data(
    need: Need,
    deploy: Path,
    tmp_path: Path,
    gateway: Gateway,
    triton: Ports,
    http: httpx.AsyncClient,
    recordings: Recordings,
) -> None:
    targets = {"gateway": gateway.url.removeprefix("http://"), "triton": f"{LOOPBACK}:{triton.metrics}"}
    wanted = list(queries(deploy))
    assert wanted
    values: dict[Query, float] = {}

    async def load() -> None:
        """Two streams and a recording at a time, and one request that is refused."""
        while True:
            jfk = recordings["jfk"]
            await asyncio.gather(*(transcribe(gateway.stream_url(), jfk) for _ in range(2)))
            await http.post(gateway.batch_url(), content=(SPEECH / "jfk.flac").read_bytes())
            await http.post(gateway.batch_url(), content=b"")

    async def look(prometheus: Prometheus) -> None:
        for query in wanted:
            found = [float(sample["value"][1]) for sample in await prometheus.query(query.text)]
            if finite := [value for value in found if math.isfinite(value)]:
                values[query] = max(finite)

    async with run_prometheus(need("prometheus"), deploy, tmp_path, targets, http) as prometheus:
        loading = asyncio.create_task(load())
        try:
            for _ in range(20):
                await asyncio.sleep(1)
                await look(prometheus)
                if all(query in values for query in wanted if query.here):
                    break
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
        alarmed = await prometheus.alerts()
    for query in wanted:
        print(query.row, f"{values[query]:.4g} |" if query in values else "no GPU here |")
    assert {query for query in wanted if query.here} == {query for query in values if query.here}
    assert not alarmed & {"AsrTritonDown", "AsrGatewayDown", "AsrFailures"}
