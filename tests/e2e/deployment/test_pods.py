"""The rendered manifests at work: their commands, users, limits, probes and volumes, in containers."""

from __future__ import annotations

import json
import shutil
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ..containers import Mount
from ..support import DEADLINE_SECONDS, HERE, expected, random_tensors, wait_until, write_checkpoint
from .manifests import Container, containers, render
from .pods import Pod, Running

MIB = 1 << 20
TENSORS = random_tensors(12, MIB)
STREAM = "load('/run/penstock', '/models/model', pause_after=2, memory_limit='16MiB')"
"""A load in mid-course: it goes through a window, which holds but a part of the checkpoint."""
StartPod = Callable[[str], Pod]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies on the claim, or on the node: two shards of a checkpoint named `model`."""
    top = tmp_path_factory.mktemp("models")
    top.chmod(0o755)  # pytest makes it for its user alone
    (top / "model").mkdir()
    names = sorted(TENSORS)
    for shard, part in enumerate((names[:6], names[6:])):
        path = write_checkpoint(top / f"model/{shard}.safetensors", {name: TENSORS[name] for name in part})
        path.chmod(0o644)
    return top


@pytest.fixture
def node(
    models: Path, unshare: tuple[str, ...], require_tool: Callable[[str], str]
) -> Iterator[dict[str, Path]]:
    """The host paths and claims of a node, in a short place: sockets lie there."""
    for tool in ("kubectl", "nsenter", "setpriv", "ip"):
        require_tool(tool)
    top = Path(tempfile.mkdtemp(prefix="pst-"))
    sockets = top / "run"
    sockets.mkdir(mode=0o755)  # as kubelet does for DirectoryOrCreate
    yield {"top": top, "/run/penstock": sockets, "/mnt/models": models, "models": models}
    shutil.rmtree(top)


@pytest.fixture
def start_pod(node: dict[str, Path]) -> Iterator[StartPod]:
    pods: list[Pod] = []

    def start(name: str) -> Pod:
        pods.append(Pod(node["top"] / name, node))
        return pods[-1]

    yield start
    for pod in pods:
        pod.close()


def start_daemon(pod: Pod, overlay: str, *, buffer: str | None = "512MiB") -> Running:
    """Its init containers, then the daemon, until the startup probe lets the next container begin. The buffer
    of each overlay fits into its container (`test_manifests.py`); one is made as large as the manifest says
    (None), the others smaller, as gigabytes take seconds."""
    found = containers(f"overlays/{overlay}")
    for name in ("socket-directory", "node-features-directory", "tier-directory"):
        if name in found:
            step = pod.start(found[name])
            assert step.process.wait(60) == 0, step.log()
    container = found["penstock"]
    daemon = pod.start(container if buffer is None else container.with_(PENSTOCK_MEMORY_LIMIT=buffer))
    daemon.wait_for("startupProbe")
    return daemon


def start_program(pod: Pod, container: Container, code: str) -> Running:
    """In the client's container, one of `programs.py` instead of the command."""
    code = f"import sys; sys.path.insert(0, '/code'); import programs; programs.{code}"
    programs = Mount(HERE / "programs.py", "/code/programs.py", read_only=True)
    return pod.start(container.running("python", "-c", code), files=[programs])


def hear(running: Running, word: str) -> dict[str, Any]:
    assert running.process.stdout is not None
    line = running.process.stdout.readline()
    assert line, running.log()
    said: dict[str, Any] = json.loads(line)
    assert said["word"] == word, said
    return said


def go(running: Running) -> None:
    assert running.process.stdin is not None
    running.process.stdin.write(b"go\n")
    running.process.stdin.flush()


def sums(tensors: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(tensor.double().sum()) for name, tensor in tensors.items()}


def served_sums(pod: Pod, inference: Running) -> dict[str, float]:
    """The sums of what the inference container has, asked for once its probe lets users in."""
    probed = json.loads(inference.wait_for("readinessProbe"))
    assert probed["tensors"] == len(TENSORS)
    assert "sums" not in probed  # every byte of a large model takes longer than a probe may
    body = pod.get(inference.container.port("http"), "/", timeout_seconds=DEADLINE_SECONDS)
    assert body is not None
    found: dict[str, float] = json.loads(body)["sums"]
    return found


