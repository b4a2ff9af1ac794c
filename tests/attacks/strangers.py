"""Strangers who attack: users without rights, whose processes play one attack after another for some time.
The daemon may refuse them in any orderly way.

An attack is a function of a `Place` that plays one round, in about `ROUND_SECONDS`, and gives back what it
took; a round that the daemon holds up is cut short. To add one, decorate a function with `@attack` in one of
`MODULES`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from penstock.client import errors

from ..e2e.programs import say
from .http2 import Connection
from .support import RawHandoff

MODULES = ("floods", "greed")
ROUND_SECONDS = 1.0
LONGEST_ROUND_SECONDS = 3.0
HUNG_SECONDS = 60.0
"""A round that lasts longer, although it is cut short again and again, is a fault of the attack: its process
ends and says where it was."""
STREAMS_PER_CONNECTION = 15
"""As many as the daemon allows for sure."""
REFUSALS = (OSError, EOFError, grpc.RpcError, errors.PenstockError)
"""What an attacker may meet."""
NICENESS = 10
"""Of attackers: what is tested is how the daemon shares itself, not how the kernel shares the processors."""


@dataclass(frozen=True, slots=True)
class Place:
    """What is attacked, and with which files."""

    socket_dir: Path
    http: tuple[str, int]
    """Host and port."""
    models: Path
    """A directory that everybody may load from; `hostile_files.write` put files there."""
    own: Path
    """A directory that this stranger may write, and everybody may load from."""

    def connect(self, **options: object) -> Connection:
        return Connection(self.socket_dir / "penstock.sock", **options)  # type: ignore[arg-type]

    def connect_http(self) -> socket.socket:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            connection.settimeout(ROUND_SECONDS)
            # Not by `create_connection`, which imports a codec that a stranger may not be able to read.
            connection.connect(self.http)
        except BaseException:
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def session(self) -> Iterator[str]:
        """A handoff connection's token. Raises ConnectionRefusedError where the daemon refuses it."""
        with RawHandoff(self.socket_dir) as handoff:
            first = handoff.receive()
            if first is None or not first.HasField("hello"):
                raise ConnectionRefusedError(first and first.refused.message)
            yield first.hello.token


Attack = Callable[[Place], None]
_ATTACKS: dict[str, Attack] = {}


def attack(function: Attack) -> Attack:
    """Puts an attack into the catalogue."""
    _ATTACKS[function.__name__] = function
    return function


def catalogue() -> dict[str, Attack]:
    """All attacks by name."""
    for module in MODULES:
        importlib.import_module(f".{module}", __package__)
    return _ATTACKS


def assault(socket_dir: str, http: str, models: str, own: str, names: Sequence[str], seconds: float) -> None:
    """The program of one stranger: plays the named attacks in turn for so long, at least one round each, then
    says how often each was played and what refused it."""
    attacks = catalogue()
    os.nice(NICENESS)
    host, _, port = http.rpartition(":")
    until = time.monotonic() + seconds
    place = Place(Path(socket_dir), (host, int(port)), Path(models), Path(own))
    signal.signal(signal.SIGALRM, _cut_short)
    rounds: Counter[str] = Counter()
    refusals: Counter[str] = Counter()
    say("attacks")
    while time.monotonic() < until or len(rounds) < len(names):
        name = names[rounds.total() % len(names)]
        rounds[name] += 1
        try:
            faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True)
            # Again and again: the first may be raised where exceptions are ignored, as in a finalizer.
            signal.setitimer(signal.ITIMER_REAL, LONGEST_ROUND_SECONDS, LONGEST_ROUND_SECONDS)
            try:
                attacks[name](place)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except REFUSALS as error:
            refusals[f"{name}: {_in_short(error)}"] += 1
    faulthandler.cancel_dump_traceback_later()
    say("ended", rounds=rounds, refusals=refusals)


def _cut_short(*_: object) -> None:
    raise TimeoutError("the daemon held the round up")


def _in_short(error: BaseException) -> str:
    if isinstance(error, grpc.Call):
        return f"{error.code()}: {error.details()}"[:200]
    return f"{type(error).__name__}: {error}"[:200]
