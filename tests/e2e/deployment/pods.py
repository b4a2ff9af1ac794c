"""Pods without Kubernetes: a rendered container, started as kubelet and a runtime would start it.

A pod has network, IPC and UTS namespaces. Each container in it has mount and pid namespaces, a root file
system, a memory control group, a user, no capabilities but those named, and a system call filter. In place of
the image there is this machine's Python with the code of this repository. Not imitated: CPU shares, SELinux,
AppArmor, and the pod security levels, by which a cluster refuses pods.
"""

from __future__ import annotations

import ctypes
import http.client
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..containers import MemoryCgroup, Mount, child_of, root_file_system
from ..support import DEADLINE_SECONDS, REPOSITORY, wait_until
from .confine import compile_filter
from .manifests import Container, Object

POD_IP = "10.64.0.1"
IMAGE_PATH = "/opt/penstock/bin:/usr/local/bin:/usr/bin:/bin"
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


class Pod:
    """Namespaces that containers share; ends with its containers."""

    def __init__(self, top: Path, volumes: Mapping[str, Path]) -> None:
        """`volumes` are those that exist outside the pod, by path or name: host paths, claims, ConfigMaps."""
        self.top = top
        top.mkdir(mode=0o755)
        self._volumes = dict(volumes)
        self._containers: list[Running] = []
        address = f"ip link set lo up && ip address add {POD_IP}/32 dev lo && echo up && exec cat"
        command = ["unshare", "--net", "--ipc", "--uts", "sh", "-ec", address]
        self._holder = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env={"PATH": os.defpath + ":/sbin"},
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"up\n"

    def enter(self) -> list[str]:
        """A command prefix that runs in the pod's shared namespaces."""
        return ["nsenter", f"--target={self._holder.pid}", "--net", "--ipc", "--uts"]

    def volume(self, volume: Object, group: int) -> Path:
        """Where a volume of the pod lies on this machine."""
        if "hostPath" in volume:
            return self._volumes[volume["hostPath"]["path"]]
        if "persistentVolumeClaim" in volume:
            return self._volumes[volume["persistentVolumeClaim"]["claimName"]]
        if "configMap" in volume:
            return self._volumes[volume["configMap"]["name"]]
        assert "emptyDir" in volume, volume
        directory = self.top / f"volume-{volume['name']}"
        if not directory.exists():
            directory.mkdir()
            os.chown(directory, 0, group)
            directory.chmod(0o2777)
        return directory

    def start(self, container: Container, *, files: Sequence[Mount] = ()) -> Running:
        """Starts a container. `files` are mounted over what its image has."""
        running = Running(self, container, files)
        self._containers.append(running)
        return running

    def get(self, port: int, path: str, *, timeout_seconds: float) -> bytes | None:
        """What a GET to the pod's address finds; None unless it succeeds."""
        with ThreadPoolExecutor(1) as executor:  # a thread can be in another network than its process
            return executor.submit(self._get, port, path, timeout_seconds).result()

    def _get(self, port: int, path: str, timeout_seconds: float) -> bytes | None:
        with open(f"/proc/{self._holder.pid}/ns/net") as network:
            if _libc.setns(network.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        connection = http.client.HTTPConnection(POD_IP, port, timeout=timeout_seconds)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        except OSError:
            return None
        finally:
            connection.close()
        return body if 200 <= answer.status < 400 else None  # kubelet's rule

    def close(self) -> None:
        """SIGKILL for what still runs."""
        for running in self._containers:
            running.kill()
            running.cgroup.remove()
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        self._holder.stdin.close()
        self._holder.wait(DEADLINE_SECONDS)
        self._holder.stdout.close()


class Running:
    """A container that was started."""

    def __init__(self, pod: Pod, container: Container, files: Sequence[Mount]) -> None:
        self.container = container
        self._pod = pod
        name = f"{container.spec['name']}-{next(_numbers)}"
        self.cgroup = MemoryCgroup(f"penstock-{os.getpid()}-{name}", container.memory_limit_bytes)
        self._log = pod.top / f"{name}.log"
        top = pod.top / name
        top.mkdir()
        group = container.security.get("fsGroup", 0)
        mounts = [
            *_image(pod.top),
            *(
                Mount(pod.volume(volume, group), place, read_only)
                for volume, place, read_only in container.mounts
            ),
            *files,
            self.cgroup.mount,
        ]
        lines = [
            f"echo 0 > {self.cgroup.directory}/cgroup.procs",
            *root_file_system(top, mounts),
            *([f"mount -o remount,ro {top}"] if container.security["readOnlyRootFilesystem"] else ()),
            f'exec chroot {top} "$@"',
        ]
        command = [*pod.enter(), "unshare", "--mount", "--pid", "--fork", "--kill-child"]
        command += ["--propagation=private", "sh", "-c", "\n".join(lines), "sh", *_as_asked(container)]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd="/"
            )
        self.pid = child_of(self.process)

    def log(self) -> str:
        return self._log.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of its JSON log that tell of one kind of event."""
        lines = [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("event") == name]

    def probe(self, kind: str) -> bytes | None:
        """What the probe of the manifest, made as kubelet would make it, answers; None if it fails."""
        probe = self.container.spec[kind]
        port = self.container.port(probe["httpGet"]["port"])
        timeout_seconds = probe.get("timeoutSeconds", 1)
        return self._pod.get(port, probe["httpGet"]["path"], timeout_seconds=timeout_seconds)

    def wait_for(self, kind: str) -> bytes:
        """Probes until it succeeds."""

        def succeeds() -> bytes | None:
            assert self.process.poll() is None, f"the container ended:\n{self.log()}"
            return self.probe(kind)

        answer: bytes = wait_until(succeeds, f"the {kind} of {self.container.spec['name']}")
        return answer

    def status(self, field: str) -> str:
        """A field of /proc/PID/status of its first process."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{field}:"))

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """What `kubectl exec` does."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--ipc", "--root", "--wd"]
        return subprocess.run(
            [*enter, *_as_asked(self.container.running(*command))],
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_SECONDS,
        )

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> int:
        """SIGTERM; its exit code, which has to come within the pod's grace period."""
        self.signal(signal.SIGTERM)
        return self.process.wait(self.container.pod.get("terminationGracePeriodSeconds", 30))

    def kill(self) -> None:
        """SIGKILL; returns when everything in it is gone."""
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)  # to the first process of its pid namespace: the kernel ends the rest
        self.process.wait(DEADLINE_SECONDS)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


