from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest

from ..e2e.conftest import nursery, nursery_process, socket_dir, start_daemon
from ..e2e.support import DaemonProcess, running_daemon
from .moto import MotoServer
from .proxy import FaultProxy
from .support import FLAGS, IMPATIENT, Bucket, assert_no_secret, environment

__all__ = ["nursery", "nursery_process", "socket_dir", "start_daemon"]

_numbers = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def no_credentials() -> Iterator[None]:
    """Nothing in this process, hence in clients and daemons, knows credentials or an endpoint of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("AWS_") or name.lower() in ("http_proxy", "https_proxy", "no_proxy"):
                patch.delenv(name)
        # No file of the developer's, and no question to an instance's metadata.
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


@pytest.fixture(scope="session")
def moto(no_credentials: None) -> Iterator[MotoServer]:
    server = MotoServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def session_proxy(moto: MotoServer) -> Iterator[FaultProxy]:
    proxy = FaultProxy(moto.port)
    yield proxy
    proxy.close()


@pytest.fixture
def proxy(session_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """Before moto; every test has its own rules and sees its own requests."""
    session_proxy.reset()
    yield session_proxy
    session_proxy.reset()


@pytest.fixture
def bucket(moto: MotoServer) -> Bucket:
    """A new one."""
    return Bucket(moto, f"penstock-{next(_numbers)}")


@pytest.fixture(scope="session")
def session_daemon(session_proxy: FaultProxy) -> Iterator[DaemonProcess]:
    with running_daemon(*FLAGS, environment=environment(session_proxy.endpoint)) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def impatient_daemon(session_proxy: FaultProxy) -> Iterator[DaemonProcess]:
    with running_daemon(*FLAGS, *IMPATIENT, environment=environment(session_proxy.endpoint)) as daemon:
        yield daemon


@pytest.fixture
def daemon(request: pytest.FixtureRequest, proxy: FaultProxy) -> Iterator[DaemonProcess]:
    """One for most tests, behind the proxy, and another for faults called `stalled`. After each test it has
    to be idle and to have told no secret."""
    stalls = "stalled" in request.node.name
    daemon: DaemonProcess = request.getfixturevalue("impatient_daemon" if stalls else "session_daemon")
    yield daemon
    proxy.reset()
    daemon.wait_idle()
    daemon.assert_log_clean()
    assert_no_secret(daemon.log(), str(daemon.status()))
