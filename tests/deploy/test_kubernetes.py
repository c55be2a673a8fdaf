"""The manifests rendered by kustomize, compared with the schemas, each other and the code."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from gateway.config.loading import OWN_VARIABLES, load_settings
from gateway.config.settings import Settings
from gateway.middleware import BodyLimits

Need = Callable[[str], str]
Manifest = dict[str, Any]

VERSIONS = ("1.30", "1.33", kubernetes_validate.latest_version())
WITHOUT_CLUSTER = """#!/bin/sh
case "$*" in
*" apply "*) cat; echo --- ;;
*" label "*) ;;
*) exec KUBECTL "$@" ;;
esac
"""
"""kubectl without a cluster: it prints what it would apply."""

WITHOUT_SCHEMA = {"ServiceMonitor"}
"""Kinds defined by operators."""

SELECTED = "app.kubernetes.io/name"


@pytest.fixture(scope="module")
def manifests(need: Need, deploy: Path) -> dict[tuple[str, str], Manifest]:
    """Return the manifests by kind and name; a generated ConfigMap without its hash."""
    return render(need, deploy / "kubernetes" / "base")


def render(need: Need, directory: Path) -> dict[tuple[str, str], Manifest]:
    done = subprocess.run([need("kubectl"), "kustomize", str(directory)], capture_output=True, text=True, check=True)
    return {
        (manifest["kind"], re.sub(r"-[a-z0-9]{10}$", "", manifest["metadata"]["name"])): manifest
        for manifest in yaml.safe_load_all(done.stdout)
    }


def pod(workload: Manifest) -> Manifest:
    spec: Manifest = workload["spec"]["template"]["spec"]
    return spec


def container(workload: Manifest) -> Manifest:
    (only,) = pod(workload)["containers"]
    return dict(only)


def labels(workload: Manifest) -> dict[str, str]:
    return dict(workload["spec"]["template"]["metadata"]["labels"])


def test_manifests_follow_the_schemas(manifests: dict[tuple[str, str], Manifest]) -> None:
    for (kind, _), manifest in manifests.items():
        for version in VERSIONS if kind not in WITHOUT_SCHEMA else ():
            kubernetes_validate.validate(manifest, version, strict=True)
        assert manifest["metadata"]["namespace"] == "amira"


def test_a_wrong_manifest_is_noticed(manifests: dict[tuple[str, str], Manifest]) -> None:
    wrong = {**manifests["Deployment", "amira-gateway"], "spec": {"replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def workloads(manifests: dict[tuple[str, str], Manifest]) -> Iterator[Manifest]:
    yield manifests["Deployment", "amira-gateway"]
    yield manifests["StatefulSet", "amira-triton"]


def test_selectors_select(manifests: dict[tuple[str, str], Manifest]) -> None:
    names = {labels(workload)[SELECTED] for workload in workloads(manifests)}
    for workload in workloads(manifests):
        assert workload["spec"]["selector"]["matchLabels"] == {SELECTED: labels(workload)[SELECTED]}
        for constraint in pod(workload)["topologySpreadConstraints"]:
            assert constraint["labelSelector"]["matchLabels"] == {SELECTED: labels(workload)[SELECTED]}
        name = workload["metadata"]["name"]
        assert manifests["Service", name]["spec"]["selector"] == {SELECTED: name}
        assert manifests["Service", name]["metadata"]["labels"][SELECTED] == name  # for the ServiceMonitor
        for kind in ("PodDisruptionBudget", "ServiceMonitor"):
            assert manifests[kind, name]["spec"]["selector"]["matchLabels"] == {SELECTED: name}
        assert manifests["NetworkPolicy", name]["spec"]["podSelector"]["matchLabels"] == {SELECTED: name}
        scaled = manifests["HorizontalPodAutoscaler", name]["spec"]["scaleTargetRef"]
        assert manifests[scaled["kind"], scaled["name"]]["apiVersion"] == scaled["apiVersion"]
        assert "replicas" not in workload["spec"], "or applying again undoes what the autoscaler did"
    assert names == {"amira-gateway", "amira-triton"}


def test_every_pod_is_restricted(manifests: dict[tuple[str, str], Manifest], deploy: Path) -> None:
    """By the Pod Security Standard "restricted", which a namespace may enforce."""
    filler = yaml.safe_load((deploy / "kubernetes" / "fill.yaml").read_text())["spec"]
    for spec in (*map(pod, workloads(manifests)), filler):
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (only,) = spec["containers"]
        assert only["securityContext"]["allowPrivilegeEscalation"] is False
        assert only["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {kind for volume in spec["volumes"] for kind in volume} <= {
            "name",
            "configMap",
            "emptyDir",
            "persistentVolumeClaim",
        }


def test_tritons_fit_on_nodes_with_one_gpu_and_with_eight(manifests: dict[tuple[str, str], Manifest]) -> None:
    triton = pod(manifests["StatefulSet", "amira-triton"])
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in triton["tolerations"]
    assert {one["whenUnsatisfiable"] for one in triton["topologySpreadConstraints"]} == {"ScheduleAnyway"}


def test_prometheus_of_the_chart_reads_our_monitors_and_rules(deploy: Path) -> None:
    """The chart's default selects by a label that only its own objects have."""
    values = yaml.safe_load((deploy / "kubernetes" / "kube-prometheus-stack.yaml").read_text())
    spec = values["prometheus"]["prometheusSpec"]
    assert spec == {"serviceMonitorSelectorNilUsesHelmValues": False, "ruleSelectorNilUsesHelmValues": False}
    sidecar = values["grafana"]["sidecar"]["dashboards"]
    script = (deploy / "kubernetes" / "observability.sh").read_text()
    assert f"{sidecar['label']}={sidecar['labelValue']}" in script


