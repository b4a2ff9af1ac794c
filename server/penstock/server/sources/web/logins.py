"""Users and passwords for web servers, from the netrc file that NETRC names, else from ~/.netrc.

Only entries of a `machine` count. The `default` entry would send a password to any host that a caller names.
A login goes to its own host and to nobody else.
"""

from __future__ import annotations

import base64
import netrc
import os
import threading
from pathlib import Path

from ...errors import SourceUnavailableError


class Logins:
    """Thread-safe. Reads the file again when it has changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: object = None
        self._hosts: dict[str, str] = {}

    def header(self, host: str) -> dict[str, str]:
        """The header that logs in at the host; empty if there is no login for it. Raises
        SourceUnavailableError for a file that cannot be used."""
        path = Path(os.environ.get("NETRC") or os.path.expanduser("~/.netrc"))
        with self._lock:
            try:
                status = path.stat()
                state = path, status.st_mtime_ns, status.st_size, status.st_ino
                if state != self._state:
                    self._hosts, self._state = _read(path), state
            except FileNotFoundError:
                self._hosts, self._state = {}, None
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
                raise _unusable(path, str(reason)) from None
            except netrc.NetrcParseError as error:  # its text quotes the file
                raise _unusable(path, f"line {error.lineno} is malformed") from None
            login = self._hosts.get(host)
        return {} if login is None else {"Authorization": login}


def _read(path: Path) -> dict[str, str]:
    found = netrc.netrc(str(path)).hosts
    return {
        host: f"Basic {base64.b64encode(f'{user}:{password or str()}'.encode()).decode()}"
        for host, (user, _, password) in found.items()
        if host != "default"
    }


def _unusable(path: Path, reason: str) -> SourceUnavailableError:
    return SourceUnavailableError(
        f"the netrc file {path}, which has penstockd's logins for web servers, cannot be used: {reason}; "
        "correct it, or name another by NETRC"
    )
