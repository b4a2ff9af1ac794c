"""The client for code that names no daemon: the node's daemon where there is one, else a private one.

    $PENSTOCK_SOCKET_DIR is set      the daemon there, and an error where none answers: a private daemon in
                                     every process would read, and hold, everything once for each
    one answers in /run/penstock     that one
    neither                          a private daemon, one for each process, until the process ends

Which one it is is logged once.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..client import DEFAULT_SOCKET_DIR, StreamerClient
from ..embedded import accepts
from ..ring.handoff import socket_path

_log = logging.getLogger("penstock.client")
_lock = threading.Lock()
# By process, as a forked child must not use its parent's daemon, and by credentials.
_private: dict[tuple[int, S3Credentials | None], StreamerClient] = {}
_told: set[str] = set()


@dataclass(frozen=True)
class S3Credentials:
    """Where and as whom to read objects; what is None is left to boto3's own search."""

    access_key_id: str | None = None
    secret_access_key: str | None = None
    session_token: str | None = None
    region_name: str | None = None
    endpoint: str | None = None

    @classmethod
    def of(cls, given: Any) -> S3Credentials | None:
        """From one of these or of runai_model_streamer's; None when nothing is given."""
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
        """What is given counts for S3 alone."""
        return cls.of(given) if source.startswith("s3://") else None

    def __repr__(self) -> str:
        return f"<S3Credentials of {self.access_key_id or 'the environment'}>"

    def environment(self) -> dict[str, str | None]:
        """What to set in a process that shall use them; None is to be removed."""
        wanted: dict[str, str | None] = {}
        if self.access_key_id is not None or self.secret_access_key is not None:
            wanted.update(
                AWS_ACCESS_KEY_ID=self.access_key_id,
                AWS_SECRET_ACCESS_KEY=self.secret_access_key,
                # Those of another identity would be taken with these keys.
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
    """The client to use; not to be closed. Starts a private daemon if there has to be one.

    Raises ValueError for credentials where a daemon runs that is not private: it reads with its own, and
    whoever may use it would get to see what these credentials open.
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
    """Whether nobody else uses the client's daemon."""
    return client in _private.values()


def _tell(what: str) -> None:
    if what not in _told:
        _told.add(what)
        _log.info("%s", what)