def test_ports_meet(manifests: dict[tuple[str, str], Manifest]) -> None:
    for workload in workloads(manifests):
        name = workload["metadata"]["name"]
        ports = {port["name"]: port["containerPort"] for port in container(workload)["ports"]}
        for port in manifests["Service", name]["spec"]["ports"]:
            assert port["port"] == ports[port["targetPort"]]
        for probe in ("startupProbe", "readinessProbe"):
            assert container(workload)[probe]["httpGet"]["port"] in ports
        for rule in manifests["NetworkPolicy", name]["spec"]["ingress"]:
            assert {port["port"] for port in rule["ports"]} <= set(ports)
        served = {port["name"] for port in manifests["Service", name]["spec"]["ports"]}
        for endpoint in manifests["ServiceMonitor", name]["spec"]["endpoints"]:
            assert endpoint["port"] in served
    assert container(manifests["Deployment", "amira-gateway"])["ports"][0]["containerPort"] == Settings().server_port


def test_only_gateways_reach_triton(manifests: dict[tuple[str, str], Manifest]) -> None:
    policy = manifests["NetworkPolicy", "amira-triton"]["spec"]
    (caller,) = [rule["from"] for rule in policy["ingress"] if rule["ports"] == [{"protocol": "TCP", "port": "grpc"}]]
    assert caller == [{"podSelector": {"matchLabels": {SELECTED: "amira-gateway"}}}]
    assert policy["egress"] == []
    names_and_traces = manifests["NetworkPolicy", "amira-names-and-traces"]["spec"]
    (chosen,) = names_and_traces["podSelector"]["matchExpressions"]
    assert chosen["key"] == SELECTED
    assert set(chosen["values"]) == {labels(workload)[SELECTED] for workload in workloads(manifests)}
    allowed = {port["port"] for rule in names_and_traces["egress"] for port in rule["ports"]}
    (collector,) = re.findall(
        r"url=http://jaeger\.monitoring:(\d+)/", " ".join(container(manifests["StatefulSet", "amira-triton"])["args"])
    )
    assert allowed == {53, 5353, int(collector)}


