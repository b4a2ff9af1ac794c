"""The manifests build, are valid, and agree with the code and with each other."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from penstock.server.checkpoint.headers import child
from penstock.server.checkpoint.headers.parsers import CHILDREN
from penstock.server.checkpoint.headers.rules import MAX_HEADER_BYTES
from penstock.server.config.settings import load_config
from penstock.server.loads.warm.features import DISK_PREFIX, WARM_PREFIX
from penstock.server.loads.warm.wishes import parse
from penstock.server.sources.stores import FLAGS, kind_of
from penstock.server.system.limits import OVERHEAD_BYTES, MemoryBound

from .manifests import DEPLOY, OVERLAYS, Container, containers, render

DAEMONS = [name for name in OVERLAYS if not name.startswith("daemonset-client")]
RESTRICTED_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
"""What Kubernetes' pod security level `restricted` allows."""


@pytest.fixture(autouse=True)
def kubectl(require_tool: Callable[[str], str]) -> None:
    require_tool("kubectl")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_one_that_the_newest_known_kubernetes_takes(overlay: str) -> None:
    objects = render(f"overlays/{overlay}")
    assert objects
    for rendered in objects:
        kubernetes_validate.validate(rendered, kubernetes_validate.latest_version(), strict=True)


def test_the_validation_refuses_a_field_that_does_not_exist() -> None:
    wrong = next(one for one in render("overlays/daemonset") if one["kind"] == "DaemonSet")
    wrong = {**wrong, "spec": {**wrong["spec"], "updateStratgy": {}}}
    with pytest.raises(kubernetes_validate.ValidationError, match="updateStratgy"):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("overlay", DAEMONS)
def test_the_daemon_takes_its_command_and_settings_in_the_memory_it_gets(overlay: str) -> None:
    daemon = containers(f"overlays/{overlay}")["penstock"]
    assert daemon.command[0] == "penstockd"
    bound = MemoryBound(daemon.memory_limit_bytes, "the container's limit")
    config = load_config(daemon.command[1:], daemon.environment, lambda: bound, FLAGS)
    # Others may name what others wrote; one child is for privileged users alone.
    headers_bytes = (CHILDREN - 1) * child.limits(MAX_HEADER_BYTES)[0] if config.allow else 0
    page_tables_bytes = config.memory_limit // 256
    least_bytes = config.memory_limit + page_tables_bytes + OVERHEAD_BYTES + headers_bytes
    assert daemon.memory_limit_bytes >= least_bytes
    assert daemon.spec["resources"]["requests"]["memory"] == daemon.spec["resources"]["limits"]["memory"]
    assert config.grace_seconds < daemon.pod["terminationGracePeriodSeconds"]
    assert str(config.socket_dir) in {place for _, place, _ in daemon.mounts}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted_but_for_what_is_known(overlay: str) -> None:
    steps_as_root = {"socket-directory", "huge-pages", "node-features-directory", "tier-directory"}
    for name, container in containers(f"overlays/{overlay}").items():
        kinds = {kind for volume, _, _ in container.mounts for kind in volume if kind != "name"}
        assert kinds <= RESTRICTED_VOLUMES | ({"hostPath"} if overlay.startswith("daemonset") else set())
        security = container.security
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert security["readOnlyRootFilesystem"], name
        if name in steps_as_root:
            continue
        assert security["runAsNonRoot"], name
        assert security["runAsUser"] > 0, name
        assert security["allowPrivilegeEscalation"] is False, name
        assert security["capabilities"] == {"drop": ["ALL"]}, name
        assert not security.get("privileged"), name


CLOUDS = {
    "sidecar-s3": "eks.amazonaws.com/role-arn",
    "sidecar-gcs": "iam.gke.io/gcp-service-account",
    "sidecar-azure": "azure.workload.identity/client-id",
}
"""What names the identity of the service account."""


