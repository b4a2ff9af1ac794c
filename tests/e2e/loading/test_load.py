"""A checkpoint through a real daemon, in every limit mode and from every kind of source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from penstock.client import StreamerClient, errors

from ..conftest import StartDaemon
from ..support import random_tensors, same, write_checkpoint

MIB = 1 << 20


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """40 MiB in 10 tensors."""
    tensors = random_tensors(10, MIB)
    return write_checkpoint(tmp_path / "model.safetensors", tensors, {"format": "pt"}), tensors


@pytest.mark.parametrize("limit", ["-1", "0", "8MiB", "16MiB", "64MiB"])
@pytest.mark.parametrize("owned", [True, False])
def test_every_limit_mode_yields_the_file_s_bytes(
    limit: str, owned: bool, start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, tensors = checkpoint
    daemon = start_daemon("--memory-limit", limit)
    for again in (False, True):
        with daemon.client().load(path, owned=owned) as load:
            same(load, tensors)
            assert load.metadata == {"format": "pt"}
            assert load.stats.bytes == 40 * MIB
            assert load.stats.read_bytes == (0 if again and limit in ("-1", "64MiB") else 40 * MIB)
    peak = daemon.status()["staging"]["peak_bytes"]
    assert (
        peak <= {"-1": 64 * MIB, "0": 6 * MIB, "8MiB": 8 * MIB, "16MiB": 16 * MIB, "64MiB": 64 * MIB}[limit]
    )


def test_a_second_load_of_an_unchanged_checkpoint_reads_nothing(
    start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, tensors = checkpoint
    daemon = start_daemon("--memory-limit", "64MiB")
    with daemon.client().load(path) as first:
        same(first, tensors)
    assert (first.stats.cache_hit, first.stats.read_bytes) == (False, 40 * MIB)
    with daemon.client().load(path) as second:
        same(second, tensors)
    assert (second.stats.cache_hit, second.stats.read_bytes) == (True, 0)
    assert daemon.read_bytes() == 40 * MIB


def test_a_touched_checkpoint_is_read_anew(
    start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, _ = checkpoint
    daemon = start_daemon("--memory-limit", "128MiB")
    before = daemon.client().load_state_dict(path)
    kept = {name: tensor.clone() for name, tensor in before.items()}
    changed = random_tensors(10, MIB, seed=1)
    write_checkpoint(path, changed)
    same(daemon.client().load_state_dict(path).items(), changed)
    same(before.items(), kept)
    del before


def test_owned_tensors_from_a_window_outlive_its_reuse(
    start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, tensors = checkpoint
    daemon = start_daemon("--memory-limit", "8MiB")
    same(daemon.client().load_state_dict(path).items(), tensors)


def test_a_view_that_is_left_over_from_a_window_does_not_hold_it(
    start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, tensors = checkpoint
    daemon = start_daemon("--memory-limit", "8MiB", "--queue-timeout", "20")
    left_over = []
    with daemon.client().load(path, owned=False) as load:
        left_over += [tensor for _, tensor in load]
    same(daemon.client().load_state_dict(path).items(), tensors)
    assert all(tensor.sum().item() >= 0 for tensor in left_over)  # readable, whatever it shows


def test_a_closed_load_whose_iterator_is_still_there_does_not_hold_the_window(
    start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, tensors = checkpoint
    daemon = start_daemon("--memory-limit", "8MiB", "--queue-timeout", "20")
    load = daemon.client().load(path)
    iterator = iter(load)
    name, first = next(iterator)
    load.close()
    same(daemon.client().load_state_dict(path).items(), tensors)
    assert torch.equal(first, tensors[name])
    del iterator


def test_writing_into_yielded_tensors_changes_nothing_for_others(
    start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, tensors = checkpoint
    daemon = start_daemon("--memory-limit", "64MiB")
    scribbled = daemon.client().load_state_dict(path)
    for tensor in scribbled.values():
        tensor.fill_(-1)
    same(daemon.client().load_state_dict(path).items(), tensors)
    assert all((tensor == -1).all() for tensor in scribbled.values())


@pytest.mark.parametrize("limit", ["8MiB", "64MiB"])
def test_writing_while_loading_changes_no_later_tensor(
    limit: str, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """Small tensors share pages; those of different segments must not."""
    tensors = random_tensors(20_000, 700)
    path = write_checkpoint(tmp_path / "small.safetensors", tensors)
    daemon = start_daemon("--memory-limit", limit)
    seen = []
    with daemon.client().load(path, owned=False) as load:
        for name, tensor in load:
            assert torch.equal(tensor, tensors[name])
            seen.append(name)
            tensor.zero_()
            del tensor
    assert sorted(seen) == sorted(tensors)


@pytest.mark.parametrize("how", ["names", "predicate"])
@pytest.mark.parametrize("limit", ["8MiB", "64MiB"])
def test_a_selection_yields_just_that(
    how: str, limit: str, start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, tensors = checkpoint
    names = {"layer.1.weight", "layer.4.weight", "layer.5.weight"}
    daemon = start_daemon("--memory-limit", limit)
    selection = names if how == "names" else names.__contains__
    with daemon.client().load(path, tensors=selection) as load:
        same(load, {name: tensors[name] for name in names})
    assert daemon.read_bytes() == 12 * MIB


def test_a_selection_of_a_warm_checkpoint_reads_nothing(
    start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, tensors = checkpoint
    daemon = start_daemon("--memory-limit", "64MiB")
    with daemon.client().load(path) as load:
        same(load, tensors)
    names = ["layer.3.weight", "layer.8.weight"]
    with daemon.client().load(path, tensors=names) as load:
        same(load, {name: tensors[name] for name in names})
    assert load.stats.cache_hit
    assert daemon.read_bytes() == 40 * MIB


def test_no_tensor_at_all_is_a_load_too(
    start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    daemon = start_daemon("--memory-limit", "8MiB")
    assert daemon.client().load_state_dict(checkpoint[0], tensors=[]) == {}


def test_sources_are_files_lists_directories_and_indexes(start_daemon: StartDaemon, tmp_path: Path) -> None:
    daemon = start_daemon("--memory-limit", "64MiB")
    first, second = random_tensors(2, 1000), random_tensors(4, 1000, seed=3)
    del second["layer.0.weight"], second["layer.1.weight"]
    one = write_checkpoint(tmp_path / "b.safetensors", first)
    two = write_checkpoint(tmp_path / "a.safetensors", second)
    both = {**first, **second}
    client = daemon.client()
    same(client.load_state_dict(one).items(), first)
    same(client.load_state_dict(f"file://{one}").items(), first)
    assert list(client.load_state_dict([one, two])) == [*sorted(first), *sorted(second)]
    assert list(client.load_state_dict(tmp_path)) == [*sorted(second), *sorted(first)]
    write_checkpoint(tmp_path / "c.safetensors", {"stray": torch.ones(1)})
    weight_map = dict.fromkeys(first, "b.safetensors") | dict.fromkeys(second, "a.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    same(client.load_state_dict(tmp_path).items(), both)
    same(client.load_state_dict(index).items(), both)


def test_an_index_that_is_not_true_is_refused(start_daemon: StartDaemon, tmp_path: Path) -> None:
    client = start_daemon("--memory-limit", "8MiB").client()
    write_checkpoint(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}))
    with pytest.raises(errors.CheckpointInvalidError, match="'y'"):
        client.load(tmp_path)
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "gone.safetensors"}}))
    with pytest.raises(errors.CheckpointInvalidError, match=r"gone\.safetensors"):
        client.load(tmp_path)


def test_a_tensor_larger_than_the_limit_is_refused_by_name(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m.safetensors", {"small": torch.ones(1), "huge": torch.ones(3 * MIB)})
    client = start_daemon("--memory-limit", "8MiB").client()
    with pytest.raises(errors.MemoryLimitTooSmallError, match=r"'huge'.*12582912 bytes.*8388608"):
        client.load(path)
    assert list(client.load_state_dict(path, tensors=["small"])) == ["small"]


def test_a_load_may_ask_for_less_memory_than_the_daemon_allows(
    start_daemon: StartDaemon, checkpoint: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    path, tensors = checkpoint
    daemon = start_daemon("--memory-limit", "64MiB", "--no-populate")
    for limit in (0, "10MiB"):
        with daemon.client().load(path, memory_limit=limit) as load:
            same(load, tensors)
    assert daemon.status()["staging"]["peak_bytes"] <= 10 * MIB
    with daemon.client().load(path, memory_limit="1GiB") as load:
        same(load, tensors)
    assert daemon.status()["staging"]["peak_bytes"] <= 64 * MIB


def test_an_embedded_daemon_lives_as_long_as_its_client(
    checkpoint: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, tensors = checkpoint
    with StreamerClient.embedded(memory_limit="8MiB") as client:
        same(client.load_state_dict(path).items(), tensors)
        pid = client.status()["pid"]
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()