def test_probes_are_those_of_the_api(manifests: dict[tuple[str, str], Manifest]) -> None:
    gateway = container(manifests["Deployment", "amira-gateway"])
    assert gateway["livenessProbe"]["httpGet"]["path"] == "/health/live"
    assert gateway["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert pod(manifests["Deployment", "amira-gateway"])["enableServiceLinks"] is False


def test_settings_and_their_arithmetic(manifests: dict[tuple[str, str], Manifest], deploy: Path) -> None:
    given = manifests["ConfigMap", "amira-gateway"]["data"]
    theirs = {name: value for name, value in given.items() if name.startswith("OTEL_")}
    assert theirs.keys() ^ given.keys() <= set(OWN_VARIABLES)
    services = yaml.safe_load((deploy.parent / "docker-compose.yml").read_text())["services"]
    for name, value in theirs.items():
        assert services["gateway"]["environment"][name] == f"${{{name}:-{value}}}"
    loaded = load_settings(given, deploy)
    assert loaded.notices == []
    settings = loaded.settings
    gateway = manifests["Deployment", "amira-gateway"]
    config, keys = container(gateway)["envFrom"]
    assert config["configMapRef"]["name"] == manifests["ConfigMap", "amira-gateway"]["metadata"]["name"]
    assert keys == {"secretRef": {"name": "amira-keys"}}, "an optional one that is forgotten opens the server to all"
    (tritons, gateways) = (manifests["HorizontalPodAutoscaler", f"amira-{name}"]["spec"] for name in ("triton", "gateway"))
    service = manifests["StatefulSet", "amira-triton"]["spec"]["serviceName"]
    assert manifests["Service", service]["spec"]["clusterIP"] == "None"
    assert [address.target for address in settings.triton_addresses] == [
        f"amira-triton-{ordinal}.{service}:8001" for ordinal in range(tritons["maxReplicas"])
    ]
    config_text = (deploy.parent / "model-repo/rnnt_greedy_bls/config.pbtxt").read_text()
    slots = int(re.findall(r"max_candidate_sequences: (\d+)", config_text)[0])
    admitted = settings.max_concurrent_streams + settings.max_concurrent_batches
    for bound in ("minReplicas", "maxReplicas"):
        assert gateways[bound] * admitted <= tritons[bound] * slots
    grace = pod(gateway)["terminationGracePeriodSeconds"]
    wait = int(re.findall(r"sleep\((\d+)\)", str(container(gateway)["lifecycle"]))[0])
    assert grace >= settings.drain_timeout_secs + 2 * settings.inference_timeout_secs + 30 + wait
    assert pod(manifests["StatefulSet", "amira-triton"])["terminationGracePeriodSeconds"] >= grace


def mebibytes(quantity: str) -> int:
    (number, unit) = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 1, "Gi": 1024}[unit]


