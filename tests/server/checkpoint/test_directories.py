"""What directories mean, with real files: stale and variant indexes, leavings, links that lead nowhere, files
that are something else."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import pytest

from penstock.server.checkpoint.catalog import Catalog
from penstock.server.checkpoint.files import Checkpoint
from penstock.server.checkpoint.selection import select
from penstock.server.errors import (
    AccessDeniedError,
    CheckpointInvalidError,
    CheckpointNotFoundError,
    InvalidRequestError,
    TooManyLoadsError,
)
from penstock.server.sources import Access

from ..support import ROOT, checkpoint_bytes, open_fds, write_checkpoint, write_index

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")

INDEX = "model.safetensors.index.json"


def resolve(catalog: Catalog, *sources: Path | str, access: Access = ROOT, variant: str = "") -> Checkpoint:
    """Closed again."""
    checkpoint = catalog.resolve([str(source) for source in sources], access, variant)
    checkpoint.close()
    return checkpoint


def files(checkpoint: Checkpoint) -> list[str]:
    return [os.path.basename(file.uri) for file in checkpoint.files]


def delivered(checkpoint: Checkpoint) -> list[list[str]]:
    """Names of the tensors, by file."""
    selection = select(checkpoint.tables, None, checkpoint.delivered)
    return [
        [table.name(index) for index in indices]
        for table, indices in zip(checkpoint.tables, selection.files, strict=True)
    ]


# ---- indexes that are stale ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "base", ["model", "diffusion_pytorch_model", "consolidated", "adapter_model", "unet-v1.5"]
)
@pytest.mark.parametrize("folder", ["", "shards/"])
def test_where_shards_are_missing_the_single_file_is_loaded_with_a_warning(
    catalog: Catalog, tmp_path: Path, base: str, folder: str
) -> None:
    write_index(
        tmp_path / f"{base}.safetensors.index.json", {"t0": f"{folder}{base}-00001-of-00002.safetensors"}
    )
    write_checkpoint(tmp_path / f"{base}.safetensors", [4, 4])
    checkpoint = resolve(catalog, tmp_path)
    assert files(checkpoint) == [f"{base}.safetensors"]
    (warning,) = checkpoint.warnings
    assert f"{tmp_path}/{base}.safetensors.index.json is stale" in warning
    assert f"{base}-00001-of-00002.safetensors, which does not exist" in warning
    assert "Delete the index" in warning


def test_a_single_file_takes_the_place_of_shards_of_which_only_some_are_there(
    catalog: Catalog, tmp_path: Path
) -> None:
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    write_index(tmp_path / INDEX, {"t0": shards[0], "t1": shards[1]})
    write_checkpoint(tmp_path / shards[0], [4])
    write_checkpoint(tmp_path / "model.safetensors", [4, 4])
    assert files(resolve(catalog, tmp_path)) == ["model.safetensors"]


def test_a_shard_that_is_a_link_to_nowhere_is_missing(catalog: Catalog, tmp_path: Path) -> None:
    write_index(tmp_path / INDEX, {"t0": "model-00001-of-00001.safetensors"})
    (tmp_path / "model-00001-of-00001.safetensors").symlink_to("../blobs/0123")
    write_checkpoint(tmp_path / "model.safetensors", [4, 4])
    assert files(resolve(catalog, tmp_path)) == ["model.safetensors"]


def test_shards_that_were_cut_anew_take_the_place_of_those_that_a_stale_index_names(
    catalog: Catalog, tmp_path: Path
) -> None:
    write_index(tmp_path / INDEX, {"t0": "model-00001-of-00001.safetensors"})
    for n in (1, 2):
        write_checkpoint(tmp_path / f"model-0000{n}-of-00002.safetensors", [4], prefix=f"{n}-")
    checkpoint = resolve(catalog, tmp_path)
    assert len(files(checkpoint)) == 2
    assert "is stale" in "".join(checkpoint.warnings)


def test_without_another_checkpoint_a_stale_index_is_an_error_that_names_the_remedy(
    catalog: Catalog, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "x.safetensors", [4])
    index = write_index(tmp_path / INDEX, {"t0": "x.safetensors", "t1": "gone.safetensors"})
    for source in (tmp_path, index):
        with pytest.raises(CheckpointInvalidError) as caught:
            resolve(catalog, source)
        assert f"{index} names gone.safetensors, which does not exist" in caught.value.message
        assert "the index is stale" in caught.value.message
        assert "delete the index" in caught.value.message


def test_an_index_that_is_named_by_itself_is_followed_or_refused(catalog: Catalog, tmp_path: Path) -> None:
    index = write_index(tmp_path / INDEX, {"t0": "gone.safetensors"})
    write_checkpoint(tmp_path / "model.safetensors", [4])
    with pytest.raises(CheckpointInvalidError, match=r"gone\.safetensors, which does not exist"):
        resolve(catalog, index)


def test_where_both_are_whole_the_index_is_followed_with_a_warning(catalog: Catalog, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.safetensors", [4, 4])
    write_index(tmp_path / INDEX, {"t0": "model-00001-of-00001.safetensors"})
    write_checkpoint(tmp_path / "model-00001-of-00001.safetensors", [4, 4])
    checkpoint = resolve(catalog, tmp_path)
    assert files(checkpoint) == ["model-00001-of-00001.safetensors"]
    (warning,) = checkpoint.warnings
    assert "a checkpoint twice, in model.safetensors and in the files that model.safetensors.index" in warning


def test_an_index_that_names_the_single_file_is_nothing_odd(catalog: Catalog, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.safetensors", [4, 4])
    write_index(tmp_path / INDEX, {"t0": "model.safetensors", "t1": "model.safetensors"})
    checkpoint = resolve(catalog, tmp_path)
    assert (files(checkpoint), checkpoint.warnings) == (["model.safetensors"], ())


def test_what_a_load_is_warned_of_is_bounded(catalog: Catalog, tmp_path: Path) -> None:
    directories = [tmp_path / str(n) for n in range(50)]
    for directory in directories:
        directory.mkdir()
        write_checkpoint(directory / "m-1-of-2.safetensors", [4], prefix=f"{directory.name}-")
    warnings = resolve(catalog, *directories).warnings
    assert 0 < len(warnings) <= 8


# ---- a tensor in two files ----------------------------------------------------------------------


def test_the_index_decides_which_copy_of_a_tensor_is_delivered(catalog: Catalog, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m-1.safetensors", [4, 4])
    write_checkpoint(tmp_path / "m-2.safetensors", [4, 4, 4], seed=2)
    first = {"t0": "m-1.safetensors", "t1": "m-1.safetensors", "t2": "m-2.safetensors"}
    write_index(tmp_path / INDEX, first)
    checkpoint = resolve(catalog, tmp_path)
    assert delivered(checkpoint) == [["t0", "t1"], ["t2"]]
    write_index(tmp_path / INDEX, {**first, "t1": "m-2.safetensors"})
    other = resolve(catalog, tmp_path)
    assert delivered(other) == [["t0"], ["t1", "t2"]]
    assert other.version != checkpoint.version


def test_a_selection_gets_the_copy_that_counts(catalog: Catalog, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m-1.safetensors", [4, 4])
    write_checkpoint(tmp_path / "m-2.safetensors", [4, 4, 4], seed=2)
    write_index(tmp_path / INDEX, {"t0": "m-1.safetensors", "t1": "m-2.safetensors", "t2": "m-2.safetensors"})
    checkpoint = resolve(catalog, tmp_path)
    selection = select(checkpoint.tables, ["t1", "t0"], checkpoint.delivered)
    assert [list(indices) for indices in selection.files] == [[0], [1]]


@pytest.mark.parametrize("kind", ["directory", "files", "two directories"])
def test_without_an_index_a_tensor_in_two_files_is_refused(
    catalog: Catalog, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "sub").mkdir()
    one = write_checkpoint(tmp_path / "m-1.safetensors", [4])
    two = write_checkpoint(
        tmp_path / ("sub" if kind == "two directories" else "") / "m-2.safetensors", [4], seed=2
    )
    sources = {"directory": [tmp_path], "files": [one, two], "two directories": [tmp_path, tmp_path / "sub"]}
    with pytest.raises(CheckpointInvalidError) as caught:
        resolve(catalog, *sources[kind])
    assert f"{one} and {two} both hold tensor 't0'" in caught.value.message


def test_a_file_that_is_named_twice_is_delivered_twice(catalog: Catalog, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m.safetensors", [4])
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "link.safetensors").symlink_to("../m.safetensors")
    checkpoint = resolve(catalog, path, path, tmp_path / "sub")
    assert delivered(checkpoint) == [["t0"]] * 3


def test_that_no_tensor_is_in_two_files_is_remembered_by_version(catalog: Catalog, tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "m-1.safetensors", [4])
    two = write_checkpoint(tmp_path / "m-2.safetensors", [4], prefix="u")
    assert resolve(catalog, one, two).version == resolve(catalog, one, two).version
    assert len(catalog._consistency._distinct) == 1
    two.unlink()
    write_checkpoint(two, [4, 4, 4], seed=2)
    with pytest.raises(CheckpointInvalidError, match="both hold tensor 't0'"):
        resolve(catalog, one, two)


# ---- variants and leavings ----------------------------------------------------------------------


def test_a_variant_is_chosen_by_name_and_the_default_one_otherwise(catalog: Catalog, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a.safetensors", [4])
    write_checkpoint(tmp_path / "b.safetensors", [2])
    write_index(tmp_path / INDEX, {"t0": "a.safetensors"})
    variant = write_index(tmp_path / "model.safetensors.index.fp16.json", {"t0": "b.safetensors"})
    assert files(resolve(catalog, tmp_path)) == ["a.safetensors"]
    assert files(resolve(catalog, tmp_path, variant="fp16")) == ["b.safetensors"]
    assert files(resolve(catalog, variant)) == ["b.safetensors"]
    with pytest.raises(CheckpointNotFoundError, match=r"no variant 'bf16'; choose one that it holds: fp16"):
        resolve(catalog, tmp_path, variant="bf16")


def test_a_stale_index_of_a_variant_gives_way_to_the_file_of_that_variant(
    catalog: Catalog, tmp_path: Path
) -> None:
    for name in ("model.safetensors", "model.fp16.safetensors"):
        write_checkpoint(tmp_path / name, [4])
    write_index(tmp_path / "model.safetensors.index.fp16.json", {"t0": "gone.safetensors"})
    assert files(resolve(catalog, tmp_path)) == ["model.safetensors"]
    assert files(resolve(catalog, tmp_path, variant="fp16")) == ["model.fp16.safetensors"]


def test_one_file_has_no_variants(catalog: Catalog, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "model.safetensors", [4])
    index = write_index(tmp_path / INDEX, {"t0": "model.safetensors"})
    for source in (path, index):
        with pytest.raises(InvalidRequestError, match=r"^variant: .*only a directory has variants"):
            resolve(catalog, source, variant="fp16")


def test_what_is_hidden_is_no_shard_but_can_be_named(catalog: Catalog, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.safetensors", [4])
    (tmp_path / "._model.safetensors").write_bytes(b"\x00\x05\x16\x07" + bytes(4092))
    (tmp_path / "._model.safetensors.index.json").write_bytes(b"\x00\x05\x16\x07" + bytes(4092))
    hidden = write_checkpoint(tmp_path / ".kept.safetensors", [4], prefix="k")
    (tmp_path / ".cache").mkdir()
    assert files(resolve(catalog, tmp_path)) == ["model.safetensors"]
    assert files(resolve(catalog, hidden)) == [".kept.safetensors"]


# ---- what is no safetensors ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Access denied</html>", "is an HTML page"),
        (b"GGUF\3\0\0\0" + bytes(64), "is a GGUF file"),
        (b"PK\3\4" + bytes(64), "is a zip archive"),
        (b"", "is empty"),
        (checkpoint_bytes([100])[:-7], "it is cut off, 7 are missing"),
        (checkpoint_bytes([100]) + b"more", "4 are too many"),
        (checkpoint_bytes([100])[:20], "cut off in its header"),
    ],
)
def test_a_file_that_is_something_else_is_called_what_it_is(
    catalog: Catalog, tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointInvalidError) as caught:
        resolve(catalog, tmp_path)
    assert caught.value.message.startswith(f"{path}")
    assert said in caught.value.message
    assert caught.value.details == {"file": str(path)}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
        (b"<html>", "is an HTML page"),
        (b"", "is empty"),
        (b'{"weight_map": {"t0": "model', "is cut off after 28 bytes"),
        (checkpoint_bytes([4]), "is a safetensors file"),
    ],
)
def test_an_index_that_is_something_else_is_called_what_it_is(
    catalog: Catalog, tmp_path: Path, content: bytes, said: str
) -> None:
    index = tmp_path / INDEX
    index.write_bytes(content)
    for source in (tmp_path, index):
        with pytest.raises(CheckpointInvalidError, match=f"^{index} ") as caught:
            resolve(catalog, source)
        assert said in caught.value.message


# ---- links --------------------------------------------------------------------------------------


def user(*prefixes: Path) -> Access:
    return Access(uid=1000, privileged=False, prefixes=tuple(map(str, prefixes)))


@pytest.mark.parametrize("privileged", [True, False])
def test_a_link_that_leads_nowhere_is_called_one(catalog: Catalog, tmp_path: Path, privileged: bool) -> None:
    link = tmp_path / "model.safetensors"
    link.symlink_to("away/weights")
    access = ROOT if privileged else user(tmp_path)
    for source in (link, tmp_path):
        with pytest.raises(CheckpointNotFoundError) as caught:
            resolve(catalog, source, access=access)
        assert caught.value.message.startswith(f"{link} is a link to away/weights, which does not exist")
        assert "mount or fetch" in caught.value.message


def test_a_link_on_the_way_that_leads_nowhere_is_named(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to("v2")
    path = tmp_path / "current" / "model.safetensors"
    with pytest.raises(CheckpointNotFoundError) as caught:
        resolve(catalog, path)
    assert f"{path} does not exist: {tmp_path}/current is a link to v2" in caught.value.message


def test_a_file_that_is_missing_behind_a_good_link_is_just_missing(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir()
    (tmp_path / "current").symlink_to("v1")
    with pytest.raises(CheckpointNotFoundError) as caught:
        resolve(catalog, tmp_path / "current" / "model.safetensors")
    assert "current/model.safetensors does not exist where penstockd runs" in caught.value.message
    assert "is a link" not in caught.value.message


def test_the_cache_of_hugging_face_gets_a_hint_of_its_own(catalog: Catalog, tmp_path: Path) -> None:
    """Mounted without its blobs, and allowed without them."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/4567")
    with pytest.raises(CheckpointNotFoundError, match="mount or allow the whole cache"):
        resolve(catalog, snapshot)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    write_checkpoint(tmp_path / "models--a--b" / "blobs" / "4567", [4])
    assert files(resolve(catalog, snapshot)) == ["model.safetensors"]
    with pytest.raises(AccessDeniedError, match="mount or allow the whole cache"):
        resolve(catalog, snapshot, access=user(snapshot))
    with pytest.raises(CheckpointNotFoundError, match="name the directory of a revision"):
        resolve(catalog, tmp_path / "models--a--b")


