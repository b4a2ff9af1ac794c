"""The example of vLLM with a sidecar is valid, and agrees with the loader and the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from penstock.server.config.settings import load_config
from penstock.server.sources.stores import FLAGS
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


def test_both_containers_see_the_sockets_and_the_model_under_one_path() -> None:
    (daemon,), (engine,) = pod()["initContainers"], pod()["containers"]
    assert engine["args"][engine["args"].index("--load-format") + 1] == "penstock"
    mounts = [
        {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        for container in (daemon, engine)
    ]
    for name in ("sockets", "models"):
        assert mounts[0][name] == mounts[1][name]
    assert engine["args"][engine["args"].index("--model") + 1].startswith(mounts[1]["models"] + "/")


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
