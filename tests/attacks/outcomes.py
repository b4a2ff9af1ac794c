"""Loads of one user, one after the other, and how each of them ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from penstock.client import StreamerClient, errors

from ..e2e.programs import digests, say
from ..e2e.support import Checkpoint, Nursery, expected
from .support import TargetDaemon


class Outcome(NamedTuple):
    error: str
    """The name of the class; empty for none."""
    message: str
    found: list[list[str]]
    """Names and digests of the tensors, sorted."""


def load_often(socket_dir: str, source: str, count: int, **options: Any) -> None:
    """Says of each load what it got, or the error that ended it."""
    outcomes = []
    client = StreamerClient(socket_dir)
    for _ in range(count):
        try:
            found = digests(client.load_state_dict(source, **options).items())
            outcomes.append(Outcome("", "", sorted(map(list, found))))
        except errors.PenstockError as error:
            outcomes.append(Outcome(type(error).__name__, str(error), []))
    say("loaded", outcomes=outcomes)


def outcomes_of(
    attackers: Nursery, daemon: TargetDaemon, uid: int | None, source: Path, count: int = 1
) -> list[Outcome]:
    """`uid` None: root."""
    client = attackers.start(load_often, uid=uid, socket_dir=daemon.socket_dir, source=source, count=count)
    return [Outcome(*one) for one in client.hear("loaded")["outcomes"]]


def right(checkpoint: Checkpoint) -> list[list[str]]:
    """`Outcome.found` of a load that got all of it."""
    return sorted(map(list, expected(checkpoint[1])))


def assert_loads(attackers: Nursery, daemon: TargetDaemon, uid: int, checkpoint: Checkpoint) -> None:
    """That user gets the checkpoint's bytes."""
    (one,) = outcomes_of(attackers, daemon, uid, checkpoint[0])
    assert one == ("", "", right(checkpoint))
