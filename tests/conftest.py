"""Fixtures shared by all tests."""

import os
import shutil
from collections.abc import Callable

import pytest

# Daemons of tests run side by side: each takes a port of its own.
os.environ.setdefault("PENSTOCK_HTTP_ADDRESS", "127.0.0.1:0")


@pytest.fixture(scope="session")
def require_tool() -> Callable[[str], str]:
    """A function that returns the path of a system program that a test needs.

    Where it is not installed the test is skipped, but fails when `CI` is set: CI installs what the tests
    need (`.ci/run`), so a test that could not run there did not pass.
    """

    def require(name: str) -> str:
        path = shutil.which(name)
        if path is not None:
            return path
        reason = f"the program {name!r} is not installed"
        if os.environ.get("CI"):
            pytest.fail(f"{reason}; add its package to .ci/run")
        pytest.skip(reason)

    return require