def assert_confined(running: Running) -> None:
    """The kernel's word for what the manifest asks."""
    security = running.container.security
    assert running.status("Uid").split() == [str(security["runAsUser"])] * 4
    assert running.status("Gid").split() == [str(security["runAsGroup"])] * 4
    assert running.status("NoNewPrivs") == "1"
    assert running.status("Seccomp") == "2"
    for capabilities in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"):
        assert int(running.status(capabilities), 16) == 0
    for place in ("/", "/tmp", "/opt/penstock/bin"):
        writable = running.run("sh", "-c", f"echo > {place}/new")
        assert (writable.returncode == 0) is (place in {mount for _, mount, _ in running.container.mounts})


def test_a_sidecar_serves_the_inference_container_of_its_pod(start_pod: StartPod) -> None:
    pod = start_pod("a")
    daemon = start_daemon(pod, "sidecar", buffer=None)
    assert_confined(daemon)
    assert daemon.probe("readinessProbe") is not None
    assert daemon.probe("livenessProbe") is not None
    wait_until(lambda: daemon.events("populated"), "the staging buffer to be populated")
    limit_bytes = 2 << 30
    assert limit_bytes <= daemon.cgroup.figure("usage") < daemon.container.memory_limit_bytes

    inference = pod.start(containers("overlays/sidecar")["inference"])
    assert served_sums(pod, inference) == sums(TENSORS)
    assert_confined(inference)
    assert inference.run("penstock", "status").returncode == 0
    assert daemon.run("penstock", "health").returncode == 0
    assert inference.run("rm", "/run/penstock/penstock.sock").returncode != 0

    assert inference.terminate() == 0  # first: sidecars outlive the other containers
    assert daemon.terminate() == 0
    assert "Traceback" not in daemon.log()


def test_a_sidecar_for_s3_starts_without_network_and_without_a_models_volume(start_pod: StartPod) -> None:
    daemon = start_daemon(start_pod("a"), "sidecar-s3")
    assert {place for _, place, _ in daemon.container.mounts} == {"/run/penstock"}
    assert daemon.probe("readinessProbe") is not None
    assert daemon.terminate() == 0


def test_a_node_s_daemon_serves_other_users_in_other_pods_what_is_allowed(
    start_pod: StartPod, node: dict[str, Path]
) -> None:
    daemon = start_daemon(start_pod("daemon"), "daemonset")
    assert_confined(daemon)
    sockets = node["/run/penstock"].stat()
    assert (sockets.st_uid, stat.S_IMODE(sockets.st_mode)) == (39464, 0o755)
    client = containers("overlays/daemonset-client")["inference"]
    pod = start_pod("client")
    inference = pod.start(client)
    assert served_sums(pod, inference) == sums(TENSORS)
    refused = start_program(pod, client, "load('/run/penstock', '/etc')")
    assert hear(refused, "failed")["error"] == "AccessDeniedError"
    assert inference.terminate() == 0
    assert daemon.terminate() == 0


def test_an_abrupt_kill_leaves_tensors_readable_and_other_pods_reconnect(start_pod: StartPod) -> None:
    daemon = start_daemon(start_pod("daemon"), "daemonset")
    client = containers("overlays/daemonset-client")["inference"]
    pod = start_pod("client")
    holder = pod.start(client)
    holder.wait_for("readinessProbe")
    loading = start_program(pod, client, STREAM)
    hear(loading, "paused")
    wait_until(lambda: daemon.events("populated"), "the daemon to have memory that can be freed")
    daemon.kill()
    assert served_sums(pod, holder) == sums(TENSORS)

    again = start_daemon(start_pod("daemon-again"), "daemonset")
    go(loading)
    assert sorted(hear(loading, "loaded")["found"]) == sorted(expected(TENSORS))
    assert served_sums(pod, holder) == sums(TENSORS)
    late_pod = start_pod("late")  # the holder has its own pod's port
    late = late_pod.start(client)
    assert served_sums(late_pod, late) == sums(TENSORS)
    for running in (holder, late, loading):
        running.kill()
    wait_until(lambda: daemon.cgroup.figure("usage") < 256 * MIB, "the killed daemon's memory to be free")
    assert again.terminate() == 0


