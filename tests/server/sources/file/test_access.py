"""Which files a caller may open, and what is said of those that he may not."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from penstock.server.errors import (
    AccessDeniedError,
    CheckpointInvalidError,
    CheckpointNotFoundError,
    PenstockError,
)
from penstock.server.sources import Access
from penstock.server.sources.file.local_file import open_file
from penstock.server.sources.file.paths import list_directory, open_path

from ...support import ROOT

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """What a user may load, and around it what not."""
    models = tmp_path / "models"
    (models / "deep").mkdir(parents=True)
    (models / "deep" / "f").write_bytes(b"allowed")
    (models / "f").write_bytes(b"allowed")
    (models / "inside").symlink_to("deep/f")
    (models / "up").symlink_to("../secret/f")
    (models / "absolute").symlink_to(tmp_path / "secret" / "f")
    (models / "absolute-inside").symlink_to(models / "f")
    (models / "directory-out").symlink_to("../secret")
    (models / "loop").symlink_to("loop")
    (models / "magic").symlink_to("/proc/self/root/etc/passwd")
    os.mkfifo(models / "fifo")
    for name in ("secret", "models-secret"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_bytes(b"secret")
    return models


def user(*prefixes: Path | str) -> Access:
    return Access(uid=1000, privileged=False, prefixes=tuple(map(str, prefixes)))


def content(path: Path | str, access: Access) -> bytes:
    file = open_file(str(path), access)
    try:
        buffer = bytearray(file.size_bytes)
        file.read_into(0, [memoryview(buffer)])
        return bytes(buffer)
    finally:
        file.close()


@pytest.mark.parametrize(
    "path", ["f", "deep/f", "inside", "deep/../f", "deep/../deep/f", "./f", "/f", "deep//f", "//deep///f"]
)
def test_what_lies_beneath_an_allowed_prefix_is_served(models: Path, path: str) -> None:
    assert content(f"{models}/{path}", user(models)) == b"allowed"
    assert content(f"{models}/{path}", user(f"{models}/")) == b"allowed"


@pytest.mark.parametrize(
    "path",
    [
        "up",
        "absolute",
        "absolute-inside",
        "directory-out/f",
        "../secret/f",
        "deep/../../secret/f",
        "deep/../../models/f",
        "loop",
        "magic",
        "//../secret/f",
    ],
)
def test_every_way_out_of_an_allowed_prefix_is_refused(models: Path, path: str) -> None:
    with pytest.raises(AccessDeniedError):
        content(f"{models}/{path}", user(models))


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("up", "leaves the allowed directory by a link or '..'"),
        (
            "absolute-inside",
            "leaves .* an absolute link counts as leaving, wherever it points: make it relative",
        ),
        ("loop", "follows too many links"),
    ],
)
def test_a_refused_link_is_told_what_is_wrong_with_it(models: Path, path: str, why: str) -> None:
    with pytest.raises(AccessDeniedError, match=why):
        content(models / path, user(models))


def test_a_link_in_a_circle_is_not_said_to_leave(models: Path) -> None:
    with pytest.raises(AccessDeniedError, match="follows too many links"):
        content(models / "loop", ROOT)


@pytest.mark.parametrize("path", ["../models-secret/f", "../secret/f", "..", "../models-secret"])
def test_what_lies_beside_an_allowed_prefix_is_refused(models: Path, path: str) -> None:
    target = os.path.normpath(models / path)
    with pytest.raises(AccessDeniedError, match="no --allow prefix"):
        content(target, user(models))


def test_who_is_allowed_nothing_is_refused(models: Path) -> None:
    with pytest.raises(AccessDeniedError, match="uid 1000"):
        content(models / "f", user())


def test_a_prefix_may_name_one_file(models: Path) -> None:
    access = user(models / "f")
    assert content(models / "f", access) == b"allowed"
    for path in (models / "f2", models / "deep" / "f", models):
        with pytest.raises(AccessDeniedError):
            content(path, access)
    with pytest.raises(CheckpointNotFoundError):
        content(f"{models}/f/", access)


def test_the_prefix_that_names_more_of_the_path_decides(models: Path) -> None:
    """The link leaves /models, but what it leads to is allowed by its own name."""
    linked = models / "directory-out"
    for access in (user(models, linked), user(linked, models)):
        assert content(linked / "f", access) == b"secret"


def test_the_root_as_a_prefix_allows_every_path_without_links_out_of_it(models: Path) -> None:
    assert content(models / "f", user("/")) == b"allowed"
    assert content(f"/{models}/f", user("/")) == b"allowed"


def test_object_prefixes_allow_no_path(models: Path) -> None:
    for prefix in ("s3://", "s3://bucket/"):
        with pytest.raises(AccessDeniedError):
            content(models / "f", user(prefix))


@pytest.mark.parametrize("privileged", [True, False])
def test_only_regular_files_are_opened_and_nothing_waits(models: Path, privileged: bool) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        short = os.open(models, os.O_PATH)
        try:
            listener.bind(f"/proc/self/fd/{short}/socket")
        finally:
            os.close(short)
        access = ROOT if privileged else user(models, "/dev")
        for path in (models / "fifo", models / "deep", models / "socket", "/dev/null", "/dev/zero"):
            with pytest.raises(CheckpointInvalidError, match="is not a regular file"):
                content(path, access)


@pytest.mark.parametrize("privileged", [True, False])
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing", CheckpointNotFoundError),
        ("missing/f", CheckpointNotFoundError),
        ("f/", CheckpointNotFoundError),
        ("f/f", CheckpointNotFoundError),
        ("x" * 300, CheckpointNotFoundError),
        ("d/" * 2500, CheckpointNotFoundError),
    ],
)
def test_what_is_not_there_is_not_found(
    models: Path, path: str, expected: type[PenstockError], privileged: bool
) -> None:
    with pytest.raises(expected) as caught:
        content(f"{models}/{path}", ROOT if privileged else user(models))
    assert len(caught.value.message) < 5300


def test_a_privileged_caller_may_follow_links_anywhere(models: Path) -> None:
    assert content(models / "up", ROOT) == b"secret"
    assert content(models / "absolute-inside", ROOT) == b"allowed"


def test_the_descriptor_is_not_inherited(models: Path) -> None:
    for access in (ROOT, user(models)):
        fd = open_path(str(models / "f"), access, os.O_RDONLY)
        inheritable = os.get_inheritable(fd)
        os.close(fd)
        assert not inheritable


def test_a_directory_is_listed_in_order_and_anything_else_is_not(models: Path) -> None:
    for access in (ROOT, user(models)):
        assert list_directory(str(models / "deep"), access) == ["f"]
        names = list_directory(str(models), access)
        assert names == sorted(os.listdir(models))
        assert list_directory(str(models / "f"), access) is None
        assert list_directory(str(models / "fifo"), access) is None
    with pytest.raises(AccessDeniedError):
        list_directory(str(models / "directory-out"), user(models))
