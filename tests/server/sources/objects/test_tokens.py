"""Tokens are renewed before they end, and as rarely as that allows."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from penstock.server.errors import AccessDeniedError
from penstock.server.sources.objects import tokens as tokens_module
from penstock.server.sources.objects.faults import Transient
from penstock.server.sources.objects.tokens import Token, Tokens


class Issuer:
    """Gives tokens that end after so many seconds each."""

    def __init__(self, *lives: float) -> None:
        self.lives = list(lives)
        self.given = 0
        self.error: Exception | None = None

    def __call__(self) -> Token:
        if self.error is not None:
            raise self.error
        life = self.lives[min(self.given, len(self.lives) - 1)]
        self.given += 1
        return Token(f"t{self.given}", time.time() + life)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Renewals may follow each other."""
    monkeypatch.setattr(tokens_module, "LEAST_SECONDS", 0.0)


def test_a_token_is_fetched_once_for_as_long_as_it_lives() -> None:
    issuer = Issuer(3600)
    tokens = Tokens(issuer)
    with ThreadPoolExecutor(8) as threads:
        assert {token.result(60) for token in [threads.submit(tokens.get) for _ in range(50)]} == {"t1"}
    assert issuer.given == 1


def test_one_without_an_end_is_kept() -> None:
    issuer = Issuer(math.inf)
    tokens = Tokens(issuer)
    assert (tokens.get(), tokens.get()) == ("t1", "t1")


@pytest.mark.parametrize("left", [1.0, 5.0, -10.0])
def test_one_that_has_ended_or_is_about_to_is_not_used(left: float, at_once: None) -> None:
    tokens = Tokens(Issuer(left, 3600))
    tokens.get()
    assert tokens.get() == "t2"


@pytest.mark.usefixtures("at_once")
def test_one_that_ends_soon_is_renewed_by_one_thread_and_holds_up_no_other() -> None:
    fetching, go_on = threading.Event(), threading.Event()
    issued = iter([Token("old", time.time() + 100), Token("new", time.time() + 3600)])

    def fetch() -> Token:
        token = next(issued)
        if token.text == "new":
            fetching.set()
            assert go_on.wait(60)
        return token

    tokens = Tokens(fetch)
    with tokens._lock:
        tokens._renew()
    with ThreadPoolExecutor(1) as thread:
        renewing = thread.submit(tokens.get)
        assert fetching.wait(60)
        assert tokens.get() == "old"
        go_on.set()
        assert renewing.result(60) == "new"
    assert tokens.get() == "new"


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("error", [Transient("connection", "down"), AccessDeniedError("no more; ask again")])
def test_a_renewal_that_fails_costs_nothing_while_the_token_is_good(error: Exception) -> None:
    issuer = Issuer(100)
    tokens = Tokens(issuer)
    tokens.get()
    issuer.error = error
    assert tokens.get() == "t1"


def test_without_a_good_token_the_failure_is_the_caller_s() -> None:
    issuer = Issuer(3600)
    issuer.error = Transient("connection", "down")
    tokens = Tokens(issuer)
    with pytest.raises(Transient):
        tokens.get()
    issuer.error = None
    assert tokens.get() == "t1"


def test_one_that_is_refused_is_renewed_once_for_all_who_had_it(monkeypatch: pytest.MonkeyPatch) -> None:
    issuer = Issuer(3600)
    tokens = Tokens(issuer)
    old = tokens.get()
    assert not tokens.renewed(old), "a moment after it came"
    monkeypatch.setattr(tokens_module, "LEAST_SECONDS", 0.0)
    assert tokens.renewed(old)
    assert tokens.renewed(old), "another thread's is new too"
    assert issuer.given == 2


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(Token("secret", 1.0))
