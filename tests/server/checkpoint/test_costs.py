"""What resolving costs a user besides headers: lists of names, objects of open files, selections. Each is
charged before its memory is spent, and given back."""

from __future__ import annotations

import gc
import threading
from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.server.checkpoint import expand
from penstock.server.checkpoint.catalog import Catalog
from penstock.server.checkpoint.files import SELECTION_TIMES, Checkpoint
from penstock.server.checkpoint.headers.budget import Budget, Parts
from penstock.server.checkpoint.headers.index import MAX_FILES
from penstock.server.checkpoint.headers.keep import Keep
from penstock.server.checkpoint.layout import MAX_PARTS, decide
from penstock.server.checkpoint.selection import Selection, select
from penstock.server.errors import CheckpointInvalidError, TooManyLoadsError
from penstock.server.sources import Access, looking
from penstock.server.sources.file.source import FileSource

from ..support import MIB, write_checkpoint, write_index

UID = 70001
"""Nobody's here: for it shares count."""
USER = Access(uid=UID, privileged=True, prefixes=())
INDEX = "model.safetensors.index.json"
THREADS = 4
"""That open files, in each catalog."""


@contextmanager
def catalog_with(total_bytes: int) -> Iterator[Catalog]:
    """That may use so much for all users together, and keeps nothing cached."""
    with ThreadPoolExecutor(THREADS) as workers:
        catalog = Catalog([FileSource(lambda path, uid: workers)], keep=Keep(total_bytes, 0))
        yield catalog
        catalog.shutdown()


def resolve(catalog: Catalog, *sources: Path | str) -> Checkpoint:
    return catalog.resolve([str(source) for source in sources], USER)


def used(catalog: Catalog) -> int:
    workers = catalog._sources[0].workers("/", UID)
    together = threading.Barrier(THREADS)  # a thread that comes has let go of what it did before
    for call in [workers.submit(together.wait, 60) for _ in range(THREADS)]:
        call.result()
    gc.collect()  # a checkpoint and its charge go together
    return catalog.keep.budget.used_bytes


def fill(directory: Path, count: int) -> Path:
    directory.mkdir()
    for number in range(count):
        (directory / f"{number:06d}.txt").touch()
    return directory


# ---- names ------------------------------------------------------------------------------------------


def test_names_of_a_directory_are_charged_while_they_come(tmp_path: Path) -> None:
    full = fill(tmp_path / "full", 3000)
    write_checkpoint(full / "m.safetensors", [1])
    with catalog_with(300_000) as catalog:
        with pytest.raises(CheckpointInvalidError, match=r"more than the .* that one user may have"):
            resolve(catalog, full)
        assert used(catalog) == 0
    with catalog_with(4 * MIB) as catalog:
        checkpoint = resolve(catalog, full)
        checkpoint.close()
        assert used(catalog) < 10_000, "the names are not held any more"