def test_tritons_grow_with_the_streams_and_a_zone_of_three_may_fail(
    manifests: dict[tuple[str, str], Manifest], deploy: Path
) -> None:
    tritons, gateways = (manifests["HorizontalPodAutoscaler", f"amira-{name}"]["spec"] for name in ("triton", "gateway"))
    places = gateways["maxReplicas"] * int(manifests["ConfigMap", "amira-gateway"]["data"]["AMIRA_MAX_CONCURRENT_STREAMS"])
    first, second = (metric["external"] for metric in tritons["metrics"])
    (used,) = (metric["pods"]["target"]["averageValue"] for metric in gateways["metrics"])
    streams = places * int(used.removesuffix("m")) // 1000
    assert first["target"] == {"type": "AverageValue", "averageValue": streams // tritons["maxReplicas"]}
    assert second["metric"]["name"] == "asr_triton_queue_seconds"
    assert tritons["maxReplicas"] % 3 == gateways["maxReplicas"] % 3 == 0
    assert streams <= 2 / 3 * places
    config = (deploy.parent / "model-repo/rnnt_greedy_bls/config.pbtxt").read_text()
    slots = int(re.findall(r"max_candidate_sequences: (\d+)", config)[0])
    assert streams <= 2 / 3 * tritons["maxReplicas"] * slots * 0.9, "recordings need some"
    scaling = " ".join((deploy.parent / "docs/Deployment.md").read_text().split())
    assert f"at most {tritons['maxReplicas']} Tritons and {gateways['maxReplicas']} gateways" in scaling
    assert f"{streams} streams at 60 % load, {streams // tritons['maxReplicas']} per Triton" in scaling


def test_a_full_gateway_fits_into_its_memory(manifests: dict[tuple[str, str], Manifest], deploy: Path) -> None:
    settings = load_settings(manifests["ConfigMap", "amira-gateway"]["data"], deploy).settings
    gateway = manifests["Deployment", "amira-gateway"]
    requests = settings.max_concurrent_batches + settings.inference_queue_size
    buffers = settings.max_concurrent_streams * settings.audio_buffer_capacity / 2**20
    # The process itself has 125 MiB. A body of JSON is three times its size once it is read; of others 1 MiB is in memory, a
    # piece, and the audio ahead of it.
    body = max(3 * settings.max_json_size / 2**20, 1 + 3)
    assert 125 + requests * body + buffers < mebibytes(container(gateway)["resources"]["limits"]["memory"])
    (tmp,) = pod(gateway)["volumes"]
    assert BodyLimits.from_settings(settings).max_total_bytes / 2**20 < mebibytes(tmp["emptyDir"]["sizeLimit"])


def test_images_and_options_are_those_of_the_compose_file(manifests: dict[tuple[str, str], Manifest], deploy: Path) -> None:
    services = yaml.safe_load((deploy.parent / "docker-compose.yml").read_text())["services"]
    for workload, service in zip(workloads(manifests), ("gateway", "triton"), strict=True):
        assert container(workload)["image"] == services[service]["image"]
    theirs, ours = services["triton"]["command"], container(manifests["StatefulSet", "amira-triton"])["args"]
    assert [option.replace("//jaeger:", "//jaeger.monitoring:") for option in theirs] == ours


def test_volumes_are_there(manifests: dict[tuple[str, str], Manifest]) -> None:
    for workload in workloads(manifests):
        volumes = {volume["name"]: volume for volume in pod(workload)["volumes"]}
        assert {mount["name"] for mount in container(workload)["volumeMounts"]} == set(volumes)
    claim = pod(manifests["StatefulSet", "amira-triton"])["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert manifests["PersistentVolumeClaim", claim]["spec"]["accessModes"] == ["ReadWriteMany"], "or nothing fills it"
    assert container(manifests["StatefulSet", "amira-triton"])["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_the_commands_bring_keys_and_models(manifests: dict[tuple[str, str], Manifest], deploy: Path) -> None:
    filler = yaml.safe_load((deploy / "kubernetes" / "fill.yaml").read_text())
    for version in VERSIONS:
        kubernetes_validate.validate(filler, version, strict=True)
    (mount,) = filler["spec"]["containers"][0]["volumeMounts"]
    (volume,) = filler["spec"]["volumes"]
    assert mount["name"] == volume["name"]
    assert "readOnly" not in mount
    tritons = pod(manifests["StatefulSet", "amira-triton"])["volumes"]
    claims = {claim["claimName"] for volume in tritons if (claim := volume.get("persistentVolumeClaim"))}
    assert claims == {volume["persistentVolumeClaim"]["claimName"]}
    commands = (deploy.parent / "docs/Deployment.md").read_text().replace("\\\n", "")
    name = filler["metadata"]["name"]
    assert re.search(rf"-C gpu-repo -c \. \| kubectl -n amira exec -i {name} -- tar -x -C {mount['mountPath']}\n", commands)
    (secret, given) = re.findall(r"create secret generic (\S+)(.*)", commands)[0]
    _, keys = container(manifests["Deployment", "amira-gateway"])["envFrom"]
    assert secret == keys["secretRef"]["name"]
    assert set(re.findall(r"--from-literal=(\w+)=", given)) == {"AMIRA_API_KEYS", "AMIRA_SESSION_KEY"} <= set(OWN_VARIABLES)


def test_autoscalers_use_metrics_that_the_adapter_makes(
    manifests: dict[tuple[str, str], Manifest], need: Need, deploy: Path, tmp_path: Path
) -> None:
    rules = yaml.safe_load((deploy / "kubernetes" / "prometheus-adapter.yaml").read_text())["rules"]
    made = {"Pods": rules["custom"], "External": rules["external"]}
    for name in ("amira-gateway", "amira-triton"):
        for metric in manifests["HorizontalPodAutoscaler", name]["spec"]["metrics"]:
            wanted = metric[metric["type"].lower()]["metric"]["name"]
            assert wanted in {rule["name"]["as"] for rule in made[metric["type"]]}
    queries = [rule["metricsQuery"] for listed in made.values() for rule in listed]
    filled = [query.replace("<<.LabelMatchers>>", 'namespace="amira"').replace("<<.GroupBy>>", "pod") for query in queries]
    group = {"name": "adapter", "rules": [{"record": f"r{n}", "expr": query} for n, query in enumerate(filled)]}
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [group]}))
    subprocess.run([need("promtool"), "check", "rules", str(tmp_path / "rules.yml")], check=True, capture_output=True)


