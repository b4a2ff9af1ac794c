"""What a client makes of a daemon's answers to a fetch, and how directories come to their place."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from penstock.client import errors
from penstock.client.system import trees
from penstock.v1 import streamer_pb2 as pb

from .error_examples import DONE, fake, fetched


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/x", "a//b", ".", "..", "a/.", "", "x\0y", "a/", trees.RECORD],
)
def test_names_that_no_daemon_may_say_are_not_written(name: str, tmp_path: Path) -> None:
    with (
        fake(fetched=[fetched("before", 1, b"x"), fetched(name, 1, b"x"), DONE]) as client,
        pytest.raises(errors.ProtocolError, match="cannot be made"),
    ):
        client.fetch("/x", tmp_path / "deep" / "out")
    assert below(tmp_path) == ["deep"]


@pytest.mark.parametrize(
    "answers",
    [
        [fetched("x", 1, b"12"), DONE],
        [fetched("x", 3, b"12"), DONE],
        [fetched("x", 3, b"12"), fetched("y", 0), DONE],
        [fetched("x", 3, b"12")],
        [fetched("x", 2, b"12")],
        [],
    ],
)
def test_a_fetch_that_is_not_whole_leaves_nothing(answers: list[pb.FetchResponse], cache: Path) -> None:
    with fake(fetched=answers) as client, pytest.raises(errors.ProtocolError):
        client.fetch("/x")
    assert not [name for name in below(cache) if len(Path(name).parts) > 2]


def test_bytes_come_in_parts_and_files_may_be_empty(tmp_path: Path) -> None:
    answers = [
        pb.FetchResponse(plan=pb.FetchPlan(files=3, total_bytes=6)),
        fetched("a/b", 4, b"12"),
        pb.FetchResponse(data=b"3"),
        pb.FetchResponse(data=b"4"),
        fetched("empty", 0),
        fetched("z", 2, b"56"),
        DONE,
    ]
    with fake(fetched=answers) as client:
        out = client.fetch("/x", tmp_path / "out")
    assert [(out / name).read_bytes() for name in ("a/b", "empty", "z")] == [b"1234", b"", b"56"]


def test_many_versions_are_told_in_messages_of_a_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.client import fetch

    have = [(f"{number:05}" + "x" * 200, "v" * 100) for number in range(10_000)]
    parts = fetch._in_parts(pb.FetchRequest(source="/x"), have)
    assert [(file.name, file.version) for part in parts for file in part.have] == have
    assert [part.more for part in parts] == [True] * (len(parts) - 1) + [False]
    assert max(part.ByteSize() for part in parts) < 1 << 20
    assert max(len(part.have) for part in parts) < 4096


def test_each_source_has_a_directory_that_people_can_read() -> None:
    from penstock.client.fetch import _key

    keys = [
        _key(source)
        for source in ("s3://b/models/llama-3", "/m/llama-3", "/m/../llama-3", "/", "/x/\u00e9", "/.")
    ]
    assert len(set(keys)) == 6
    assert [key.rpartition("-")[0] for key in keys] == [
        "llama-3",
        "llama-3",
        "llama-3",
        "root",
        "root",
        "root",
    ]


def test_without_a_home_the_error_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    with fake(fetched=[DONE]) as client, pytest.raises(OSError, match="PENSTOCK_CACHE_DIR"):
        client.fetch("/x")


# ---- directories ------------------------------------------------------------------------------------


def draft(parent: Path, **files: bytes) -> trees.Draft:
    made = trees.Draft(parent, "source")
    for name, content in files.items():
        with made.create(name) as file:
            file.write(content)
        made.add(name, "1")
    return made


def test_a_draft_is_not_there_before_it_is_put(tmp_path: Path) -> None:
    with draft(tmp_path, a=b"1") as made:
        assert trees.read(tmp_path / "there", "source") is None
        made.put(tmp_path / "there", lambda path: False)
    tree = trees.read(tmp_path / "there", "source")
    assert tree is not None
    assert tree.whole
    assert list(tree.files) == ["a"]
    assert trees.read(tmp_path / "there", "other") is None
    assert below(tmp_path) == ["there", f"there/{trees.RECORD}", "there/a"]


def test_what_is_there_is_replaced_only_if_it_may_be(tmp_path: Path) -> None:
    place = tmp_path / "there"
    place.mkdir()
    (place / "old").touch()
    with draft(tmp_path, a=b"1") as made, pytest.raises(OSError, match="not empty"):
        made.put(place, lambda path: False)
    assert below(tmp_path) == ["there", "there/old"]
    with draft(tmp_path, a=b"1") as made:
        made.put(place, lambda path: path == place)
    assert below(tmp_path) == ["there", f"there/{trees.RECORD}", "there/a"]


def test_where_names_cannot_be_exchanged_one_is_renamed_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trees, "_libc", object())
    test_what_is_there_is_replaced_only_if_it_may_be(tmp_path)


def test_a_draft_that_is_given_up_leaves_nothing_and_one_of_another_process_stays(tmp_path: Path) -> None:
    with draft(tmp_path, a=b"1") as other, draft(tmp_path, b=b"1") as mine:
        assert other.path.is_dir()
        mine.put(tmp_path / "there", lambda path: False)
        assert (other.path / "a").is_file()
    assert below(tmp_path) == ["there", f"there/{trees.RECORD}", "there/b"]


def test_a_file_that_somebody_changed_is_none_of_the_tree(tmp_path: Path) -> None:
    place = tmp_path / "there"
    with draft(tmp_path, a=b"1", b=b"2", c=b"3", d=b"4") as made:
        made.put(place, lambda path: False)
    times = (place / "a").stat().st_atime_ns, (place / "a").stat().st_mtime_ns + 1
    os.utime(place / "a", ns=times)
    (place / "b").unlink()
    (place / "c").unlink()
    (place / "c").symlink_to("d")
    tree = trees.read(place, "source")
    assert tree is not None
    assert (list(tree.files), tree.whole) == (["d"], False)


@pytest.mark.parametrize(
    "record",
    [b"", b"{", b"[]", b'{"source": "source"}', b'{"source": "source", "files": {"a": [1]}}', b"\xff"],
)
def test_a_record_that_is_not_whole_is_none(tmp_path: Path, record: bytes) -> None:
    with draft(tmp_path, a=b"1") as made:
        made.put(tmp_path / "there", lambda path: False)
    (tmp_path / "there" / trees.RECORD).write_bytes(record)
    assert trees.read(tmp_path / "there", "source") is None


def test_a_digest_is_of_names_sizes_and_versions_in_any_order() -> None:
    one, two = ("a", 1, "v"), ("b", 2, "w")
    assert trees.digest([one, two]) == trees.digest([two, one])
    others = [[one], [("a", 1, "w"), two], [("a", 2, "v"), two], [("c", 1, "v"), two]]
    assert len({trees.digest(files) for files in others} | {trees.digest([one, two])}) == 5


def test_a_record_says_where_files_are_from(tmp_path: Path) -> None:
    with fake(fetched=[fetched("a", 1, b"x"), DONE]) as client:
        out = client.fetch("s3://b/m/", tmp_path / "out")
    assert json.loads((out / trees.RECORD).read_bytes())["source"] == "s3://b/m"


def test_a_client_of_a_daemon_that_knows_no_fetch_is_told_to_upgrade(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grpc

    from .fake_daemon import FakeDaemon

    def unknown(daemon: object, requests: object, context: grpc.ServicerContext) -> object:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")

    monkeypatch.setattr(FakeDaemon, "Fetch", unknown)
    with fake() as client, pytest.raises(errors.ProtocolError, match="upgrade the older of the two"):
        client.fetch("/x", tmp_path / "out")
