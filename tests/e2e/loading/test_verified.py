"""SHA-256 of local files: `digests=`, SHA256SUMS, `--verify`."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from pathlib import Path

import pytest

from penstock.client import errors

from ..conftest import StartDaemon
from ..support import MIB, Checkpoint, Checkpoints, DaemonProcess, same, wait_until


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


WRONG = "0" * 64


@pytest.fixture(scope="module")
def large(checkpoints: Checkpoints) -> Checkpoint:
    """Of two windows of the tests' daemon."""
    return checkpoints("large", 24)


@pytest.fixture(scope="module")
def small(checkpoints: Checkpoints) -> Checkpoint:
    return checkpoints("small", 4)


@pytest.mark.parametrize("memory_limit", [-1, 0])
def test_a_digest_that_fits_verifies_the_load(
    daemon: DaemonProcess, large: Checkpoint, memory_limit: int
) -> None:
    path, tensors = large
    with daemon.client() as client:
        load = client.load(path, memory_limit=memory_limit, digests={path.name: digest(path)})
        same(load, tensors)
        assert load.stats.verified_bytes == 24 * MIB
        assert [file.verified_by for file in load.files] == ["SHA-256"]


@pytest.mark.parametrize("memory_limit", [-1, 0])
def test_a_digest_that_does_not_fit_ends_the_load_before_the_last_segment(
    daemon: DaemonProcess, large: Checkpoint, memory_limit: int
) -> None:
    path, tensors = large
    names: list[str] = []
    with daemon.client() as client:
        load = client.load(path, memory_limit=memory_limit, digests={str(path): WRONG})
        with pytest.raises(errors.CheckpointCorruptError) as caught:
            names.extend(name for name, _ in load)
    assert len(names) < len(tensors)
    assert caught.value.details["expected"] == WRONG
    assert caught.value.details["found"] == digest(path)
    wait_until(lambda: not daemon.status()["stages"], "the stage to be given up")


def test_a_load_that_was_left_in_the_middle_is_verified_by_the_next(
    daemon: DaemonProcess, small: Checkpoint
) -> None:
    path, tensors = small
    digests = {path.name: digest(path)}
    with daemon.client() as client:
        client.load(path, digests=digests).close()
        load = client.load(path, digests=digests)
        same(load, tensors)
        assert load.stats.verified_bytes == 4 * MIB


def test_a_wrong_digest_of_one_load_ends_no_other(daemon: DaemonProcess, small: Checkpoint) -> None:
    path, tensors = small
    with daemon.client() as client:
        same(client.load(path), tensors)
        with pytest.raises(errors.CheckpointCorruptError):
            client.load_state_dict(path, digests={path.name: WRONG})
        load = client.load(path)
        same(load, tensors)
        assert load.stats.cache_hit


def test_members_of_a_group_share_one_verified_window(daemon: DaemonProcess, large: Checkpoint) -> None:
    path, tensors = large
    verified = []

    def member() -> None:
        with daemon.client() as client:
            load = client.load(path, memory_limit=0, group=("verified", 2), digests={path.name: digest(path)})
            same(load, tensors)
            verified.append((load.stats.verified_bytes, load.stats.read_bytes))

    before = daemon.read_bytes()
    members = [threading.Thread(target=member) for _ in range(2)]
    for one in members:
        one.start()
    for one in members:
        one.join(60)
    assert [size for size, _ in verified] == [24 * MIB] * 2
    assert daemon.read_bytes() == before + 24 * MIB


def test_a_load_is_left_while_its_digest_is_followed(daemon: DaemonProcess, large: Checkpoint) -> None:
    """`daemon` checks afterwards that nothing is held or read."""
    path, tensors = large
    with daemon.client() as client:
        for _ in range(3):
            with client.load(path, memory_limit=0, digests={path.name: digest(path)}) as load:
                next(iter(load))
        same(client.load(path, memory_limit=0), tensors)