@pytest.mark.parametrize("bound", ["MAX_TREE_NAMES", "MAX_TREE_NAME_BYTES", "MAX_REQUEST_NAMES"])
def test_a_directory_of_too_many_names_is_refused(
    bound: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whatever names: who can write to it decides how many there are."""
    full = fill(tmp_path / "full", 50)
    write_checkpoint(full / "m.safetensors", [1])
    with catalog_with(4 * MIB) as catalog:
        resolve(catalog, full).close()
        monkeypatch.setattr(looking, bound, 40)
        with pytest.raises(CheckpointInvalidError, match=f"{full} holds more than .* names"):
            resolve(catalog, full)


def test_folders_that_an_index_names_are_held_one_at_a_time(tmp_path: Path) -> None:
    """Each may be a link to one directory of very many names."""
    top = tmp_path / "top"
    many = fill(tmp_path / "many", 1000)
    top.mkdir()
    for number in range(40):
        (top / f"d{number}").symlink_to(many)
    named = {f"t{number}": f"d{number}/000001.txt" for number in range(40)}
    write_index(top / INDEX, {**named, "t40": "gone/x.safetensors"})
    write_checkpoint(top / "model.safetensors", [1])
    with catalog_with(1 * MIB) as catalog:
        checkpoint = resolve(catalog, top)
        assert [file.uri for file in checkpoint.files] == [f"{top}/model.safetensors"]
        checkpoint.close()


def test_more_files_than_a_load_may_have_are_refused_before_their_paths_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path of thousands of characters, for each of a hundred thousand files."""
    monkeypatch.setattr(expand, "MAX_FILES", 5)
    for number in range(6):
        write_checkpoint(tmp_path / f"{number}.safetensors", [1], prefix=str(number))
    with (
        catalog_with(4 * MIB) as catalog,
        pytest.raises(CheckpointInvalidError, match="holds 6 files to load, more than 5; name some"),
    ):
        resolve(catalog, tmp_path)


def test_files_between_which_to_choose_are_bounded() -> None:
    names = [f"{number}.safetensors" for number in range(MAX_PARTS + 1)]
    with pytest.raises(CheckpointInvalidError, match=f"holds {len(names)} files of checkpoints, more than"):
        decide("/d", names)
    assert len(decide("/d", names[:MAX_FILES]).files) == MAX_FILES


def test_numbers_of_shards_that_are_too_long_for_numbers_are_names() -> None:
    name = f"model-{'1' * 5000}-of-{'1' * 5000}.safetensors"
    assert decide("/d", [name]).files == (name,)


# ---- open files -------------------------------------------------------------------------------------


def test_files_are_charged_with_their_locations_as_long_as_they_are_open(tmp_path: Path) -> None:
    """An index of a few bytes makes thousands of long locations."""
    names = [f"{number}.safetensors" for number in range(50)]
    for number, name in enumerate(names):
        write_checkpoint(tmp_path / name, [1], prefix=f"p{number}-")
    write_index(tmp_path / INDEX, {f"p{number}-0": name for number, name in enumerate(names)})
    far = f"{tmp_path}/{'./' * 1500}{INDEX}"
    with catalog_with(16 * MIB) as catalog:
        near = resolve(catalog, tmp_path / INDEX)
        near_bytes = used(catalog)
        more = resolve(catalog, far)
        # Its headers are those of the other.
        assert used(catalog) - near_bytes > 50 * 4 * 3000
        near.close()
        more.close()
        del near, more
        assert used(catalog) == 0
    with catalog_with(500_000) as catalog:
        with pytest.raises(CheckpointInvalidError, match=r"more than the .* that one user may have"):
            resolve(catalog, far)
        assert used(catalog) == 0


# ---- selections -------------------------------------------------------------------------------------


def test_a_selection_is_charged_as_long_as_its_load_has_it(tmp_path: Path) -> None:
    count = 3000
    path = write_checkpoint(tmp_path / "m.safetensors", [1] * count)
    chosen = [f"t{number}" for number in range(0, count, 2)]
    with catalog_with(16 * MIB) as catalog:
        checkpoint = resolve(catalog, path)
        before = used(catalog)
        everything = select(checkpoint.tables, None, checkpoint.delivered)
        checkpoint.charge_selection(everything)
        assert used(catalog) == before
        selection = select(checkpoint.tables, chosen, checkpoint.delivered)
        checkpoint.charge_selection(selection)
        taken = used(catalog) - before
        assert taken == SELECTION_TIMES * array("I").itemsize * len(chosen)
        segments = checkpoint.segments_within(selection, 64 * MIB)
        assert used(catalog) - before > taken, "the segments come on top of it"
        assert sum(len(segment.tensors) for segment in segments) == len(chosen)
        checkpoint.close()
        del checkpoint, everything
        assert used(catalog) == 0


def test_a_selection_for_which_no_memory_is_left_is_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m.safetensors", [1] * 100)
    with catalog_with(1 * MIB) as catalog:
        checkpoint = resolve(catalog, path)
        with pytest.raises(CheckpointInvalidError, match="that one user may have"):
            checkpoint.charge_selection(Selection((array("I", range(1_000_000)),)))
        checkpoint.close()


def test_the_parts_of_a_charge_are_told_one_by_one() -> None:
    budget = Budget(1000)
    other = budget.charge(UID + 1, 300)
    parts = Parts(budget.charge(UID))
    parts.set("a", 100)
    parts.add("a", 50)
    parts.set("b", 200)
    assert budget.used_bytes == 300 + 350
    with pytest.raises(TooManyLoadsError):
        parts.set("a", 450)
    assert budget.used_bytes == 300 + 350
    parts.set("a", 10)
    assert budget.used_bytes == 300 + 210
    parts.clear()
    assert budget.used_bytes == 300
    assert other.size_bytes == 300
