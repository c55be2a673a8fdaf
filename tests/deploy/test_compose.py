"""The image and the compose files: against the compose specification, and every name in them against the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose
from typer.main import get_command

from gateway.settings import DEFAULT_TRITON_PORT, OWN_VARIABLES, Settings, load_settings
from launcher.cli import app
from launcher.run import ROOT

FILES = ("docker-compose.yml", "docker-compose.cpu.yml", "docker-compose.observability.yml")
GIVEN = {"GRAFANA_PASSWORD": "secret"}
VARIABLE = re.compile(r"\$\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<word>[^}]*))?\}")
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+(\.\d+)?(-\w+)*$")
SCALE = 3
"""Gateways that the settings of docker-compose.yml are made for."""

Service = dict[str, Any]


class Loader(yaml.SafeLoader):
    """YAML with Compose's own tag, which takes away what an earlier file said."""


Loader.add_constructor("!reset", lambda *_: None)


def interpolated(value: Any) -> Any:
    """What Compose makes of the values that it has read: variables from the environment, or their defaults."""
    if isinstance(value, dict):
        return {key: interpolated(item) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item) for item in value]
    return VARIABLE.sub(_value, value) if isinstance(value, str) else value


def _value(match: re.Match[str]) -> str:
    if match["kind"] == "?":  # must be given
        return GIVEN[match["name"]]
    return GIVEN.get(match["name"], match["word"] or "")


def read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = interpolated(yaml.load((ROOT / name).read_text(), Loader))  # noqa: S506 (a safe loader)
    return content


def services(name: str) -> dict[str, Service]:
    content: dict[str, Service] = read(name)["services"]
    return content


SERVICES = {
    (name, service): content
    for name in ("docker-compose.yml", "docker-compose.observability.yml")
    for service, content in services(name).items()
}
BY_NAME = {service: content for (_, service), content in SERVICES.items()}


def host_path(service: Service, inside: str) -> Path:
    """Where a path inside a container comes from."""
    mount: str
    for mount in service["volumes"]:
        source, target = mount.split(":")[:2]
        if source.startswith("./") and Path(inside).is_relative_to(target):
            return ROOT / source / Path(inside).relative_to(target)
    raise AssertionError(f"no mount has {inside}")


@pytest.mark.parametrize("name", FILES)
def test_files_follow_the_compose_specification(name: str) -> None:
    content = read(name)
    for service in content["services"].values():
        if service.get("deploy", ...) is None:  # was reset
            del service["deploy"]
    compose = PyCompose.from_yaml(yaml.safe_dump(content))
    compose.validate()
    assert set(compose.service_names()) == set(services(name))


def test_a_wrong_file_is_noticed() -> None:
    with pytest.raises(ValueError, match="shm_sizes"):
        PyCompose.from_yaml(yaml.safe_dump(read("docker-compose.yml")).replace("shm_size:", "shm_sizes:"))


@pytest.mark.parametrize("service", BY_NAME)
def test_what_a_service_names_exists(service: str) -> None:
    content = BY_NAME[service]
    assert PINNED.fullmatch(content["image"]), content["image"]
    for mount in content.get("volumes", ()):
        source, _, *mode = mount.split(":")
        if source.startswith("./"):
            assert (ROOT / source).exists(), mount
            assert mode == ["ro"], mount
        elif "/" not in source:
            assert source in read("docker-compose.observability.yml")["volumes"]
        else:
            assert mount == "/var/run/docker.sock:/var/run/docker.sock:ro"
    for needed in content.get("depends_on", ()):
        assert needed in BY_NAME
        if isinstance(content["depends_on"], dict):
            assert content["depends_on"][needed] == {"condition": "service_healthy"}
            assert "healthcheck" in BY_NAME[needed] or "HEALTHCHECK" in (ROOT / "Dockerfile").read_text()
    for port in content.get("ports", ()):
        assert service == "nginx" or port.startswith("127.0.0.1:"), "published beyond this host"


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


