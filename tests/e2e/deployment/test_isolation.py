"""Daemon and clients that share a machine and little else: namespaces, root file systems, users."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ..conftest import StartDaemon
from ..containers import child_of, container
from ..support import (
    HERE,
    REPOSITORY,
    DaemonProcess,
    Nursery,
    expected,
    random_tensors,
    running_daemon,
    same,
    write_checkpoint,
)

MIB = 1 << 20
NOBODY, SOMEBODY = 65534, 54321
Checkpoint = tuple[Path, dict[str, torch.Tensor]]


@pytest.mark.parametrize("limit", ["16MiB", "64MiB"])
def test_containers_that_share_two_directories_and_nothing_else(
    limit: str, unshare: tuple[str, ...], socket_dir: Path, tmp_path: Path
) -> None:
    tensors = random_tensors(10, MIB)
    models = tmp_path / "models"
    models.mkdir()
    write_checkpoint(models / "m.safetensors", tensors)
    socket_dir.mkdir()
    proto, programs = REPOSITORY / "proto", HERE / "programs.py"
    in_daemon = container(
        unshare,
        tmp_path / "daemon",
        {socket_dir: "/run/penstock", models: "/models"},
        [proto, REPOSITORY / "server"],
    )
    daemon = DaemonProcess(
        Path("/run/penstock"),
        "--memory-limit",
        limit,
        wrapper=tuple(in_daemon),
        log_path=tmp_path / "daemon.log",
    )
    try:
        daemon.wait_ready()
        in_client = container(
            unshare,
            tmp_path / "client",
            {socket_dir: "/sockets", models: "/models", programs: "/code/programs.py"},
            [proto, REPOSITORY / "client"],
        )
        mounted = [Path(sys.prefix), Path(sys.base_prefix), REPOSITORY]  # at their own places
        arguments = {
            "socket_dir": "/sockets",
            "source": "/models/m.safetensors",
            "absent": [
                str(socket_dir),
                str(models),
                str(REPOSITORY / "server"),
                "/run/penstock",
                "/etc",
                *({"/home"} - {f"/{place.parts[1]}" for place in mounted}),
            ],
        }
        code = "import sys; sys.path.insert(0, '/code'); import json, programs; "
        code += "programs.look_around(**json.loads(sys.argv[1]))"
        client = subprocess.run(
            [*in_client, sys.executable, "-c", code, json.dumps(arguments)],
            stdout=subprocess.PIPE,
            check=True,
            timeout=60,
        )
        sees, loaded = [json.loads(line) for line in client.stdout.splitlines()]
        assert loaded["found"] == expected(tensors)
        assert sees["pid"] == 1
        assert (sees["shm_bytes"], sees["shm_names"]) == (65536, [])
        assert sees["tmp_names"] == sorted({place.parts[2] for place in mounted if place.parts[1] == "tmp"})
        assert sees["interfaces"] == ["lo"]
        assert sees["present"] == []
        inner = child_of(daemon.process)
        for name, mine in sees["namespaces"].items():
            others = {os.readlink(f"/proc/{pid}/ns/{name}") for pid in (inner, os.getpid())}
            assert len(others) == 2
            assert mine not in others
        assert os.listdir(f"/proc/{inner}/root/dev/shm") == []
        daemon.assert_log_clean()
        os.kill(inner, 15)
        assert daemon.process.wait(60) == 0
    finally:
        daemon.kill()


# ---- users ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the daemon is allowed to serve, beside what it is not."""
    top = tmp_path_factory.mktemp("users")
    for name in ("allowed", "allowed/empty", "allowed/inner", "allowed-not", "secret"):
        (top / name).mkdir()
    for name in ("allowed/m", "allowed/inner/x", "allowed-not/m", "secret/m"):
        write_checkpoint(top / f"{name}.safetensors", random_tensors(4, 1000))
    allowed = top / "allowed"
    (allowed / "out.safetensors").symlink_to("../secret/m.safetensors")
    (allowed / "absolute.safetensors").symlink_to(top / "secret" / "m.safetensors")
    (allowed / "up").symlink_to("../secret")
    (allowed / "self.safetensors").symlink_to("self.safetensors")
    (allowed / "magic.safetensors").symlink_to("/proc/self/mem")
    (allowed / "within.safetensors").symlink_to("inner/x.safetensors")
    os.mkfifo(allowed / "fifo.safetensors")
    (allowed / "shards").mkdir()
    index = allowed / "shards" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"layer.0.weight": "../../secret/m.safetensors"}}))
    return top