def test_digests_that_name_no_file_are_refused(daemon: DaemonProcess, small: Checkpoint) -> None:
    path, _ = small
    with daemon.client() as client:
        for digests, wrong in (
            ({"other.safetensors": WRONG}, "names no file"),
            ({path.name: "9f86d0"}, "is no SHA-256"),
        ):
            with pytest.raises(errors.InvalidRequestError, match=wrong):
                client.load(path, digests=digests)
        twice = path.parent / "again"
        twice.mkdir(exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (twice / path.name).hardlink_to(path)
        with pytest.raises(errors.InvalidRequestError, match="names several files"):
            client.load([path, twice / path.name], digests={path.name: WRONG})


def test_more_digests_than_may_be_are_refused(daemon: DaemonProcess, small: Checkpoint) -> None:
    path, _ = small
    with daemon.client() as client, pytest.raises(errors.InvalidRequestError, match="10001 are more than"):
        client.load(path, digests={f"{number}": WRONG[:8] for number in range(10_001)})


@pytest.mark.parametrize("style", ["  ", " *"])
def test_require_takes_sha256sums_beside_the_file(
    daemon: DaemonProcess, write: Checkpoints, style: str
) -> None:
    path, tensors = write("model", 2)
    sums = path.parent / "SHA256SUMS"
    with daemon.client() as client:
        with pytest.raises(errors.CheckpointInvalidError, match="cannot be verified"):
            client.load(path, verify="require")
        sums.write_text(f"# ours\n{WRONG}{style}config.json\n{digest(path)}{style}{path.name}\n")
        load = client.load(path, verify="require")
        same(load, tensors)
        assert load.stats.verified_bytes == 2 * MIB
        sums.write_text(f"{WRONG}{style}{path.name}\n")
        with pytest.raises(errors.CheckpointCorruptError):
            client.load_state_dict(path, verify="require")
        load = client.load(path)  # it is not asked then
        same(load, tensors)


def test_a_list_of_sums_that_is_too_long_is_refused(daemon: DaemonProcess, write: Checkpoints) -> None:
    path, _ = write("model", 1)
    (path.parent / "SHA256SUMS").write_bytes(bytes((1 << 20) + 1))
    with daemon.client() as client, pytest.raises(errors.CheckpointInvalidError, match="SHA256SUMS"):
        client.load(path, verify="require")


def test_a_daemon_that_requires_verification_is_not_overruled(
    start_daemon: StartDaemon, write: Checkpoints
) -> None:
    path, tensors = write("model", 1)
    daemon = start_daemon("--memory-limit", "16MiB", "--verify", "require")
    with daemon.client() as client:
        for verify in (None, "auto", "off"):
            with pytest.raises(errors.CheckpointInvalidError, match="cannot be verified"):
                client.load(path, verify=verify)
        with pytest.raises(errors.CheckpointInvalidError, match="cannot be verified"):
            client.prefetch(path)
        same(client.load(path, digests={path.name: digest(path)}), tensors)


def test_a_group_of_which_each_member_wants_one_file_shares_its_verified_window(
    daemon: DaemonProcess, write: Checkpoints
) -> None:
    """A file of which nothing is wanted keeps nobody from joining."""
    one, tensors = write("one", 20)
    two, _ = write("two", 1, prefix="two.")
    digests = {path.name: digest(path) for path in (one, two)}
    sizes = []

    def member() -> None:
        with daemon.client() as client:
            load = client.load(
                [one, two],
                tensors=list(tensors),
                memory_limit=0,
                group=("one file", 2),
                digests=digests,
            )
            same(load, tensors)
            sizes.append(load.stats.verified_bytes)

    before = daemon.read_bytes()
    members = [threading.Thread(target=member) for _ in range(2)]
    for thread in members:
        thread.start()
    for thread in members:
        thread.join(60)
    assert sizes == [20 * MIB] * 2
    assert daemon.read_bytes() == before + 20 * MIB