def test_the_gateways_variables_are_settings() -> None:
    environment = BY_NAME["gateway"]["environment"]
    assert set(environment) <= set(OWN_VARIABLES)
    loaded = load_settings({name: str(value) for name, value in environment.items()}, ROOT / "deploy")
    assert loaded.notices == []
    settings = loaded.settings
    assert [address.target for address in settings.triton_addresses] == [f"triton:{DEFAULT_TRITON_PORT}"]
    assert settings.server_port == Settings().server_port
    (slots,) = re.findall(r"max_candidate_sequences: (\d+)", (ROOT / "model-repo/rnnt_greedy_bls/config.pbtxt").read_text())
    assert SCALE * (settings.max_concurrent_streams + settings.max_concurrent_batches) <= int(slots)


def test_triton_is_reached_by_the_gateways_alone() -> None:
    triton = BY_NAME["triton"]
    assert "ports" not in triton
    assert triton["networks"] == ["backend"]
    assert triton["shm_size"]
    (release,) = re.findall(r"tritonserver:(\d\d)\.\d\d-py3", triton["image"])
    assert int(release) >= 26
    for document in ("README.md", "docs/Operations.md"):
        assert set(re.findall(r"nvcr\.io/nvidia/tritonserver:[\w.-]+", (ROOT / document).read_text())) == {triton["image"]}


def test_triton_has_a_gpu_which_the_override_takes_away() -> None:
    (device,) = BY_NAME["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert "gpu" in device["capabilities"]
    assert services("docker-compose.cpu.yml") == {"triton": {"deploy": None}}


def test_gateways_can_be_scaled() -> None:
    gateway = BY_NAME["gateway"]
    assert not {"container_name", "ports", "hostname"} & set(gateway)
    defaults = Settings()
    needed = defaults.drain_timeout_secs + 2 * defaults.inference_timeout_secs + 30
    for service in ("gateway", "nginx"):
        assert int(BY_NAME[service]["stop_grace_period"].removesuffix("s")) > needed


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
    (listens,) = re.findall(r"^ +listen (\d+)", (ROOT / "deploy/nginx/nginx.conf").read_text(), re.MULTILINE)
    assert BY_NAME["nginx"]["ports"] == [f"{gateway_port}:{listens}"]
    assert f"http://127.0.0.1:{listens}/nginx-health" in BY_NAME["nginx"]["healthcheck"]["test"]


def dockerfile() -> list[tuple[str, list[str]]]:
    """Its instructions."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*$", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(keyword, shlex.split(rest)) for keyword, rest in lines]


def test_the_image() -> None:
    instructions = dockerfile()
    bases = [words[0] for keyword, words in instructions if keyword == "FROM"]
    assert len(bases) == 2
    assert bases[0] == bases[1]
    assert PINNED.fullmatch(bases[0])
    assert "slim" in bases[0]
    assert [words for keyword, words in instructions if keyword == "USER"] == [["10001"]]
    assert [words for keyword, words in instructions if keyword == "EXPOSE"] == [[str(Settings().server_port)]]
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for keyword, (*sources, _) in instructions:
        if keyword == "COPY" and not sources[0].startswith("--from"):
            assert set(sources) <= kept
            assert all((ROOT / source).exists() for source in sources)
    copied = {sources[0] for keyword, (*sources, _) in instructions if keyword == "COPY"}
    (packaged,) = re.findall(r"^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(yaml.safe_load(packaged)) <= copied
    (entry,) = (words for keyword, words in instructions if keyword == "ENTRYPOINT")
    (command,) = (words for keyword, words in instructions if keyword == "CMD")
    assert entry == ["[amira]"]
    assert command[0].strip("[]") in get_command(app).commands  # type: ignore[attr-defined]


def test_the_image_has_the_packages_that_were_tested() -> None:
    def pins(path: Path) -> set[str]:
        return set(re.findall(r"^([\w-]+==\S+ ; .*?) \\$", path.read_text(), re.MULTILINE))

    tested, shipped = pins(ROOT / "requirements.lock"), pins(ROOT / "deploy/requirements.lock")
    assert len(shipped) > 20
    assert {pin.split(" ;")[0] for pin in shipped} <= {pin.split(" ;")[0] for pin in tested}
