"""The example of vLLM with a sidecar is valid, and agrees with the loader and the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from penstock.server.config.settings import load_config
from penstock.server.sources.stores import FLAGS, kind_of
from penstock.server.system.limits import OVERHEAD_BYTES, MemoryBound

MIB = 1 << 20
DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFEST = DEPLOY / "examples" / "vllm-sidecar.yaml"
OVERLAY = DEPLOY / "overlays" / "sidecar"


def one(kind: str, manifest: Path = MANIFEST) -> dict[str, Any]:
    """The only object of its kind in a file."""
    (found,) = (each for each in yaml.safe_load_all(manifest.read_text()) if each["kind"] == kind)
    return dict(found)


def pod(manifest: Path = MANIFEST) -> dict[str, Any]:
    spec: dict[str, Any] = one("Deployment", manifest)["spec"]["template"]["spec"]
    return spec


def test_kubernetes_takes_it() -> None:
    for found in yaml.safe_load_all(MANIFEST.read_text()):
        kubernetes_validate.validate(found, kubernetes_validate.latest_version(), strict=True)


def test_the_daemon_takes_its_settings_in_the_memory_it_gets() -> None:
    (daemon,) = pod()["initContainers"]
    memory = daemon["resources"]["limits"]["memory"]
    assert memory.endswith("Mi")
    bound = MemoryBound(int(memory[:-2]) * MIB, "the container's limit")
    environment = {variable["name"]: variable["value"] for variable in daemon["env"]}
    config = load_config(daemon["command"][1:], environment, lambda: bound, FLAGS)
    limit_bytes = config.memory_limit
    assert limit_bytes == 16 << 30
    assert int(memory[:-2]) * MIB >= limit_bytes + limit_bytes // 256 + OVERHEAD_BYTES
    assert daemon["restartPolicy"] == "Always"


def mounts(container: dict[str, Any]) -> dict[str, str]:
    return {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}


def test_the_engine_loads_a_uri_through_the_socket_that_both_containers_see() -> None:
    (daemon,), (engine,) = pod()["initContainers"], pod()["containers"]
    assert engine["args"][engine["args"].index("--load-format") + 1] == "penstock"
    assert kind_of(engine["args"][engine["args"].index("--model") + 1]) == "s3"
    assert mounts(daemon)["sockets"] == mounts(engine)["sockets"]
    assert mounts(engine)["tmp"] == next(each["value"] for each in engine["env"] if each["name"] == "HOME")


def test_only_the_daemon_s_container_has_a_token() -> None:
    (daemon,), (engine,) = pod()["initContainers"], pod()["containers"]
    tokens = [volume["name"] for volume in pod()["volumes"] if "serviceAccountToken" in str(volume)]
    assert tokens == ["token"]
    environment = {variable["name"]: variable["value"] for variable in daemon["env"]}
    token = next(volume for volume in pod()["volumes"] if volume["name"] == "token")
    (source,) = token["projected"]["sources"]
    place = Path(mounts(daemon)["token"], source["serviceAccountToken"]["path"])
    assert environment["AWS_WEB_IDENTITY_TOKEN_FILE"] == str(place)
    assert set(mounts(engine)) == {"sockets", "shm", "tmp"}
    assert not [variable for variable in engine["env"] if variable["name"].startswith("AWS_")]
    # Nothing else puts one into the engine's.
    assert pod()["automountServiceAccountToken"] is False
    account = one("ServiceAccount")
    assert account["metadata"]["name"] == pod()["serviceAccountName"]
    assert account["automountServiceAccountToken"] is False
    assert "annotations" not in account["metadata"]


def test_its_daemon_is_probed_and_scraped_like_the_overlay_s() -> None:
    def probes(daemon: dict[str, Any]) -> dict[str, Any]:
        defaults = {"periodSeconds": 10, "timeoutSeconds": 1, "failureThreshold": 3}
        return {key: defaults | value for key, value in daemon.items() if key.endswith("Probe")}

    (daemon,) = pod()["initContainers"]
    (other,) = pod(OVERLAY / "deployment.yaml")["initContainers"]
    assert probes(daemon) == probes(other)
    assert set(probes(daemon)) == {"startupProbe", "readinessProbe", "livenessProbe"}
    assert daemon["ports"] == other["ports"]
    address = next(each["value"] for each in daemon["env"] if each["name"] == "PENSTOCK_HTTP_ADDRESS")
    assert [port["containerPort"] for port in daemon["ports"]] == [int(address.rpartition(":")[2])]
    monitor = one("PodMonitor", DEPLOY / "monitoring" / "pod-monitor.yaml")["spec"]
    labels = one("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert monitor["selector"]["matchLabels"].items() <= labels.items()


def test_its_port_is_kept_from_others_like_the_overlay_s() -> None:
    ours, other = one("NetworkPolicy")["spec"], one("NetworkPolicy", OVERLAY / "network-policy.yaml")["spec"]
    assert ours.pop("podSelector") == one("Deployment")["spec"]["selector"]
    other.pop("podSelector")
    assert ours == other


def test_no_service_puts_variables_into_it() -> None:
    """vLLM ends when a Service named vllm sets VLLM_PORT, and the daemon warns of PENSTOCK_PORT."""
    assert pod()["enableServiceLinks"] is False