def _image(top: Path) -> list[Mount]:
    """Stands for both images: the commands at their places, and what these need."""
    programs = top / "image"
    if not programs.exists():
        programs.mkdir()
        compile_filter(top / "seccomp")
        search = ":".join(str(REPOSITORY / part) for part in ("proto", "client", "server"))
        for name, arguments in (
            ("penstockd", "-m penstock.server"),
            ("penstock", "-c 'import sys; from penstock.client.cli.commands import main; sys.exit(main())'"),
            ("python", ""),
        ):
            script = programs / name
            script.write_text(f'#!/bin/sh\nPYTHONPATH={search} exec {sys.executable} {arguments} "$@"\n')
            script.chmod(0o755)
    code = [REPOSITORY / part for part in ("proto", "client", "server")]
    return [
        *(Mount(path, str(path), read_only=True) for path in code),
        Mount(programs, "/opt/penstock/bin", read_only=True),
        Mount(REPOSITORY / "deploy/examples", "/opt/penstock/examples", read_only=True),
        Mount(Path(__file__).with_name("confine.py"), "/confine.py", read_only=True),
        Mount(top / "seccomp", "/seccomp", read_only=True),
    ]


def _as_asked(container: Container) -> list[str]:
    """The command of a container with the user, the capabilities and the filter that it asks for."""
    security = container.security
    kept = {name.lower() for name in security.get("capabilities", {}).get("add", ())}
    kept_list = ",".join(["-all", *(f"+{name}" for name in sorted(kept))])
    groups = str(security["fsGroup"]) if "fsGroup" in security else ""
    become = [
        "setpriv",
        f"--reuid={security['runAsUser']}",
        f"--regid={security['runAsGroup']}",
        *([f"--groups={groups}"] if groups else ["--clear-groups"]),
    ]
    if not security.get("privileged"):
        become += [f"--bounding-set={kept_list}", f"--inh-caps={kept_list}"]
        become += [] if security["allowPrivilegeEscalation"] else ["--no-new-privs"]
    confine = [] if security.get("privileged") else [sys.executable, "/confine.py", "/seccomp"]
    environment = {"PATH": IMAGE_PATH, **container.environment}
    variables = [f"{name}={value}" for name, value in environment.items()]
    return ["/usr/bin/env", "-i", *variables, *become, *confine, *container.command]
