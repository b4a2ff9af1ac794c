"""Every file below a directory: what is followed, what is refused, and what it costs at most."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.server.errors import (
    AccessDeniedError,
    CheckpointInvalidError,
    CheckpointNotFoundError,
    TooManyLoadsError,
)
from penstock.server.sources import Access, Wanted, looking
from penstock.server.sources.file import modes, tree
from penstock.server.sources.file.source import FileSource
from penstock.server.sources.looking import ListingCost

from ...support import ROOT

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")


@pytest.fixture
def source() -> Iterator[FileSource]:
    with ThreadPoolExecutor(1) as workers:
        yield FileSource(lambda path, uid: workers)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    top = tmp_path / "models" / "m"
    (top / "deep" / "er").mkdir(parents=True)
    for name in ("a", "deep/b", "deep/er/c"):
        (top / name).write_bytes(name.encode())
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "f").write_bytes(b"secret")
    return top


def everything(name: str) -> bool:
    return True


def names(source: FileSource, top: Path, access: Access = ROOT, wanted: Wanted = everything) -> list[str]:
    return sorted(listed.name for listed in source.tree(str(top), access, wanted))


def user(top: Path, gids: frozenset[int] = frozenset()) -> Access:
    return Access(uid=1000, privileged=False, prefixes=(str(top),), for_fetch=True, gids=gids)


def test_links_count_as_what_they_lead_to(source: FileSource, top: Path) -> None:
    (top / "file").symlink_to("deep/b")
    (top / "directory").symlink_to("deep/er")
    listed = {one.name: one.size_bytes for one in source.tree(str(top), user(top), everything)}
    assert listed == {"a": 1, "deep/b": 6, "deep/er/c": 9, "file": 6, "directory/c": 9}


@pytest.mark.parametrize("target", [".", "..", "../..", "deep/../deep"])
def test_a_link_to_what_holds_it_is_an_error_and_no_endless_tree(
    source: FileSource, top: Path, target: str
) -> None:
    (top / "deep" / "loop").symlink_to(target if target != "deep/../deep" else "../deep")
    with pytest.raises(CheckpointInvalidError, match=r"/deep/loop/(m/)? leads to a directory that holds it"):
        names(source, top)


@pytest.mark.parametrize("target", ["../../secret/f", "../../secret", "/proc/self/root/etc", "/etc/passwd"])
def test_a_link_that_leaves_what_the_caller_may_read_is_refused_unless_it_is_left_out(
    source: FileSource, top: Path, target: str
) -> None:
    (top / "out").symlink_to(target)
    with pytest.raises(AccessDeniedError, match=r"/out "):
        names(source, top, user(top))
    assert names(source, top, user(top), lambda name: not name.startswith("out")) == [
        "a",
        "deep/b",
        "deep/er/c",
    ]


def test_a_link_that_leads_nowhere_is_named_unless_it_is_left_out(source: FileSource, top: Path) -> None:
    (top / "gone").symlink_to("nowhere")
    with pytest.raises(CheckpointNotFoundError, match="gone is a link to nowhere"):
        names(source, top)
    assert names(source, top, wanted=lambda name: name != "gone") == ["a", "deep/b", "deep/er/c"]


def test_a_link_in_a_circle_is_refused(source: FileSource, top: Path) -> None:
    (top / "circle").symlink_to("circle")
    with pytest.raises(AccessDeniedError, match="circle follows too many links"):
        names(source, top)


def test_what_is_no_regular_file_is_not_listed(source: FileSource, top: Path) -> None:
    os.mkfifo(top / "fifo")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(top / "socket"))
        (top / "null").symlink_to("/dev/null")
        assert names(source, top) == ["a", "deep/b", "deep/er/c"]


def test_a_directory_that_is_not_wanted_is_not_entered(
    source: FileSource, top: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []
    list_one = tree._list

    def listing(path: str, *arguments: object) -> object:
        entered.append(os.path.relpath(path, top))
        return list_one(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tree, "_list", listing)
    assert names(source, top, wanted=lambda name: name != "deep/er/") == ["a", "deep/b"]
    assert sorted(entered) == [".", "deep"]


def test_names_that_are_no_text_are_given_as_the_system_has_them(source: FileSource, top: Path) -> None:
    os.close(os.open(os.fsencode(top) + b"/\xff\n", os.O_CREAT, 0o644))
    assert "\udcff\n" in names(source, top)


# ---- modes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "deep", "deep/er/c"])
@pytest.mark.parametrize(
    ("owner", "mode", "gids", "readable"),
    [
        (0, 0o755, frozenset(), True),
        (0, 0o750, frozenset(), False),
        (0, 0o750, frozenset({7}), True),
        (0, 0o705, frozenset({7}), False),
        (1000, 0o500, frozenset(), True),
        (1000, 0o055, frozenset({7}), False),
    ],
)
def test_modes_and_owners_say_what_a_user_gets_of_a_prefix(
    source: FileSource, top: Path, name: str, owner: int, mode: int, gids: frozenset[int], readable: bool
) -> None:
    if os.geteuid():
        pytest.skip("gives files to another user, which needs root")
    os.chown(top / name, owner, 7)
    os.chmod(top / name, mode)
    access = user(top, gids=gids)

    def read() -> None:
        for listed in source.tree(str(top), access, everything):
            source.open(str(top / listed.name), access).close()

    if readable:
        read()
    else:
        with pytest.raises(
            AccessDeniedError, match=rf"uid 1000 may not read .*/{name}/?: its mode {mode:04o}"
        ):
            read()
    for listed in source.tree(str(top), replace(access, for_fetch=False), everything):
        source.open(str(top / listed.name), replace(access, for_fetch=False)).close()


def test_the_directories_above_count_too(source: FileSource, top: Path) -> None:
    access = user(top.parent)
    os.chmod(top, 0o711)
    assert names(source, top / "deep", access) == ["b", "er/c"]
    os.chmod(top, 0o744)
    with pytest.raises(AccessDeniedError, match=rf"may not read {top}: its mode 0744"):
        names(source, top / "deep", access)
    os.chmod(top, 0o755)


@pytest.mark.parametrize("name", ["file", "directory/c", "directory"])
def test_a_link_does_not_lead_around_the_modes_of_directories(
    source: FileSource, top: Path, name: str
) -> None:
    (top / "file").symlink_to("deep/er/c")
    (top / "directory").symlink_to("deep/er")
    access = user(top)

    def read() -> None:
        if name == "directory":
            names(source, top / name, access)
        else:
            source.open(str(top / name), access).close()

    read()
    os.chmod(top / "deep", 0o700)
    with pytest.raises(AccessDeniedError, match=rf"may not read {top}/deep: its mode 0700"):
        read()
    os.chmod(top / "deep", 0o755)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_directory_put_in_the_place_of_one_that_may_not_be_searched_opens_nothing(
    source: FileSource, top: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write above it puts another one there, after the kernel said where the open file lies."""
    os.chmod(top / "deep" / "er", 0o700)
    where = modes._real_path

    def and_then_swap(fd: int, path: str) -> str:
        real = where(fd, path)
        (top / "deep" / "er").rename(top / "deep" / "aside")
        (top / "deep" / "er").mkdir()
        (top / "deep" / "er" / "c").write_bytes(b"mine")
        (top / "deep" / "er" / "sub").mkdir()
        return real

    (top / "deep" / "er" / "sub").mkdir()
    monkeypatch.setattr(modes, "_real_path", and_then_swap)
    access = replace(user(top), for_fetch=True)

    def read() -> None:
        if kind == "file":
            source.open(str(top / "deep" / "er" / "c"), access).close()
        else:
            names(source, top / "deep" / "er" / "sub", access)

    with pytest.raises((AccessDeniedError, CheckpointNotFoundError)):
        read()


