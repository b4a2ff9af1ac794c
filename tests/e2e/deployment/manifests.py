"""The manifests in deploy/, rendered as `kubectl apply -k` sends them, and what they say of containers."""

from __future__ import annotations

import dataclasses
import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..support import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
OVERLAYS = sorted(path.name for path in (DEPLOY / "overlays").iterdir())
Object = dict[str, Any]


@functools.cache
def render(directory: str | Path) -> tuple[Object, ...]:
    """The objects of a directory, if relative then below deploy/, such as `overlays/sidecar`."""
    kubectl = shutil.which("kubectl")
    assert kubectl is not None
    rendered = subprocess.run(
        [kubectl, "kustomize", str(DEPLOY / directory)], stdout=subprocess.PIPE, check=True, timeout=60
    )
    return tuple(yaml.safe_load_all(rendered.stdout))


@dataclass(frozen=True, slots=True)
class Container:
    """One container of a rendered pod, with what the pod and the ConfigMaps say of it."""

    spec: Object
    pod: Object
    environment: dict[str, str]

    def running(self, *command: str) -> Container:
        """The same container with another command."""
        return dataclasses.replace(self, spec={**self.spec, "command": [*command], "args": []})

    def with_(self, **variables: str) -> Container:
        """The same container with other values of variables that it has."""
        assert variables.keys() <= self.environment.keys()
        return dataclasses.replace(self, environment={**self.environment, **variables})

    @property
    def command(self) -> list[str]:
        return [*self.spec["command"], *self.spec.get("args", ())]

    @property
    def security(self) -> Object:
        """The container's security context where it says something, else the pod's."""
        return {**self.pod.get("securityContext", {}), **self.spec.get("securityContext", {})}

    @property
    def memory_limit_bytes(self) -> int:
        return quantity_bytes(self.spec["resources"]["limits"]["memory"])

    @property
    def mounts(self) -> list[tuple[Object, str, bool]]:
        """(volume, where, read-only) of each mount."""
        volumes = {volume["name"]: volume for volume in self.pod.get("volumes", ())}
        return [
            (volumes[mount["name"]], mount["mountPath"], mount.get("readOnly", False))
            for mount in self.spec.get("volumeMounts", ())
        ]

    def port(self, port: int | str) -> int:
        """The number of a port that a probe names."""
        if isinstance(port, int):
            return port
        return next(int(known["containerPort"]) for known in self.spec["ports"] if known["name"] == port)


def containers(directory: str) -> dict[str, Container]:
    """Every container of every pod template of a directory, by name."""
    objects = render(directory)
    settings = {
        rendered["metadata"]["name"]: rendered["data"]
        for rendered in objects
        if rendered["kind"] == "ConfigMap"
    }
    found: dict[str, Container] = {}
    for rendered in objects:
        pod = rendered.get("spec", {}).get("template", {}).get("spec")
        for spec in [*pod.get("initContainers", ()), *pod["containers"]] if pod else ():
            environment: dict[str, str] = {}
            for source in spec.get("envFrom", ()):
                environment |= settings[source["configMapRef"]["name"]]
            environment |= {entry["name"]: entry["value"] for entry in spec.get("env", ())}
            assert spec["name"] not in found
            found[spec["name"]] = Container(spec, pod, environment)
    return found


def quantity_bytes(text: str) -> int:
    """A memory quantity of Kubernetes in whole units."""
    match = re.fullmatch(r"(\d+)(Ki|Mi|Gi|Ti|k|M|G|T)?", text)
    assert match, text
    unit = match[2] or ""
    power = " kMGT".index(unit[:1].replace("K", "k") or " ")
    return int(match[1]) * int((1024 if unit.endswith("i") else 1000) ** power)
