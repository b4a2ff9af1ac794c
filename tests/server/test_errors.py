"""One tree here, one at the client: every error of the daemon has a class of its own there."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from penstock.client import errors as client_errors
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
def test_every_error_has_a_grpc_status_and_a_class_at_the_client(error: type[PenstockError]) -> None:
    assert grpc.StatusCode[error.status] is not grpc.StatusCode.OK
    told = client_errors.by_reason(error.reason, "what went wrong", details={"file": "f"})
    assert type(told) is not client_errors.PenstockError
    assert type(told).__name__ == error.__name__
    assert (told.reason, str(told), told.details) == (error.reason, "what went wrong", {"file": "f"})


def test_no_two_errors_become_the_same_class_at_the_client() -> None:
    assert len({type(client_errors.by_reason(error.reason, "")) for error in ALL}) == len(ALL)


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
