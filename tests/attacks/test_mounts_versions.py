"""A different file under the same path is never taken for the same, whatever its device, inode, size and
times; and what is warm neither outlives its mount nor keeps it busy."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from penstock.client import errors
from penstock.server.system.statx import FileStatus, file_status

from ..e2e.support import RawLoad, random_tensors, same, wait_until, write_checkpoint
from .conftest import StartTarget
from .support import TargetDaemon

MIB = 1 << 20
OLD = random_tensors(8, MIB // 4)
NEW = random_tensors(8, MIB // 4, seed=7)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


@pytest.fixture
def daemon(start_target: StartTarget) -> TargetDaemon:
    return start_target()


class Mounts:
    """What a test mounts, in one place."""

    def __init__(self, point: Path) -> None:
        self.point = point
        self._device = ""
        point.mkdir()

    def mount(self, *arguments: str | Path) -> None:
        done = subprocess.run(["mount", *arguments, self.point], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"it cannot be mounted here: {done.stderr}")

    def mount_image(self, image: Path) -> None:
        """Read-only, through the loop device that the image before it had, so that nothing tells the two
        apart."""
        if self._device:
            device: str = self._device
            wait_until(lambda: _losetup("--detach", device) is None, "the loop device to be free")
            wait_until(lambda: _losetup(device, image) is not None, "the loop device to be had")
        else:
            self._device = _losetup("--find", "--show", image) or ""
        if not self._device:
            pytest.skip("no loop device can be had here")
        self.mount("-o", "ro", self._device)

    def unmount(self) -> None:
        """As an operator does: it fails where anything is open."""
        subprocess.run(["umount", self.point], check=True, capture_output=True)

    def close(self) -> None:
        while self.point.is_mount():
            subprocess.run(["umount", "--lazy", self.point], check=True)
        if self._device:
            _losetup("--detach", self._device)


def _losetup(*arguments: str | Path) -> str | None:
    """What it says; None if it fails."""
    done = subprocess.run(["losetup", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


@pytest.fixture
def mounts(daemon: TargetDaemon, tmp_path: Path) -> Iterator[Mounts]:
    mounts = Mounts(tmp_path / "models")
    yield mounts
    mounts.close()


@pytest.fixture
def images(tmp_path: Path, require_tool: Callable[[str], str]) -> tuple[Path, Path]:
    """Two images of one file system that differ in nothing but the bytes of its file."""
    content = tmp_path / "content"
    content.mkdir()
    old = write_checkpoint(content / "m.safetensors", OLD).read_bytes()
    new = write_checkpoint(tmp_path / "new.safetensors", NEW).read_bytes()
    first, second = tmp_path / "first.img", tmp_path / "second.img"
    subprocess.run(
        [require_tool("mkfs.ext4"), "-q", "-d", content, "-O", "^metadata_csum", first, "16M"], check=True
    )
    image, place = bytearray(first.read_bytes()), 0
    for at in range(0, len(old), 1024):  # the file's blocks need not follow each other
        block, changed = old[at : at + 1024], new[at : at + 1024]
        if image[place : place + len(block)] != block:
            place = image.index(block)
        image[place : place + len(block)] = changed
        place += len(block)
    second.write_bytes(image)
    return first, second


def status(path: Path) -> FileStatus:
    fd = os.open(path, os.O_RDONLY)
    try:
        return file_status(fd)
    finally:
        os.close(fd)


def known(status: FileStatus) -> tuple[int, ...]:
    """What may well be equal."""
    times = status.mtime_ns, status.ctime_ns, status.birth_ns
    return (*status.device, status.inode, status.size_bytes, *times)


def load(daemon: TargetDaemon, path: Path) -> dict[str, torch.Tensor]:
    with daemon.client() as client:
        return {name: tensor.clone() for name, tensor in client.load_state_dict(path).items()}


def unmountable(mounts: Mounts) -> bool:
    with contextlib.suppress(subprocess.CalledProcessError):
        mounts.unmount()
        return True
    return False


def test_another_image_in_the_same_place_is_another_version(
    daemon: TargetDaemon, mounts: Mounts, images: tuple[Path, Path]
) -> None:
    path = mounts.point / "m.safetensors"
    seen = []
    for image, tensors in zip(images * 2, (OLD, NEW) * 2, strict=True):
        mounts.mount_image(image)
        seen.append(known(status(path)))
        same(load(daemon, path).items(), tensors)
        same(load(daemon, path).items(), tensors)
        wait_until(lambda: unmountable(mounts), "the mount to be let go of")
    assert len(set(seen)) == 1, "this shows nothing: the images can be told apart by what stat says"


def test_a_mount_can_be_unmounted_while_its_checkpoint_is_warm_which_then_is_given_up(
    daemon: TargetDaemon, mounts: Mounts
) -> None:
    mounts.mount("-t", "tmpfs", "penstock")
    path = write_checkpoint(mounts.point / "m.safetensors", OLD)
    same(load(daemon, path).items(), OLD)
    wait_until(lambda: [stage["state"] for stage in daemon.status()["stages"]] == ["warm"], "it to be warm")
    wait_until(lambda: unmountable(mounts), "its files to be closed")
    wait_until(lambda: not daemon.status()["stages"], "the stage to be given up")
    with pytest.raises(errors.CheckpointNotFoundError), daemon.client() as client:
        client.load_state_dict(path)


def test_a_pin_ends_with_its_mount_and_tensors_that_are_held_stay(
    daemon: TargetDaemon, mounts: Mounts
) -> None:
    mounts.mount("-t", "tmpfs", "penstock")
    path = write_checkpoint(mounts.point / "m.safetensors", OLD)
    with daemon.client() as client:
        client.prefetch(path, pin=True)
        held = client.load_state_dict(path)
        wait_until(lambda: unmountable(mounts), "its files to be closed")
        wait_until(lambda: not daemon.status()["stages"][0]["pinned"], "the pin to end")
        same(held.items(), OLD)
        del held
        wait_until(lambda: not daemon.status()["stages"], "the stage to be given up")


def test_a_mount_of_something_else_ends_nothing(daemon: TargetDaemon, mounts: Mounts, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m.safetensors", OLD)
    same(load(daemon, path).items(), OLD)
    mounts.mount("-t", "tmpfs", "penstock")
    other = write_checkpoint(mounts.point / "m.safetensors", NEW)
    same(load(daemon, other).items(), NEW)
    wait_until(lambda: unmountable(mounts), "its files to be closed")
    wait_until(lambda: len(daemon.status()["stages"]) == 1, "the other to be given up")
    with daemon.client() as client, client.load(path) as again:
        same(again, OLD)
    assert again.stats.cache_hit


@pytest.mark.parametrize("over", ["bind", "overlay"])
def test_what_is_mounted_over_a_file_is_loaded_and_what_was_there_comes_back(
    over: str, daemon: TargetDaemon, mounts: Mounts, tmp_path: Path
) -> None:
    path = write_checkpoint(mounts.point / "m.safetensors", OLD)
    upper, work = tmp_path / "upper", tmp_path / "work"
    upper.mkdir()
    work.mkdir()
    shutil.copystat(path, write_checkpoint(upper / "m.safetensors", NEW))
    same(load(daemon, path).items(), OLD)
    if over == "bind":
        mounts.mount("--bind", upper)
    else:
        layers = f"lowerdir={mounts.point},upperdir={upper},workdir={work}"
        mounts.mount("-t", "overlay", "penstock", "-o", layers)
    same(load(daemon, path).items(), NEW)
    wait_until(lambda: unmountable(mounts), "the mount to be let go of")
    same(load(daemon, path).items(), OLD)


def test_a_load_does_not_go_on_with_another_image_after_a_restart(
    daemon: TargetDaemon, start_target: StartTarget, mounts: Mounts, images: tuple[Path, Path]
) -> None:
    path = mounts.point / "m.safetensors"
    mounts.mount_image(images[0])
    with RawLoad(daemon, path) as began:
        version = began.next("manifest").version
        began.finish()
    with RawLoad(start_target(), path, expect_version=version) as goes_on:
        assert goes_on.next("manifest").version == version
        goes_on.finish()
    wait_until(lambda: unmountable(mounts), "the mount to be let go of")
    mounts.mount_image(images[1])
    for one in (daemon, start_target()):
        with (
            RawLoad(one, path, expect_version=version) as refused,
            pytest.raises(Exception, match="changed since"),
        ):
            refused.next("manifest")
