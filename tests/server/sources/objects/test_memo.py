"""What was found out once is not found out again while it holds."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from penstock.server.sources.objects.memo import Memo

FOR_EVER = float("inf")


def test_one_thread_finds_out_for_all() -> None:
    memo: Memo[str, int] = Memo(10)
    asked = []
    others = threading.Barrier(4)

    def find_out() -> tuple[int, float]:
        asked.append(threading.get_ident())
        return 7, FOR_EVER

    def get() -> int:
        others.wait(60)
        return memo.get("x", find_out)

    with ThreadPoolExecutor(4) as threads:
        assert [one.result(60) for one in [threads.submit(get) for _ in range(4)]] == [7] * 4
    assert len(asked) == 1


def test_what_no_longer_holds_or_is_forgotten_is_found_out_again() -> None:
    memo: Memo[str, int] = Memo(10)
    values = iter(range(100))
    assert memo.get("x", lambda: (next(values), 0.0)) == 0
    assert memo.get("x", lambda: (next(values), FOR_EVER)) == 1
    assert memo.get("x", lambda: (next(values), FOR_EVER)) == 1
    memo.replace("x", 99, None)  # which it is not
    assert memo.get("x", lambda: (next(values), FOR_EVER)) == 1
    memo.replace("x", 1, 50, FOR_EVER)
    assert memo.get("x", lambda: (next(values), FOR_EVER)) == 50
    memo.forget("x")
    assert memo.get("x", lambda: (next(values), FOR_EVER)) == 2


def test_what_is_remembered_is_bounded() -> None:
    memo: Memo[int, str] = Memo(100, len)

    def fail() -> tuple[str, float]:
        raise OSError

    for number in range(1000):
        memo.get(number, lambda: ("x" * 10, FOR_EVER))
        with pytest.raises(OSError):
            memo.get(-1 - number, fail)
    assert len(memo._slots) == 10
    assert memo.get(999, fail) == "x" * 10
    memo.get(5000, lambda: ("x" * 1000, FOR_EVER))
    assert list(memo._slots) == [5000]
    memo.forget(5000)
    assert (memo._weight, len(memo._slots)) == (0, 0)