def test_a_pod_s_end_lets_a_load_under_way_finish(start_pod: StartPod) -> None:
    daemon = start_daemon(start_pod("daemon"), "daemonset")
    client = containers("overlays/daemonset-client")["inference"]
    loading = start_program(
        start_pod("client"),
        client,
        "load('/run/penstock', '/models/model', pause_after=2, memory_limit='16MiB')",
    )
    hear(loading, "paused")
    daemon.signal(signal.SIGTERM)
    wait_until(lambda: daemon.events("draining"), "the daemon to drain")
    assert daemon.probe("readinessProbe") is None
    assert daemon.probe("livenessProbe") is not None
    go(loading)
    assert sorted(hear(loading, "loaded")["found"]) == sorted(expected(TENSORS))
    assert daemon.process.wait(daemon.container.pod["terminationGracePeriodSeconds"]) == 0
    assert not daemon.events("loads cut off")


def test_a_warm_daemon_keeps_its_set_on_the_node_s_disk_and_the_next_one_reads_it_there(
    start_pod: StartPod, node: dict[str, Path]
) -> None:
    settings, features, disk = (node["top"] / name for name in ("warm-set", "features.d", "disk"))
    for directory in (settings, features, disk):
        directory.mkdir(mode=0o755)
    rendered = next(
        one for one in render("overlays/daemonset-warm") if "warm-set.yaml" in one.get("data", {})
    )
    (settings / "warm-set.yaml").write_text(rendered["data"]["warm-set.yaml"])
    node |= {
        "penstock-warm-set": settings,
        "/etc/kubernetes/node-feature-discovery/features.d": features,
        "/var/lib/penstock": disk,
    }
    wait_until(
        lambda: all(time.time() - file.stat().st_ctime > 6 for file in (node["models"] / "model").iterdir()),
        "the models to be old enough to be kept",
    )
    first = start_daemon(start_pod("first"), "daemonset-warm")
    wait_until(lambda: "warm-model=true" in _read(features / "penstock"), "the label")
    size_bytes = 12 * MIB
    wait_until(lambda: _tier(first)["written_bytes"] >= size_bytes, "the checkpoint on the disk")
    assert stat.S_IMODE((disk / "tier").stat().st_mode) == 0o700
    assert first.terminate() == 0
    second = start_daemon(start_pod("second"), "daemonset-warm")
    wait_until(lambda: "warm-model=true" in _read(features / "penstock"), "the label again")
    assert _tier(second)["read_bytes"] >= size_bytes
    assert second.terminate() == 0


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _tier(daemon: Running) -> dict[str, Any]:
    done = daemon.run("penstock", "status", "--json")
    assert done.returncode == 0, done.stderr
    tier: dict[str, Any] = json.loads(done.stdout)["tier"]
    return tier


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("always within_size advise [never] deny force", "advise"),
        ("[always] within_size advise never deny force", "[always] within_size advise never deny force"),
    ],
)
def test_the_optional_step_sets_huge_pages_only_where_nobody_chose(
    before: str, after: str, start_pod: StartPod, node: dict[str, Path]
) -> None:
    setting = node["top"] / "shmem_enabled"
    setting.write_text(f"{before}\n")
    step = containers("overlays/daemonset-huge-pages")["huge-pages"]
    place = "/sys/kernel/mm/transparent_hugepage/shmem_enabled"
    running = start_pod("daemon").start(step, files=[Mount(setting, place)])
    assert running.process.wait(60) == 0, running.log()
    assert setting.read_text() == f"{after}\n"
    assert running.process.stdout is not None
    assert running.process.stdout.read() == f"{after}\n".encode()
