"""The client for code that names no daemon: the node's daemon where there is one, else a private one.

    $PENSTOCK_SOCKET_DIR is set      the daemon there, and an error if none answers: with private daemons
                                     instead, every process would read, and hold, everything once
    one answers in /run/penstock     that one
    neither                          a private daemon, one for each process, until the process ends

The log says once which one it is.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..client import StreamerClient
from ..embedded import accepts
from ..ring.socket_dir import DEFAULT_SOCKET_DIR, socket_path

_log = logging.getLogger("penstock.client")
_lock = threading.Lock()
# By process, as a forked child must not use its parent's daemon, and by credentials.
_private: dict[tuple[int, S3Credentials | None], StreamerClient] = {}
_told: set[str] = set()


@dataclass(frozen=True)
class S3Credentials:
    """The endpoint and the credentials for S3. boto3's own search finds the values that are None."""

    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None
    region_name: str | None = None
    endpoint: str | None = None

    @classmethod
    def of(cls, given: Any) -> S3Credentials | None:
        """From such an object or one of runai_model_streamer's; None if nothing is given."""
        if given is None:
            return None
        credentials = cls(
            given.access_key_id,
            given.secret_access_key,
            given.session_token,
            given.region_name,
            given.endpoint,
        )
        return None if credentials == cls() else credentials

    @classmethod
    def for_source(cls, source: str, given: Any) -> S3Credentials | None:
        """The given credentials for s3:// sources, None for any other source."""
        return cls.of(given) if source.startswith("s3://") else None

    def __repr__(self) -> str:
        return f"<S3Credentials of {self.access_key_id or 'the environment'}>"

    def environment(self) -> dict[str, str | None]:
        """Variables to set in a process that uses them. None means to remove the variable."""
        wanted: dict[str, str | None] = {}
        if self.access_key_id is not None or self.secret_access_key is not None:
            wanted.update(
                AWS_ACCESS_KEY_ID=self.access_key_id,
                AWS_SECRET_ACCESS_KEY=self.secret_access_key,
                # Otherwise variables of another identity would be combined with these keys.
                AWS_SESSION_TOKEN=None,
                AWS_PROFILE=None,
            )
        if self.session_token is not None:
            wanted["AWS_SESSION_TOKEN"] = self.session_token
        if self.region_name is not None:
            wanted.update(AWS_REGION=self.region_name, AWS_DEFAULT_REGION=self.region_name)
        if self.endpoint is not None:
            wanted.update(AWS_ENDPOINT_URL=self.endpoint, AWS_ENDPOINT_URL_S3=None)
        return wanted


def ambient_client(credentials: S3Credentials | None = None) -> StreamerClient:
    """The client to use, which must not be closed. Starts a private daemon if necessary.

    Raises ValueError for credentials if the daemon is not private: it reads with its own, and all its users
    would see what these credentials give access to.
    """
    named = os.environ.get("PENSTOCK_SOCKET_DIR")
    if named or accepts(socket_path(Path(DEFAULT_SOCKET_DIR), "handoff.sock")):
        client = StreamerClient()
        if credentials is not None:
            raise ValueError(
                f"s3_credentials cannot be given to the penstock daemon in {client.socket_dir}, which reads "
                "with its own and shares what it read: set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and so "
                "on (or a role) where penstockd runs, and pass None here"
            )
        _tell(f"loads go through the penstock daemon in {client.socket_dir}")
        return client
    key = (os.getpid(), credentials)
    with _lock:
        if key not in _private:
            environment = None if credentials is None else credentials.environment()
            _private[key] = StreamerClient.embedded(environment=environment)
            _tell(
                f"PENSTOCK_SOCKET_DIR is not set and no daemon answers in {DEFAULT_SOCKET_DIR}: this process "
                "has started a private penstock daemon, which shares nothing with other processes"
            )
        return _private[key]


def is_private(client: StreamerClient) -> bool:
    """Whether only this process uses the client's daemon."""
    return client in _private.values()


def _tell(what: str) -> None:
    if what not in _told:
        _told.add(what)
        _log.info("%s", what)
