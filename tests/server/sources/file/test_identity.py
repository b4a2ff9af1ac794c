"""When two looks at a file are of the same bytes, and when a load may go on with a version."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from penstock.server.sources.file.identity import Look, change, portable_version
from penstock.server.sources.resuming import MountSet, continues, seen_writes
from penstock.server.system.statx import FileStatus, Mount

STATUS = FileStatus(
    device=(0, 40),
    inode=7,
    size_bytes=1000,
    mode=0o100644,
    uid=1,
    gid=2,
    links=1,
    mtime_ns=10,
    ctime_ns=20,
    birth_ns=5,
    mount=Mount(99, True),
)


def why(watched: bool = True, modified: bool = False, name: str = "/m/f", **changes: Any) -> str:
    now = Look(dataclasses.replace(STATUS, **changes), name)
    return change(Look(STATUS, "/m/f"), now, watched=watched, modified=modified)


def test_nothing_changed() -> None:
    assert why() == why(watched=False) == ""


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("changes", [{"size_bytes": 999}, {"mtime_ns": 11}, {"ctime_ns": 21}])
def test_size_and_times_count(changes: dict[str, Any], watched: bool) -> None:
    assert why(watched, **changes)


def test_a_write_that_the_kernel_told_of_counts_whatever_the_times() -> None:
    assert why(modified=True)
    assert why(modified=True, ctime_ns=21, links=2)


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("changes", [{"links": 2}, {"links": 0}, {"name": "/m/other"}])
def test_links_and_renames_explain_ctime(changes: dict[str, Any], watched: bool) -> None:
    assert why(watched, ctime_ns=21, **changes) == ""


@pytest.mark.parametrize("changes", [{"mode": 0o100600}, {"uid": 3}, {"gid": 3}])
def test_modes_and_owners_explain_ctime_only_where_writes_are_told(changes: dict[str, Any]) -> None:
    assert why(True, ctime_ns=21, **changes) == ""
    assert why(False, ctime_ns=21, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"device": (0, 41)},
        {"inode": 8},
        {"birth_ns": 6},
        {"size_bytes": 1001},
        {"mtime_ns": 11},
        {"ctime_ns": 21},
    ],
)
def test_versions_hold_all_that_tells_files_apart(changes: dict[str, Any]) -> None:
    assert portable_version(dataclasses.replace(STATUS, **changes)) != portable_version(STATUS)


def test_versions_stay_through_what_is_no_change() -> None:
    """And in another mount namespace."""
    same = dataclasses.replace(STATUS, mount=Mount(3, True), links=2, mode=0o100600, uid=5)
    assert portable_version(same) == portable_version(STATUS)


def version(content: str, root: str, *mounts: str) -> str:
    return content + str(MountSet.of(root, list(mounts)))


def test_a_load_goes_on_in_the_same_namespace_only_through_the_same_mounts() -> None:
    began = version("abc", "1", "a", "b")
    assert continues(began, version("abc", "1", "a", "b"))
    assert not continues(began, version("abc", "1", "a", "c"))
    assert not continues(began, version("abd", "1", "a", "b"))


def test_a_load_goes_on_in_another_container() -> None:
    assert continues(version("abc", "1", "a", "b"), version("abc", "2", "x", "y"))
    assert not continues(version("abc", "1", "a", "b"), version("abd", "2", "x", "y"))


def test_where_ids_are_not_unique_a_restart_compares_no_mounts() -> None:
    assert continues(version("abc", "", "a.0"), version("abc", "", "a.1"))
    assert version("abc", "", "a.0") != version("abc", "", "a.1")


def test_writes_that_a_daemon_saw_tell_versions_apart_and_do_not_keep_a_load_from_another_daemon() -> None:
    def after(*writes: int) -> str:
        return version("abc" + seen_writes(writes), "1", "a", "b")

    assert len({after(0, 0), after(0, 1), after(1, 0), after(0, 2)}) == 4
    assert after(0, 0) == version("abc", "1", "a", "b")
    assert continues(after(0, 1), after(0, 0))
    assert continues(after(0, 0), after(2, 0))
    assert not continues(after(0, 1), version("abd", "1", "a", "b"))
    assert not continues(after(0, 1), version("abc", "1", "a", "c"))


def test_objects_have_no_mounts() -> None:
    assert version("abc", "1", "", "") == "abc"
    assert continues("abc", "abc")
    assert not continues("abc", "abd")
    assert not continues("", "")


def test_what_is_no_version_continues_nothing() -> None:
    for made_up in ("", ".", "..", "made up", ".1.2"):
        assert not continues(made_up, version("abc", "1", "a"))
