"""Clients go to other processes as what they are: a directory and options."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch

from penstock.client import DaemonUnavailableError, StreamerClient

from .conftest import StartDaemon
from .fake_daemon import random_tensors
from .samples import TENSORS, assert_equal


def test_a_client_in_use_is_pickled_as_a_new_one(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS)
    client = StreamerClient(daemon.socket_dir, reconnect_timeout=7.5)
    iterator = iter(client.load("/x"))
    kept = next(iterator)
    for other in (pickle.loads(pickle.dumps(client)), copy.copy(client), copy.deepcopy(client)):
        assert other is not client
        assert (other.socket_dir, other._calls.reconnect_timeout) == (client.socket_dir, 7.5)
        assert_equal(other.load_state_dict("/x"))
        other.close()
    assert_equal(dict([kept, *iterator]))


def test_the_path_goes_along_and_not_its_origin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", str(tmp_path / "here"))
    pickled = pickle.dumps(StreamerClient())
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", str(tmp_path / "there"))
    assert pickle.loads(pickled).socket_dir == tmp_path / "here"


def test_a_copy_of_a_client_with_a_private_daemon_does_not_end_it() -> None:
    with StreamerClient.embedded("32MiB") as client:
        copied = pickle.loads(pickle.dumps(client))
        pid = copied.status()["pid"]
        copied.close()
        del copied
        assert client.status()["pid"] == pid
        another = pickle.loads(pickle.dumps(client))
    with pytest.raises(DaemonUnavailableError):
        another.status()


def sum_of(client: StreamerClient) -> float:
    return sum(tensor.view(torch.uint8).sum().item() for tensor in client.load_state_dict("/x").values())


def test_a_spawned_process_loads_by_the_client_that_it_is_given(start_daemon: StartDaemon) -> None:
    client = StreamerClient(start_daemon(random_tensors(3, 100)).socket_dir)
    here = sum_of(client)
    with client.load("/x"), multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(sum_of, (client,)) == here


def test_a_load_is_not_pickled_and_says_what_to_send(start_daemon: StartDaemon) -> None:
    load = StreamerClient(start_daemon(TENSORS).socket_dir).load("/x")
    with pytest.raises(TypeError, match=r"load load-1 cannot be pickled.*: send the client and the source"):
        pickle.dumps(load)
    load.close()