@pytest.fixture(scope="module")
def module_daemon(models: Path) -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", "16MiB", "--allow", str(models / "allowed") + "/") as daemon:
        yield daemon


def test_another_user_is_refused_where_nothing_is_allowed(
    root: None, start_daemon: StartDaemon, nursery: Nursery, models: Path
) -> None:
    daemon = start_daemon("--memory-limit", "16MiB")
    path = models / "allowed" / "m.safetensors"
    client = nursery.start("load", uid=NOBODY, socket_dir=daemon.socket_dir, source=path)
    failed = client.hear("failed")
    assert failed["error"] == "AccessDeniedError"
    assert str(NOBODY) in failed["message"]
    assert "--allow" in failed["message"]
    owner = nursery.start("load", socket_dir=daemon.socket_dir, source=path)
    assert owner.hear("loaded")["found"] == expected(random_tensors(4, 1000))


@pytest.mark.parametrize("source", ["m.safetensors", "within.safetensors", "inner", "inner/../m.safetensors"])
def test_another_user_is_served_what_is_allowed(
    source: str, root: None, module_daemon: DaemonProcess, nursery: Nursery, models: Path
) -> None:
    uri = f"file://{models}/allowed/{source}"
    client = nursery.start("load", uid=NOBODY, socket_dir=module_daemon.socket_dir, source=uri)
    assert client.hear("loaded")["found"] == expected(random_tensors(4, 1000))


REFUSED = {
    "out.safetensors": ("AccessDeniedError", "leaves the allowed directory"),
    "absolute.safetensors": ("AccessDeniedError", "leaves the allowed directory"),
    "magic.safetensors": ("AccessDeniedError", "leaves the allowed directory"),
    "self.safetensors": ("AccessDeniedError", "link"),
    "up/m.safetensors": ("AccessDeniedError", "leaves the allowed directory"),
    "../secret/m.safetensors": ("AccessDeniedError", "leaves the allowed directory"),
    "%2e%2e/secret/m.safetensors": ("AccessDeniedError", "leaves the allowed directory"),
    "../allowed-not/m.safetensors": ("AccessDeniedError", "leaves the allowed directory"),
    "fifo.safetensors": ("CheckpointInvalidError", "not a regular file"),
    "device.safetensors": ("CheckpointInvalidError", "not a regular file"),
    "empty": ("CheckpointNotFoundError", "holds no"),
    "gone.safetensors": ("CheckpointNotFoundError", "does not exist"),
    "m.safetensors/x": ("CheckpointNotFoundError", "does not exist"),
    "shards": ("CheckpointInvalidError", "../../secret/m.safetensors"),
}


@pytest.mark.parametrize("source", REFUSED)
def test_another_user_is_refused_what_is_not_a_checkpoint_beneath_the_prefix(
    source: str, root: None, module_daemon: DaemonProcess, nursery: Nursery, models: Path
) -> None:
    device = models / "allowed" / "device.safetensors"
    if not device.exists():
        os.mknod(device, 0o20666, os.makedev(1, 3))
    error, words = REFUSED[source]
    uri = f"file://{models}/allowed/{source}"
    client = nursery.start("load", uid=NOBODY, socket_dir=module_daemon.socket_dir, source=uri)
    failed = client.hear("failed")
    assert failed["error"] == error, failed
    assert words in failed["message"]
    assert f"{models}/allowed/{source}".replace("%2e", ".") in failed["message"]
    assert "layer" not in failed["message"]


@pytest.mark.parametrize("source", ["secret/m.safetensors", "allowed-not/m.safetensors", "secret", "nothing"])
def test_another_user_is_refused_what_no_prefix_names_and_not_told_whether_it_exists(
    source: str, root: None, module_daemon: DaemonProcess, nursery: Nursery, models: Path
) -> None:
    path = models / source
    client = nursery.start("load", uid=NOBODY, socket_dir=module_daemon.socket_dir, source=path)
    failed = client.hear("failed")
    assert failed["error"] == "AccessDeniedError"
    assert f"may not load {path}: penstockd has no --allow prefix" in failed["message"]


