"""What is deployed: Kubernetes, Helm, compose, systemd, Prometheus and Grafana fit each other and the server."""

import json
import re
import shutil
import subprocess

import kubernetes_validate
import pytest
import yaml

from quartet.http_gateway.app import ENDPOINTS
from quartet.http_gateway.http.auth import Access
from quartet.runtime.config import ServerConfig
from quartet.runtime.launcher.supervisor import DRAIN_GRACE_S
from quartet.runtime.settings import flags
from tests.helm import render
from tests.servers import ROOT

DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm/quartet"
SETTINGS = {
    "defaults": {},
    "everything": {
        "model": "Qwen/Qwen2.5-0.5B-Instruct",
        "apiKeySecret": "keys",
        "adminKey": True,
        "extraArgs": ["--max-running-requests", "64"],
        "extraEnv": [{"name": "QUARTET_PAGE_SIZE", "value": "1"}],
        "drainTimeout": 100,
        "strategy": "RollingUpdate",
        "cache": {"accessMode": "ReadWriteMany", "storageClass": "fast"},
        "autoscaling": {"enabled": True},
        "resources": {"limits": {"nvidia.com/gpu": 1}},
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
    },
    "no cache": {"cache": {"enabled": False}, "replicas": 3},
}


def plain():
    for name in ("quartet.yaml", "hpa.yaml"):
        yield from yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text())


def objects(name):
    """The objects of the plain manifests, or of the chart with settings of that name."""
    return list(plain() if name == "plain" else render(CHART, "mine", SETTINGS[name]))


ALL = ["plain", *SETTINGS]


def of_kind(found, kind):
    return [item for item in found if item["kind"] == kind]


@pytest.mark.parametrize("name", ALL)
def test_every_object_is_one_that_kubernetes_takes(name):
    found = objects(name)
    assert {"Deployment", "Service"} <= {item["kind"] for item in found}
    for item in found:
        kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", ALL)
def test_the_pod_starts_a_server_that_takes_its_flags_and_variables_and_drains_in_time(name):
    [deployment] = of_kind(objects(name), "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    environment = {item["name"]: item.get("value", "key") for item in container["env"]}
    loaded = flags.load(container["args"], environment=environment)
    assert loaded.notes == []
    assert set(environment) <= {variable for names in flags.variables_of_settings().values() for variable in names}
    assert loaded.config.log_format == "json" and "--api-key" not in container["args"]
    pause_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause_s + loaded.config.drain_timeout + DRAIN_GRACE_S
    assert pod["enableServiceLinks"] is False  # QUARTET_PORT would be a URL


@pytest.mark.parametrize("name", ALL)
def test_a_mount_leaves_the_cache_of_kernels_as_private_as_it_was_made(name):
    (pod,) = (found["spec"]["template"]["spec"] for found in of_kind(objects(name), "Deployment"))
    assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


@pytest.mark.parametrize("name", ALL)
def test_probes_ask_open_routes_and_mounts_have_volumes(name):
    found = objects(name)
    [deployment] = of_kind(found, "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    public = {endpoint.path for endpoint in ENDPOINTS if endpoint.access is Access.PUBLIC}
    probes = [container[probe]["httpGet"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")]
    assert {probe["path"] for probe in probes} <= public and {probe["port"] for probe in probes} == {"http"}
    assert [port["containerPort"] for port in container["ports"]] == [ServerConfig().port]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    claims = {item["metadata"]["name"] for item in of_kind(found, "PersistentVolumeClaim")}
    bound = [volume["persistentVolumeClaim"] for volume in volumes.values() if "persistentVolumeClaim" in volume]
    claimed = {claim["claimName"] for claim in bound}
    assert claimed == claims
    [service] = of_kind(found, "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_the_autoscaler_scales_that_deployment_by_the_length_of_the_queue(name):
    found = objects(name)
    [scaler], [deployment] = of_kind(found, "HorizontalPodAutoscaler"), of_kind(found, "Deployment")
    assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    [metric] = scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "quartet_queue_requests"
    assert "sglang:num_queue_reqs" in (DEPLOY / "kubernetes/hpa.yaml").read_text()  # the adapter's rule


@pytest.mark.parametrize("name", SETTINGS)
def test_helm_itself_renders_the_same(name, tmp_path):
    if shutil.which("helm") is None:
        pytest.skip("helm is not installed; the other tests use a renderer of their own (tests/helm.py)")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(SETTINGS[name]))
    argv = ["helm", "template", "mine", str(CHART), "-f", str(tmp_path / "own.yaml")]
    ran = subprocess.run(argv, capture_output=True, text=True, check=True)
    theirs = [document for document in yaml.safe_load_all(ran.stdout) if document]
    assert sorted(theirs, key=str) == sorted(objects(name), key=str)


def test_compose_mounts_what_is_there_and_its_server_takes_its_flags():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert flags.load(services["quartet"]["command"]).notes == []
    assert {name for name, service in services.items() if "profiles" not in service} == {"quartet"}
    for service in services.values():
        for volume in service["volumes"]:
            place = volume.split(":")[0]
            assert not place.startswith(".") or (DEPLOY / place).exists(), place
    drain_s = int(services["quartet"]["stop_grace_period"].removesuffix("s"))
    assert drain_s > ServerConfig().drain_timeout + DRAIN_GRACE_S
    [job] = yaml.safe_load((DEPLOY / "monitoring/prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"quartet:{ServerConfig().port}"]


def test_the_board_is_provisioned_with_its_data_source_and_panels_do_not_overlap():
    board = json.loads((DEPLOY / "monitoring/grafana/dashboards/quartet.json").read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places) >= 12
    assert len({panel["id"] for panel in board["panels"]}) == len(places)
    sources = yaml.safe_load((DEPLOY / "monitoring/grafana/provisioning/datasources/prometheus.yaml").read_text())
    variable = next(item for item in board["templating"]["list"] if item["name"] == "datasource")
    assert variable["current"]["value"] == sources["datasources"][0]["uid"]


def test_alerts_say_what_is_wrong_and_how_severe():
    [group] = yaml.safe_load((DEPLOY / "monitoring/alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"] and rule["expr"].count("(") == rule["expr"].count(")")
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"]) >= 8


def test_systemd_takes_the_unit(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = (DEPLOY / "systemd/quartet.service").read_text()
    unit = tmp_path / "quartet.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.MULTILINE))
    ran = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (ran.returncode, [line for line in ran.stderr.splitlines() if "quartet.service" in line]) == (0, [])
    stop_s = int(re.search(r"^TimeoutStopSec=(\d+)s$", text, re.MULTILINE)[1])
    assert stop_s > ServerConfig().drain_timeout + DRAIN_GRACE_S