@pytest.mark.parametrize(("overlay", "annotation"), CLOUDS.items())
def test_a_cloud_s_daemon_has_an_identity_for_a_model_that_its_store_reads(
    overlay: str, annotation: str
) -> None:
    objects = render(f"overlays/{overlay}")
    (account,) = (one for one in objects if one["kind"] == "ServiceAccount")
    assert account["metadata"]["annotations"][annotation]
    (deployment,) = (one for one in objects if one["kind"] == "Deployment")
    assert deployment["spec"]["template"]["spec"]["serviceAccountName"] == account["metadata"]["name"]
    inference = containers(f"overlays/{overlay}")["inference"]
    assert kind_of(inference.environment["MODEL"]) == overlay.removeprefix("sidecar-")
    for container in containers(f"overlays/{overlay}").values():
        assert not any(place == "/models" for _, place, _ in container.mounts)


def test_where_a_webhook_gives_credentials_the_engine_gets_none() -> None:
    for overlay, prefix in (
        ("sidecar-s3", "eks.amazonaws.com"),
        ("sidecar-azure", "azure.workload.identity"),
    ):
        (deployment,) = (one for one in render(f"overlays/{overlay}") if one["kind"] == "Deployment")
        metadata = deployment["spec"]["template"]["metadata"]
        assert metadata["annotations"][f"{prefix}/skip-containers"] == "inference"
        if prefix == "azure.workload.identity":
            assert metadata["labels"][f"{prefix}/use"] == "true"


def test_only_the_optional_step_is_privileged() -> None:
    privileged = {
        (overlay, name)
        for overlay in OVERLAYS
        for name, container in containers(f"overlays/{overlay}").items()
        if container.security.get("privileged")
    }
    assert privileged == {("daemonset-huge-pages", "huge-pages")}


def test_the_daemon_is_the_same_in_both_kinds_of_pod() -> None:
    def common(daemon: Container) -> dict[str, Any]:
        differing = ("args", "env", "resources", "restartPolicy")
        return {key: value for key, value in daemon.spec.items() if key not in differing}

    sidecar, node = (containers(f"overlays/{name}")["penstock"] for name in ("sidecar", "daemonset"))
    assert common(sidecar) == common(node)
    assert sidecar.spec["restartPolicy"] == "Always"


def test_a_node_s_daemon_has_a_user_of_its_own_and_its_clients_another() -> None:
    node = containers("overlays/daemonset")
    daemon, client = node["penstock"], containers("overlays/daemonset-client")["inference"]
    assert daemon.security["runAsUser"] not in (0, client.security["runAsUser"])
    owner = f"{daemon.security['runAsUser']}:{daemon.security['runAsGroup']}"
    assert owner in node["socket-directory"].command


def test_clients_see_the_sockets_read_only_in_the_same_volume() -> None:
    for daemons, clients in (("sidecar", "sidecar"), ("daemonset", "daemonset-client")):
        daemon = containers(f"overlays/{daemons}")["penstock"]
        client = containers(f"overlays/{clients}")["inference"]
        (mine,) = [volume for volume, place, _ in daemon.mounts if place == "/run/penstock"]
        ((theirs, read_only),) = [
            (volume, read_only) for volume, place, read_only in client.mounts if place == "/run/penstock"
        ]
        assert read_only
        assert mine.get("emptyDir") == theirs.get("emptyDir")
        assert mine.get("hostPath", {}).get("path") == theirs.get("hostPath", {}).get("path")


