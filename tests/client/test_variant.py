"""`variant=` reaches the daemon from wherever it may be said, and no daemon can pass over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.client import ProtocolError, StreamerClient
from penstock.client.cli import commands as cli

from .conftest import StartDaemon
from .fake_daemon import random_tensors

TENSORS = random_tensors(6, 400)


LOADS: dict[str, Callable[[StreamerClient, Any], object]] = {
    "load": lambda client, variant: client.load("/x", variant=variant).close(),
    "load_state_dict": lambda client, variant: client.load_state_dict("/x", variant=variant),
    "load_into": lambda client, variant: client.load_into(
        torch.nn.Module(), "/x", variant=variant, strict=False
    ),
}


@pytest.mark.parametrize("call", LOADS.values(), ids=LOADS)
def test_a_load_asks_for_its_variant(
    call: Callable[[StreamerClient, Any], object], start_daemon: StartDaemon
) -> None:
    daemon = start_daemon(TENSORS)
    client = StreamerClient(daemon.socket_dir)
    call(client, "fp16")
    call(client, None)
    assert [request.variant for request in daemon.opens] == ["fp16", ""]


def test_a_prefetch_asks_for_its_variant(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS)
    client = StreamerClient(daemon.socket_dir)
    client.prefetch("/x", variant="bf16")
    client.prefetch("/x")
    assert [request.variant for request in daemon.prefetches] == ["bf16", ""]


def test_the_command_line_has_it(start_daemon: StartDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon = start_daemon(TENSORS)
    where = ["--socket-dir", str(daemon.socket_dir), "--no-progress", "--variant", "fp16"]
    assert cli.main(["load", "/x", *where]) == 0
    assert cli.main(["prefetch", "/x", *where]) == 0
    assert (daemon.opens[0].variant, daemon.prefetches[0].variant) == ("fp16", "fp16")


def test_the_rest_of_a_load_is_of_the_same_variant(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, die_after=[1])
    assert len(list(StreamerClient(daemon.socket_dir).load("/x", variant="fp16"))) == len(TENSORS)
    assert [request.variant for request in daemon.opens] == ["fp16", "fp16"]


def test_a_daemon_that_knows_no_variants_is_not_believed(start_daemon: StartDaemon) -> None:
    """It would load the default one."""
    daemon = start_daemon(TENSORS, tamper_manifest=lambda manifest: manifest.ClearField("variant"))
    client = StreamerClient(daemon.socket_dir)
    with pytest.raises(ProtocolError, match=r"does not know variants.*'fp16'.*upgrade the daemon"):
        client.load("/x", variant="fp16")
    daemon.await_leases_closed()
    assert len(client.load_state_dict("/x")) == len(TENSORS)


@pytest.mark.parametrize("variant", ["", 16, b"fp16", Path("fp16")], ids=repr)
def test_what_is_no_name_of_a_variant_is_refused(variant: object, tmp_path: Path) -> None:
    client = StreamerClient(tmp_path)
    for call in (client.load, client.prefetch):
        with pytest.raises(TypeError, match=r"^variant=.*is no name of a variant: give one"):
            call("/x", variant=variant)  # type: ignore[arg-type]
