from __future__ import annotations

import inspect

import grpc
import pytest

from penstock.client import StreamerClient, errors
from penstock.server import errors as server_errors

from .conftest import StartDaemon

SERVER_ERRORS = [
    value
    for _, value in inspect.getmembers(server_errors, inspect.isclass)
    if issubclass(value, server_errors.PenstockError) and value is not server_errors.PenstockError
]
REASONS = [error.reason for error in SERVER_ERRORS]


def test_the_daemon_has_errors_to_compare_with() -> None:
    assert "CHECKPOINT_CHANGED" in REASONS
    assert len(REASONS) > 10


@pytest.mark.parametrize("server_error", SERVER_ERRORS, ids=lambda error: error.reason)
def test_every_error_of_the_daemon_has_an_exception_of_its_own(
    server_error: type[server_errors.PenstockError],
) -> None:
    reason = server_error.reason
    error = errors.by_reason(reason, "what happened", details={"load_id": "L1", "file": "f"})
    assert type(error) is not errors.PenstockError
    assert type(error).__name__ == server_error.__name__
    assert type(error).__name__ == "".join(word.capitalize() for word in reason.split("_")) + "Error"
    assert (error.reason, str(error), error.load_id) == (reason, "what happened (load L1)", "L1")
    assert error.details["file"] == "f"
    assert str(errors.by_reason(reason, "what happened")) == "what happened"
    # What is met by connecting again is known by its class: no other error may have that class.
    assert isinstance(error, errors.DaemonUnavailableError) == (reason == "SHUTTING_DOWN")


def test_an_unknown_reason_is_kept_in_the_base_class() -> None:
    error = errors.by_reason("NEW_IN_2031", "", load_id="L2")
    assert type(error) is errors.PenstockError
    assert (error.reason, str(error), error.load_id) == ("NEW_IN_2031", "NEW_IN_2031 (load L2)", "L2")


@pytest.mark.parametrize("reason", [*REASONS, "NEW_IN_2031"])
def test_reasons_come_through_grpc(reason: str, start_daemon: StartDaemon) -> None:
    daemon = start_daemon([], refuse_load=(grpc.StatusCode.UNAVAILABLE, reason, "it says so"))
    with (
        StreamerClient(daemon.socket_dir) as client,
        pytest.raises(errors.PenstockError, match="it says so") as caught,
    ):
        client.load("/x")
    assert type(caught.value) is type(errors.by_reason(reason, ""))
    assert (caught.value.reason, caught.value.load_id) == (reason, "load-9")
    daemon.await_leases_closed()


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.DaemonUnavailableError),
        (grpc.StatusCode.UNIMPLEMENTED, errors.ProtocolError),
        (grpc.StatusCode.INTERNAL, errors.PenstockError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DaemonUnavailableError),
    ],
)
def test_a_status_without_a_reason_is_told_by_its_name(
    status: grpc.StatusCode, error: type[errors.PenstockError], start_daemon: StartDaemon
) -> None:
    daemon = start_daemon([], refuse_load=(status, "", "plain words"))
    with pytest.raises(errors.PenstockError, match="plain words") as caught:
        StreamerClient(daemon.socket_dir, reconnect_timeout=0).load("/x")
    assert type(caught.value) is error
    assert caught.value.reason == ""


def test_versions_are_told_when_the_two_do_not_understand_each_other(start_daemon: StartDaemon) -> None:
    daemon = start_daemon([], refuse_load=(grpc.StatusCode.UNIMPLEMENTED, "", "Method not found!"))
    with pytest.raises(errors.ProtocolError, match=r"daemon fake, client \d.*upgrade the older"):
        StreamerClient(daemon.socket_dir).load("/x")
