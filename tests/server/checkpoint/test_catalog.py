"""From sources to open files with headers: real directories, and every descriptor counted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from penstock.server.checkpoint.catalog import Catalog
from penstock.server.checkpoint.headers.keep import CACHED_BYTES
from penstock.server.errors import (
    AccessDeniedError,
    CheckpointInvalidError,
    CheckpointNotFoundError,
    InvalidRequestError,
    PenstockError,
)
from penstock.server.sources import Access
from penstock.server.sources.file.paths import local_path

from ..support import ROOT, wait_for_tick, write_checkpoint, write_index

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")


def names(catalog: Catalog, *sources: Path | str, access: Access = ROOT) -> list[tuple[str, list[str]]]:
    """The files that the sources stand for, and the tensors in each."""
    checkpoint = catalog.resolve([str(source) for source in sources], access)
    try:
        return [
            (os.path.basename(file.uri), list(header.tensors.names()))
            for file, header in zip(checkpoint.files, checkpoint.headers, strict=True)
        ]
    finally:
        checkpoint.close()


def test_a_file_stands_for_itself(catalog: Catalog, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "any name", [1, 2])
    assert names(catalog, path) == [("any name", ["t0", "t1"])]
    assert names(catalog, path.as_uri()) == [("any name", ["t0", "t1"])]
    assert names(catalog, f"file://localhost{path}".replace(" ", "%20")) == [("any name", ["t0", "t1"])]


def test_a_directory_stands_for_its_safetensors_in_order(catalog: Catalog, tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write_checkpoint(tmp_path / f"{name}.safetensors", [1], prefix=name)
    (tmp_path / "README.md").write_text("no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"no")
    expected = [("a.safetensors", ["a0"]), ("b.safetensors", ["b0"]), ("c.safetensors", ["c0"])]
    assert names(catalog, tmp_path) == expected
    assert names(catalog, f"{tmp_path}/") == expected


def test_a_directory_with_an_index_stands_for_the_files_that_it_names(
    catalog: Catalog, tmp_path: Path
) -> None:
    for name in ("x", "y", "left-out"):
        write_checkpoint(tmp_path / f"{name}.safetensors", [1, 1], prefix=name)
    (tmp_path / "sub").mkdir()
    write_checkpoint(tmp_path / "sub" / "z.safetensors", [1], prefix="z")
    index = write_index(
        tmp_path / "model.safetensors.index.json",
        {"y0": "y.safetensors", "x0": "x.safetensors", "y1": "y.safetensors", "z0": "sub/z.safetensors"},
    )
    expected = [("y.safetensors", ["y0", "y1"]), ("x.safetensors", ["x0", "x1"]), ("z.safetensors", ["z0"])]
    assert names(catalog, tmp_path) == expected
    assert names(catalog, index) == expected


def test_several_sources_are_one_checkpoint_in_the_order_given(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    first = write_checkpoint(tmp_path / "z.safetensors", [1])
    write_checkpoint(tmp_path / "d" / "a.safetensors", [1], prefix="a")
    assert [name for name, _ in names(catalog, first, tmp_path / "d")] == ["z.safetensors", "a.safetensors"]


def test_a_tensor_that_the_index_puts_elsewhere_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x.safetensors", [1], prefix="x")
    write_index(tmp_path / "model.safetensors.index.json", {"x0": "x.safetensors", "y0": "x.safetensors"})
    with pytest.raises(CheckpointInvalidError, match=r"x\.safetensors holds tensor 'y0', which it does not"):
        names(catalog, tmp_path)


def test_a_file_that_the_index_names_must_exist(catalog: Catalog, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x.safetensors", [1], prefix="x")
    write_index(tmp_path / "model.safetensors.index.json", {"x0": "x.safetensors", "y0": "gone.safetensors"})
    with pytest.raises(CheckpointInvalidError, match=r"names gone\.safetensors, which does not exist"):
        names(catalog, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        "[" * 100_000,
    ],
)
def test_a_bad_index_is_refused_by_name(catalog: Catalog, tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path / "x.safetensors", [1])
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointInvalidError, match=r"model\.safetensors\.index\.json(: | is empty)"):
        names(catalog, tmp_path)


def test_an_index_too_large_to_be_one_is_not_read(catalog: Catalog, tmp_path: Path) -> None:
    with open(tmp_path / "model.safetensors.index.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointInvalidError, match="larger than"):
        names(catalog, tmp_path)


def test_several_indexes_are_ambiguous_but_one_can_be_named(catalog: Catalog, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "x.safetensors", [1])
    write_index(tmp_path / "a.safetensors.index.json", {"t0": "x.safetensors"})
    index = write_index(tmp_path / "b.safetensors.index.json", {"t0": "x.safetensors"})
    with pytest.raises(CheckpointInvalidError, match="several index files"):
        names(catalog, tmp_path)
    assert names(catalog, index) == [("x.safetensors", ["t0"])]


def test_a_directory_without_weights_holds_nothing_to_load(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"holds no \*\.safetensors file"):
        names(catalog, tmp_path)


def test_a_name_that_is_no_text_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "x.safetensors", [1])
    os.rename(path, os.fsencode(tmp_path) + b"/\xff.safetensors")
    with pytest.raises(CheckpointInvalidError, match="not UTF-8") as caught:
        names(catalog, tmp_path)
    caught.value.message.encode()


@pytest.mark.parametrize(
    "source",
    [
        "model.safetensors",
        "./model.safetensors",
        "",
        "file:model.safetensors",
        "file://host/model.safetensors",
        "file:///model?query",
        "file:///model#fragment",
        "s3://",
        "s3:///key",
        "s3://-/key",
        "gs://bucket/model",
        "HTTP://host/x",
        "://",
        "http://[",
        "/with\0nul",
        "file:///with%00nul",
    ],
)
def test_what_names_no_path_is_an_invalid_request(catalog: Catalog, source: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"^sources: "):
        catalog.resolve([source], ROOT)


def test_a_scheme_in_upper_case_is_refused_with_the_way_to_write_it(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequestError, match=r"^sources: 'S3://b/k': write s3:// in lower case$"):
        catalog.resolve(["S3://b/k"], ROOT)


def test_uris_are_unquoted_and_paths_are_not() -> None:
    assert local_path("file:///a%20b%2Fc") == "/a b/c"
    assert local_path("/a%20b%00?#") == "/a%20b%00?#"


def test_no_sources_and_too_many_are_refused(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequestError, match="at least one"):
        catalog.resolve([], ROOT)
    with pytest.raises(InvalidRequestError, match="10001"):
        catalog.resolve(["/x"] * 10_001, ROOT)


@pytest.mark.parametrize(
    "broken", ["missing", "garbage", "empty", "fifo", "directory", "cut", "link", "header cut"]
)
@pytest.mark.parametrize("place", [0, 3, 6])
def test_one_bad_file_of_several_fails_all_and_closes_all(
    catalog: Catalog, tmp_path: Path, broken: str, place: int
) -> None:
    """The fixture counts the descriptors."""
    paths = [write_checkpoint(tmp_path / f"{n}.safetensors", [100] * 50, prefix=f"{n}-") for n in range(7)]
    bad = paths[place]
    content = bad.read_bytes()
    bad.unlink()
    if broken == "garbage":
        bad.write_bytes(b"\xff" * 100)
    elif broken == "empty":
        bad.touch()
    elif broken == "fifo":
        os.mkfifo(bad)
    elif broken == "directory":
        bad.mkdir()
    elif broken == "cut":
        bad.write_bytes(content[:-1])
    elif broken == "header cut":
        bad.write_bytes(content[:100])
    elif broken == "link":
        bad.symlink_to(shutil.which("sh") or "/bin/sh")
    access = Access(uid=1000, privileged=False, prefixes=(str(tmp_path),))
    with pytest.raises(PenstockError) as caught:
        names(catalog, *paths, access=access)
    expected: dict[str, type[PenstockError]] = {
        "missing": CheckpointNotFoundError,
        "directory": CheckpointNotFoundError,
        "link": AccessDeniedError,
    }
    assert type(caught.value) is expected.get(broken, CheckpointInvalidError)
    assert bad.name in caught.value.message


def test_an_index_outside_of_what_is_allowed_is_not_read(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "other").mkdir()
    write_checkpoint(tmp_path / "other" / "x.safetensors", [1])
    (tmp_path / "models" / "x.safetensors").symlink_to("../other/x.safetensors")
    write_index(tmp_path / "models" / "m.safetensors.index.json", {"t0": "x.safetensors"})
    index = write_index(tmp_path / "other" / "m.safetensors.index.json", {"t0": "x.safetensors"})
    access = Access(uid=1000, privileged=False, prefixes=(str(tmp_path / "models"),))
    for source in (tmp_path / "models", index, tmp_path / "other"):
        with pytest.raises(AccessDeniedError):
            names(catalog, source, access=access)
    assert names(catalog, tmp_path / "models") == [("x.safetensors", ["t0"])]


# ---- versions and the cache ---------------------------------------------------------------------


def version(catalog: Catalog, *sources: Path) -> str:
    checkpoint = catalog.resolve([str(source) for source in sources], ROOT)
    checkpoint.close()
    return checkpoint.version


def test_versions_tell_files_apart_and_know_the_same_again(catalog: Catalog, tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "1.safetensors", [5], seed=1)
    two = write_checkpoint(tmp_path / "2.safetensors", [5], seed=1, prefix="u")
    first = version(catalog, one, two)
    assert version(catalog, one, two) == version(catalog, tmp_path) == first
    assert len({first, version(catalog, two, one), version(catalog, one), version(catalog, two)}) == 4
    wait_for_tick(tmp_path)
    write_checkpoint(two, [5], seed=2, prefix="u")
    assert version(catalog, one, two) != first


def damage(path: Path) -> None:
    """Makes the header unreadable without a trace that a stat could show: only a cached one still works."""
    status = os.stat(path)
    with open(path, "r+b") as file:
        file.write(b"\xff" * 8)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_header_of_an_unchanged_file_is_parsed_once(catalog: Catalog, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.safetensors", [1, 2])
    first, second = catalog.resolve([str(path)], ROOT), catalog.resolve([str(path)], ROOT)
    first.close()
    second.close()
    assert first.headers[0] is second.headers[0]


def test_a_changed_file_is_parsed_again(catalog: Catalog, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.safetensors", [1, 2])
    assert names(catalog, path) == [("a.safetensors", ["t0", "t1"])]
    wait_for_tick(tmp_path)
    damage(path)
    with pytest.raises(CheckpointInvalidError):
        names(catalog, path)
    write_checkpoint(path, [1, 2], prefix="u")
    assert names(catalog, path) == [("a.safetensors", ["u0", "u1"])]


def write_with_metadata(path: Path, metadata_bytes: int) -> Path:
    raw = json.dumps({"__metadata__": {"text": "x" * metadata_bytes}}).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    return path


def test_the_cache_is_bounded_in_bytes_and_forgets_what_was_not_used_lately(
    catalog: Catalog, tmp_path: Path
) -> None:
    """Metadata too: a header without tensors is not free."""
    each = 900_000
    paths = [write_with_metadata(tmp_path / f"{n}.safetensors", each) for n in range(45)]
    first = catalog.resolve([str(paths[0])], ROOT)
    first.close()
    for path in paths[1:]:
        names(catalog, path)
        again = catalog.resolve([str(paths[0])], ROOT)
        again.close()
        assert again.headers[0] is first.headers[0]
        assert catalog.keep.cached_bytes <= CACHED_BYTES
    each_bytes = first.headers[0].size_bytes
    assert catalog.keep.cached_bytes == CACHED_BYTES // each_bytes * each_bytes