def test_the_daemon_s_own_user_may_load_anything_but_what_is_no_file(
    module_daemon: DaemonProcess, nursery: Nursery, models: Path
) -> None:
    with module_daemon.client() as client:
        same(client.load_state_dict(models / "allowed" / "out.safetensors").items(), random_tensors(4, 1000))
    for name in ("fifo", "magic", "self"):
        path = models / "allowed" / f"{name}.safetensors"
        failing = nursery.start("load", socket_dir=module_daemon.socket_dir, source=path)
        assert str(path) in failing.hear("failed")["message"]


def test_a_prefix_that_is_a_file_allows_just_that(
    root: None, start_daemon: StartDaemon, nursery: Nursery, models: Path
) -> None:
    path = models / "secret" / "m.safetensors"
    daemon = start_daemon("--memory-limit", "16MiB", "--allow", str(path))
    for source, word in ((path, "loaded"), (models / "secret", "failed"), (f"{path}/..", "failed")):
        client = nursery.start("load", uid=NOBODY, socket_dir=daemon.socket_dir, source=f"file://{source}")
        client.hear(word)


def test_a_user_sees_own_loads_only(
    root: None, module_daemon: DaemonProcess, nursery: Nursery, models: Path
) -> None:
    path = models / "allowed" / "m.safetensors"
    socket_dir = module_daemon.socket_dir
    holders = {
        uid: nursery.start("hold", uid=uid, socket_dir=socket_dir, source=path) for uid in (NOBODY, SOMEBODY)
    }
    pausing = {
        uid: nursery.start("load", uid=uid, socket_dir=socket_dir, source=path, pause_after=1)
        for uid in (NOBODY, SOMEBODY)
    }
    for holder in holders.values():
        holder.hear("holds")
    for client in pausing.values():
        client.hear("paused")
    for uid, holder in holders.items():
        asking = nursery.start("status", uid=uid, socket_dir=socket_dir)
        status = asking.hear("status")["status"]
        assert [load["uid"] for load in status["loads"]] in ([], [uid])  # none: all of it was sent
        seen = {(one["uid"], one["pid"]) for stage in status["stages"] for one in stage["holders"]}
        assert seen == {(uid, holder.pid), (uid, pausing[uid].pid)}
    everything = module_daemon.status()
    users = {one["uid"] for stage in everything["stages"] for one in stage["holders"]}
    assert users == {NOBODY, SOMEBODY}
    nursery.end_all()
    module_daemon.wait_idle()


def test_no_slab_of_one_user_ever_reaches_another(
    root: None, start_daemon: StartDaemon, nursery: Nursery, models: Path
) -> None:
    """And while users take memory from each other, the limit holds."""
    daemon = start_daemon("--memory-limit", "8MiB", "--allow", str(models / "allowed"))
    allowed = models / "allowed"
    large = write_checkpoint(allowed / "large.safetensors", random_tensors(24, MIB // 4))
    seen: dict[int, set[str]] = {NOBODY: set(), SOMEBODY: set(), 0: set()}
    for source in (allowed / "m.safetensors", large, large):
        clients = [
            (
                uid,
                nursery.start(
                    "mapped_slabs", uid=uid, socket_dir=daemon.socket_dir, source=source, memory_limit="4MiB"
                ),
            )
            for uid in seen
        ]
        for uid, client in clients:
            seen[uid].update(client.hear("slabs")["inodes"])
    assert all(seen.values())
    assert not seen[NOBODY] & seen[SOMEBODY]
    assert not seen[0] & (seen[NOBODY] | seen[SOMEBODY])
    assert daemon.status()["staging"]["peak_bytes"] <= 8 * MIB


def test_a_user_cannot_listen_in_the_daemon_s_place(root: None, module_daemon: DaemonProcess) -> None:
    """The directory is the daemon's: only it can bind or remove sockets there."""
    status = module_daemon.socket_dir.stat()
    assert status.st_uid == 0
    assert status.st_mode & 0o022 == 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other, pytest.raises(OSError):
        other.bind(str(module_daemon.socket_dir / "handoff.sock"))
