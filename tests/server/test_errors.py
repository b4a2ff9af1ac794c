"""The daemon's tree of errors: reasons, statuses, and what is worth a retry.

`tests/client/test_errors.py` compares the client's tree with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from penstock.server import errors
from penstock.server.errors import PenstockError


def subclasses(root: type[PenstockError]) -> Iterator[type[PenstockError]]:
    for one in root.__subclasses__():
        yield one
        yield from subclasses(one)


ALL = [one for one in subclasses(PenstockError) if one.__module__ == errors.__name__]


def test_the_tree_is_the_designs() -> None:
    assert {one.reason for one in ALL} == {
        "CHECKPOINT_NOT_FOUND",
        "CHECKPOINT_INVALID",
        "CHECKPOINT_CHANGED",
        "CHECKPOINT_CORRUPT",
        "TENSOR_NOT_FOUND",
        "ACCESS_DENIED",
        "MEMORY_LIMIT_TOO_SMALL",
        "STAGING_EXHAUSTED",
        "SOURCE_UNAVAILABLE",
        "SESSION_REQUIRED",
        "TOO_MANY_LOADS",
        "SHUTTING_DOWN",
        "INVALID_REQUEST",
    }
    assert len({one.reason for one in ALL}) == len(ALL)


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_every_error_has_a_grpc_status(error: type[PenstockError]) -> None:
    assert grpc.StatusCode[error.status] is not grpc.StatusCode.OK


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_only_what_may_pass_by_itself_is_worth_a_retry(error: type[PenstockError]) -> None:
    temporary = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED"}
    assert error.retryable == (error.status in temporary)


def test_details_are_short_strings() -> None:
    error = errors.CheckpointInvalidError("message", tensor="x" * 1000, tensor_bytes=5)
    assert error.details == {"tensor": "x" * 200, "tensor_bytes": "5"}
    assert str(error) == error.message == "message"


def test_a_config_error_is_not_told_to_clients() -> None:
    assert not issubclass(errors.ConfigError, PenstockError)
