"""The example of vLLM with a sidecar is valid, and agrees with the loader and the daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml

from penstock.server.config import load_config
from penstock.server.limits import OVERHEAD_BYTES, MemoryBound

MIB = 1 << 20
DEPLOY = Path(__file__).parents[2] / "deploy"
MANIFEST = DEPLOY / "examples" / "vllm-sidecar.yaml"


def pod(manifest: Path = MANIFEST) -> dict[str, Any]:
    deployment = yaml.safe_load(manifest.read_text())
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def test_kubernetes_takes_it() -> None:
    deployment = yaml.safe_load(MANIFEST.read_text())
    kubernetes_validate.validate(deployment, kubernetes_validate.latest_version(), strict=True)


def test_the_daemon_takes_its_settings_in_the_memory_it_gets() -> None:
    (daemon,) = pod()["initContainers"]
    memory = daemon["resources"]["limits"]["memory"]
    assert memory.endswith("Mi")
    bound = MemoryBound(int(memory[:-2]) * MIB, "the container's limit")
    environment = {variable["name"]: variable["value"] for variable in daemon["env"]}
    config = load_config(daemon["command"][1:], environment, lambda: bound)
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


def test_its_daemon_is_probed_like_the_overlay_s() -> None:
    def probes(daemon: dict[str, Any], port: int | str) -> dict[str, Any]:
        defaults = {"periodSeconds": 10, "timeoutSeconds": 1, "failureThreshold": 3}
        found = {key: defaults | value for key, value in daemon.items() if key.endswith("Probe")}
        assert {probe["httpGet"].pop("port") for probe in found.values()} == {port}
        return found

    (daemon,) = pod()["initContainers"]
    (other,) = pod(DEPLOY / "overlays/sidecar/deployment.yaml")["initContainers"]
    address = next(each["value"] for each in daemon["env"] if each["name"] == "PENSTOCK_HTTP_ADDRESS")
    ours = probes(daemon, int(address.rpartition(":")[2]))
    assert ours == probes(other, "penstock-http")
    assert set(ours) == {"startupProbe", "readinessProbe", "livenessProbe"}
