"""Files that change while, and after, they are loaded: the old bytes, the new ones or an error; no mix."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.client import errors

from ..conftest import StartDaemon
from ..programs import digest
from ..support import DaemonProcess, RawLoad, random_tensors, running_daemon, same, write_checkpoint

MIB = 1 << 20
OLD, NEW = random_tensors(40, MIB // 4), random_tensors(40, MIB // 4, seed=7)


@pytest.fixture(scope="module")
def module_daemon() -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", "64MiB", "--block-size", "64KiB") as daemon:
        yield daemon


@pytest.fixture
def daemon(module_daemon: DaemonProcess) -> Iterator[DaemonProcess]:
    yield module_daemon
    module_daemon.wait_idle()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "m.safetensors", OLD)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def truncate_to_nothing(path: Path) -> None:
    os.truncate(path, 0)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def overwrite(path: Path) -> None:
    """In place, with a valid checkpoint of the same names, shapes and size."""
    other = write_checkpoint(path.with_name("other"), NEW)
    with path.open("r+b") as file:
        file.write(other.read_bytes())


def overwrite_the_end(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))


def touch(path: Path) -> None:
    os.utime(path)


def replace(path: Path) -> None:
    write_checkpoint(path.with_name("other"), NEW).rename(path)


def remove(path: Path) -> None:
    path.unlink()


def time_put_back(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """`write`, after which the file has its old mtime again."""

    def write_and_put_back(path: Path) -> None:
        before = path.stat()
        write(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    write_and_put_back.__name__ = f"{write.__name__}_with_the_time_put_back"
    return write_and_put_back


def copy_over(path: Path) -> None:
    """With times, owner and another mode, as `cp -p` does."""
    other = write_checkpoint(path.with_name("other"), NEW)
    before = path.stat()
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.chmod(0o640)
    subprocess.run(["cp", "-p", other, path], check=True)


def through_a_mapping(path: Path) -> None:
    new = write_checkpoint(path.with_name("other"), NEW).read_bytes()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[:] = new


def punch_a_hole(path: Path) -> None:
    size = path.stat().st_size // 4096 * 4096
    subprocess.run(["fallocate", "--punch-hole", "-o", "4096", "-l", str(size - 4096), path], check=True)


def zero(path: Path) -> None:
    size = path.stat().st_size // 4096 * 4096
    fallocate(path, "--zero-range", "--keep-size", "-o", "4096", "-l", str(size - 4096))


def take_out_and_put_in(path: Path) -> None:
    """A page, which moves all that follows it, and moves it back."""
    fallocate(path, "--collapse-range", "-o", str(MIB), "-l", "4096")
    fallocate(path, "--insert-range", "-o", str(MIB), "-l", "4096")


def fallocate(path: Path, *arguments: str) -> None:
    done = subprocess.run(["fallocate", *arguments, path], capture_output=True, text=True)
    if "not supported" in done.stderr:
        pytest.skip(f"this file system moves no blocks: {done.stderr}")
    assert done.returncode == 0, done.stderr


def cut_and_extend(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, 4096)
    os.truncate(path, size)


def write_through_a_link(path: Path) -> None:
    other = path.with_name("link")
    os.link(path, other)
    time_put_back(overwrite)(other)


WRITES = (
    overwrite,
    overwrite_the_end,
    through_a_mapping,
    punch_a_hole,
    zero,
    take_out_and_put_in,
    cut_and_extend,
)
CHANGES = (
    truncate,
    truncate_to_nothing,
    append,
    touch,
    copy_over,
    write_through_a_link,
    *WRITES,
    *map(time_put_back, WRITES),
)


@pytest.mark.parametrize("owned", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_changed_in_mid_stream_fails_the_load_and_never_yields_a_wrong_tensor(
    change: Callable[[Path], None], owned: bool, daemon: DaemonProcess, path: Path
) -> None:
    with daemon.client().load(path, memory_limit="4MiB", owned=owned) as load:
        iterator = iter(load)
        name, tensor = next(iterator)
        change(path)
        assert digest(tensor) == digest(OLD[name])
        del tensor
        found: list[tuple[str, str]] = []
        with pytest.raises(errors.CheckpointChangedError, match=str(path)):
            found.extend((name, digest(tensor)) for name, tensor in iterator)
    assert len(found) < len(OLD) - 1
    assert all(known == digest(OLD[name]) for name, known in found)


def link(path: Path) -> None:
    os.link(path, path.with_name("link"))


def rename(path: Path) -> None:
    path.rename(path.with_name("renamed"))


def chmod(path: Path) -> None:
    path.chmod(path.stat().st_mode ^ 0o040)


def assert_old_bytes_when_changed_in_mid_stream(
    change: Callable[[Path], None], daemon: DaemonProcess, path: Path
) -> None:
    with daemon.client().load(path, memory_limit="4MiB") as load:
        iterator = iter(load)
        found = [next(iterator)]
        change(path)
        found += iterator
    same(found, OLD)


@pytest.mark.parametrize("change", [link, rename, chmod])
def test_what_touches_no_byte_in_mid_stream_disturbs_nothing(
    change: Callable[[Path], None], daemon: DaemonProcess, path: Path
) -> None:
    assert_old_bytes_when_changed_in_mid_stream(change, daemon, path)


@pytest.mark.parametrize("change", [replace, remove])
def test_a_file_replaced_in_mid_stream_gives_the_old_bytes_to_the_end(
    change: Callable[[Path], None], daemon: DaemonProcess, path: Path
) -> None:
    assert_old_bytes_when_changed_in_mid_stream(change, daemon, path)


@pytest.mark.parametrize("change", [overwrite, replace])
def test_a_warm_stage_of_a_changed_file_is_not_served(
    change: Callable[[Path], None], daemon: DaemonProcess, path: Path
) -> None:
    same(daemon.client().load_state_dict(path).items(), OLD)
    change(path)
    with daemon.client().load(path) as load:
        same(load, NEW)
    assert not load.stats.cache_hit


def test_a_warm_stage_of_a_file_with_its_old_mtime_back_is_not_served(
    daemon: DaemonProcess, path: Path
) -> None:
    before = path.stat()
    same(daemon.client().load_state_dict(path).items(), OLD)
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    same(daemon.client().load_state_dict(path).items(), NEW)


def test_a_warm_stage_of_a_removed_file_is_not_served(daemon: DaemonProcess, path: Path) -> None:
    same(daemon.client().load_state_dict(path).items(), OLD)
    path.unlink()
    with pytest.raises(errors.CheckpointNotFoundError, match=str(path)):
        daemon.client().load(path)


def test_a_shard_that_changed_makes_the_whole_checkpoint_new(daemon: DaemonProcess, tmp_path: Path) -> None:
    first, second = random_tensors(2, 1000), {"b": random_tensors(1, 1000)["layer.0.weight"]}
    write_checkpoint(tmp_path / "1.safetensors", first)
    write_checkpoint(tmp_path / "2.safetensors", second)
    same(daemon.client().load_state_dict(tmp_path).items(), {**first, **second})
    second["b"] = second["b"] + 1
    write_checkpoint(tmp_path / "2.safetensors", second)
    same(daemon.client().load_state_dict(tmp_path).items(), {**first, **second})


def test_holders_of_the_old_bytes_keep_them(daemon: DaemonProcess, path: Path) -> None:
    state = daemon.client().load_state_dict(path)
    overwrite(path)
    same(state.items(), OLD)
    with daemon.client().load(path, memory_limit="4MiB") as load:
        iterator = iter(load)
        next(iterator)
        truncate_to_nothing(path)
        with pytest.raises(errors.CheckpointChangedError):
            list(iterator)
    same(state.items(), OLD)
    del state


@pytest.mark.usefixtures("root")
def test_a_load_goes_on_at_a_daemon_in_another_mount_namespace(start_daemon: StartDaemon, path: Path) -> None:
    """As a new container is: it sees the same files through mounts of its own."""
    versions: list[str] = []
    for wrapper in ((), ("unshare", "--mount", "--propagation", "private")):
        other = start_daemon("--memory-limit", "16MiB", wrapper=wrapper)
        expected = {"expect_version": versions[0]} if versions else {}
        with RawLoad(other, path, memory_limit_bytes=4 << 20, **expected) as load:
            versions.append(load.next("manifest").version)
            load.finish()
        other.wait_idle()
        assert other.terminate() == 0
    assert versions[0] != versions[1]


def test_a_load_opened_after_the_change_sees_only_the_new_bytes(daemon: DaemonProcess, path: Path) -> None:
    """While another still streams the old ones from the file that was replaced."""
    with daemon.client().load(path, memory_limit="4MiB") as load:
        iterator = iter(load)
        found = [next(iterator)]
        replace(path)
        same(daemon.client().load_state_dict(path, memory_limit="4MiB").items(), NEW)
        found += iterator
    same(found, OLD)