# ---- bounds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["MAX_TREE_NAMES", "MAX_TREE_NAME_BYTES"])
def test_a_tree_of_too_many_names_is_refused(
    source: FileSource, top: Path, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = {
        "MAX_TREE_NAMES": 5,
        "MAX_TREE_NAME_BYTES": len("a deep deep/b deep/er deep/er/c".replace(" ", "")) + 2,
    }
    monkeypatch.setattr(tree, bound, count[bound])
    assert len(names(source, top)) == 3
    monkeypatch.setattr(tree, bound, count[bound] - 3)
    with pytest.raises(CheckpointInvalidError, match=rf"{top} holds more than {looking.MAX_TREE_NAMES}"):
        names(source, top)
    with pytest.raises(CheckpointInvalidError):
        names(source, top, wanted=lambda name: name.endswith("/"))


def test_names_are_charged_while_their_directory_is_walked(source: FileSource, top: Path) -> None:
    for number in range(1000):
        (top / "deep" / f"{number}").touch()
    held: list[int] = []
    access = replace(ROOT, listing=ListingCost(held.append))
    walk = source.tree(str(top), access, everything)
    assert next(walk).name == "a"
    assert len(list(walk)) == 1002
    assert max(held) > 1000 * looking.NAME_BYTES
    assert held[-1] == 0


def test_a_walk_for_which_there_is_no_memory_ends_before_it_has_all_names(
    source: FileSource, top: Path
) -> None:
    for number in range(3000):
        (top / f"{number}").touch()

    def resize(size_bytes: int) -> None:
        if size_bytes > 1000 * looking.NAME_BYTES:
            raise TooManyLoadsError("there is no more")

    access = replace(ROOT, listing=ListingCost(resize))
    with pytest.raises(TooManyLoadsError):
        names(source, top, access)
    assert access.listing.held_bytes < 1000 * looking.NAME_BYTES