def test_the_wait_for_the_encoder_is_that_of_the_rules(deploy: Path) -> None:
    """The adapter has the namespace in its matchers, and a range of two minutes instead of five."""
    rules = yaml.safe_load((deploy / "kubernetes" / "prometheus-adapter.yaml").read_text())["rules"]
    (made,) = (rule["metricsQuery"] for rule in rules["external"] if rule["name"]["as"] == "asr_triton_queue_seconds")
    (group,) = yaml.safe_load((deploy / "prometheus" / "rules" / "recording.yml").read_text())["groups"]
    (recorded,) = (rule["expr"] for rule in group["rules"] if rule["record"] == "asr:triton_queue_seconds:mean_5m")
    assert made.replace("{<<.LabelMatchers>>}[2m]", "[5m]") == recorded.replace("sum by (namespace) ", "sum")


def test_shards_are_the_base_each_in_its_namespace(need: Need, deploy: Path) -> None:
    for directory in (deploy / "kubernetes" / "shards").iterdir():
        shard = render(need, directory)
        assert {manifest["metadata"]["namespace"] for manifest in shard.values()} == {f"amira-{directory.name}"}
        assert ("StatefulSet", "amira-triton") in shard


def test_rules_and_dashboards_are_applied_as_they_are(need: Need, deploy: Path, tmp_path: Path) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(WITHOUT_CLUSTER.replace("KUBECTL", need("kubectl")))
    kubectl.chmod(0o755)
    script = deploy / "kubernetes" / "observability.sh"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    printed = subprocess.run([script], capture_output=True, text=True, check=True, env=environment, cwd=tmp_path).stdout
    applied = {manifest["metadata"]["name"]: manifest for manifest in yaml.safe_load_all(printed) if manifest}
    for rules in ("recording", "alerts"):
        manifest = applied.pop(f"amira-{rules}")
        assert manifest["kind"] == "PrometheusRule"
        assert manifest["spec"] == yaml.safe_load((deploy / "prometheus" / "rules" / f"{rules}.yml").read_text())
    dashboards = {path.name: path.read_text() for path in (deploy / "grafana" / "json").iterdir()}
    assert applied.pop("amira-dashboards")["data"] == dashboards
    assert not applied