def test_of_what_lies_outside_of_a_prefix_others_learn_nothing(catalog: Catalog, tmp_path: Path) -> None:
    """Not even whether it exists: neither by a link that leaves the prefix, nor above it."""
    (tmp_path / "models").mkdir()
    write_checkpoint(tmp_path / "there", [4])
    said = []
    for name in ("there", "gone"):
        link = tmp_path / "models" / "model.safetensors"
        link.unlink(missing_ok=True)
        link.symlink_to(f"../{name}")
        with pytest.raises(AccessDeniedError) as caught:
            resolve(catalog, link, access=user(tmp_path / "models"))
        said.append(caught.value.message)
    assert said[0] == said[1]
    (tmp_path / "up").symlink_to("nowhere")
    with pytest.raises(AccessDeniedError) as caught:
        resolve(catalog, tmp_path / "up" / "x", access=user(tmp_path / "models"))
    assert "nowhere" not in caught.value.message


def test_too_many_open_files_is_an_error_that_says_what_to_raise(catalog: Catalog, tmp_path: Path) -> None:
    paths = [write_checkpoint(tmp_path / f"{n}.safetensors", [4], prefix=f"{n}-") for n in range(8)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(open_fds()) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    taken = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        os.close(taken.pop())
        with pytest.raises(TooManyLoadsError) as caught:
            resolve(catalog, *paths)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)
    assert f"as many files open as it may ({limit})" in caught.value.message
    assert "ulimit -n, LimitNOFILE=" in caught.value.message
    assert len(files(resolve(catalog, *paths))) == 8
