"""Lists of names that do not fit into one message: new and old clients, new and old daemons."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from penstock.client import errors
from penstock.v1 import streamer_pb2 as pb

from ..support import DaemonProcess, RawLoad

COUNT = 30_000


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30,000 tensors of one byte, whose names have 3.3 MB together."""
    path = tmp_path_factory.mktemp("many") / "many.safetensors"
    entries = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [number, number + 1]}
        for number, name in enumerate(names())
    }
    header = json.dumps(entries).encode()
    data = bytes(number % 251 for number in range(COUNT))
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def names() -> list[str]:
    return [f"model.layers.{number:06d}." + "w" * 90 for number in range(COUNT)]


SELECTIONS: dict[str, Any] = {
    "a list": names()[::-1],
    "a predicate": lambda name: True,
}


@pytest.mark.parametrize("kind", SELECTIONS)
def test_a_selection_of_several_megabytes_is_loaded_whole(
    kind: str, daemon: DaemonProcess, many: Path
) -> None:
    with daemon.client() as client, client.load(many, tensors=SELECTIONS[kind]) as load:
        found = {name: int(tensor[0]) for name, tensor in load}
    assert found == {name: number % 251 for number, name in enumerate(names())}


def test_an_unknown_name_in_a_later_part_is_found(daemon: DaemonProcess, many: Path) -> None:
    with daemon.client() as client, pytest.raises(errors.TensorNotFoundError, match="no such name"):
        client.load(many, tensors=[*names(), "no such name"])


def test_an_older_client_is_told_to_be_updated(daemon: DaemonProcess, many: Path) -> None:
    """It sends all names at once."""
    selection = pb.SelectTensors(names=names())
    with RawLoad(daemon, many, tensors=selection) as load, pytest.raises(grpc.RpcError) as caught:
        load.next("manifest")
    assert "update penstock" in str(caught.value)
    with RawLoad(daemon, many, tensors=pb.SelectTensors(names=names()[:5000])) as load:
        assert load.next("manifest").tensor_count == 5000


def test_a_list_in_parts_that_breaks_off_is_refused(daemon: DaemonProcess, many: Path) -> None:
    selection = pb.SelectTensors(names=names()[:10], more=True)
    with RawLoad(daemon, many, tensors=selection) as load:
        load.release(1)
        with pytest.raises(grpc.RpcError) as caught:
            load.next("manifest")
    assert "SelectTensors" in str(caught.value)


def test_a_prefetch_takes_names_in_parts(daemon: DaemonProcess, many: Path) -> None:
    from penstock.client.ring.rpc import Session

    first = pb.PrefetchRequest(sources=[str(many)], tensors=pb.SelectTensors(names=names()[:3], more=True))
    second = pb.PrefetchRequest(tensors=pb.SelectTensors(names=names()[3:7]))
    with Session(daemon.socket_dir) as session:
        calls: Callable[..., Any] = session.service.Prefetch
        answers = list(calls(iter([first, second]), metadata=session.metadata))
    assert answers[-1].done
    assert answers[-1].total_bytes == 7