def test_the_warm_set_of_a_config_map_is_valid_mounted_whole_and_reconciled_without_a_restart() -> None:
    objects = render("overlays/daemonset-warm")
    (volume,) = (one for one in objects if one["kind"] == "ConfigMap" and "warm-set.yaml" in one["data"])
    assert volume["metadata"]["name"] == "penstock-warm-set"
    wishes = parse(volume["data"]["warm-set.yaml"].encode(), [flags.locators for flags in FLAGS])
    daemon = containers("overlays/daemonset-warm")["penstock"]
    mounts = {place: (mounted, read_only) for mounted, place, read_only in daemon.mounts}
    file, features = (
        Path(daemon.environment["PENSTOCK_WARM_SET"]),
        daemon.environment["PENSTOCK_NODE_FEATURES"],
    )
    mounted, read_only = mounts[str(file.parent)]
    assert (mounted["configMap"], read_only) == ({"name": "penstock-warm-set"}, True)
    assert file.name in volume["data"]
    assert not any("subPath" in mount for mount in daemon.spec["volumeMounts"])
    directory, read_only = mounts[str(Path(features).parent)]
    assert directory["hostPath"]["path"] == "/etc/kubernetes/node-feature-discovery/features.d"
    assert not read_only
    (client,) = (one for one in render("overlays/daemonset-client-warm") if one["kind"] == "Deployment")
    preferred = client["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    terms = preferred["preferredDuringSchedulingIgnoredDuringExecution"]
    weights = {term["preference"]["matchExpressions"][0]["key"]: term["weight"] for term in terms}
    (wish,) = wishes
    assert list(weights) == [f"{WARM_PREFIX}{wish.name}", f"{DISK_PREFIX}{wish.name}"]
    assert weights[f"{WARM_PREFIX}{wish.name}"] > weights[f"{DISK_PREFIX}{wish.name}"]
    model = containers("overlays/daemonset-client-warm")["inference"].environment["MODEL"]
    assert wish.sources == (model,)


def test_the_warm_daemon_s_tier_is_a_volume_of_the_node_that_its_user_owns() -> None:
    found = containers("overlays/daemonset-warm")
    daemon, step = found["penstock"], found["tier-directory"]
    bound = MemoryBound(daemon.memory_limit_bytes, "the container's limit")
    config = load_config(daemon.command[1:], daemon.environment, lambda: bound, FLAGS)
    assert config.tier_dir is not None
    assert config.tier_limit_bytes > 0
    mounts = {place: (volume, read_only) for volume, place, read_only in daemon.mounts}
    # The parent is mounted, so that the daemon makes the directory itself, with the mode that it needs.
    volume, read_only = mounts[str(config.tier_dir.parent)]
    assert not read_only
    assert volume["hostPath"]["type"] == "DirectoryOrCreate"
    ((stepped, place, read_only),) = step.mounts
    assert (stepped, place, read_only) == (volume, str(config.tier_dir.parent), False)
    owner = f"{daemon.security['runAsUser']}:{daemon.security['runAsGroup']}"
    assert step.command == ["chown", owner, place]


def test_images_have_the_version_of_the_package() -> None:
    (version,) = re.findall(
        r'^version = "(.+)"$', (DEPLOY.parent / "pyproject.toml").read_text(), re.MULTILINE
    )
    for overlay in OVERLAYS:
        for container in containers(f"overlays/{overlay}").values():
            assert container.spec["image"] in (f"penstock:{version}", f"penstock-client:{version}")


@pytest.mark.parametrize("overlay", DAEMONS)
def test_the_monitoring_component_scrapes_the_daemons_of_every_overlay(overlay: str, tmp_path: Path) -> None:
    paths = {name: os.path.relpath(DEPLOY / name, tmp_path) for name in (f"overlays/{overlay}", "monitoring")}
    both = {"resources": [paths[f"overlays/{overlay}"]], "components": [paths["monitoring"]]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(both))
    objects = render(tmp_path)
    (monitor,) = (one["spec"] for one in objects if one["kind"] == "PodMonitor")
    selected = monitor["selector"]["matchLabels"].items()
    pods = [one["spec"]["template"] for one in objects if one["kind"] in ("Deployment", "DaemonSet")]
    assert pods
    assert all(selected <= pod["metadata"]["labels"].items() for pod in pods)
    daemon = containers(f"overlays/{overlay}")["penstock"]
    for endpoint in monitor["podMetricsEndpoints"]:
        assert daemon.port(endpoint["port"]) == 9464
