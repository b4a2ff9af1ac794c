"""`az://container/key` in the account that penstockd is configured for, and
`abfss://container@account.dfs.core.windows.net/key` in any account. Pure.

Both are read from the blob endpoint, whether or not the account has a hierarchical namespace.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from ...errors import InvalidRequestError
from ..objects.keys import check_key

SHORT, LONG = "az://", "abfss://"
SUFFIXES = ("core.windows.net", "core.chinacloudapi.cn", "core.usgovcloudapi.net", "storage.azure.net")
"""Microsoft's domains. Credentials go only to these and to a configured one."""
_CONTAINER = re.compile(r"\$(?:root|web|logs)|[a-z0-9](?:[a-z0-9-]{0,62})", re.ASCII)
_HOST = re.compile(r"[a-z0-9]{3,24}(?:\.z[0-9]{1,3})?\.dfs\.([a-z0-9.-]{1,200})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Location:
    """A container, a blob, or all keys that begin with a prefix."""

    container: str
    key: str
    host: str = ""
    """The host of an account that the URI names; empty for the configured account."""

    @property
    def uri(self) -> str:
        return f"{self.root}{self.key}"

    @property
    def root(self) -> str:
        return f"{LONG}{self.container}@{self.host}/" if self.host else f"{SHORT}{self.container}/"


def parse(uri: str, suffixes: Collection[str] = SUFFIXES) -> Location:
    """`suffixes` are the domains in which an account may be. Raises InvalidRequestError."""
    if uri.startswith(LONG):
        place, _, key = uri.removeprefix(LONG).partition("/")
        container, _, host = place.partition("@")
        match = _HOST.fullmatch(host)
        if match is None or match[1] not in suffixes or not _CONTAINER.fullmatch(container):
            raise InvalidRequestError(
                f"sources: {uri[:200]!r} is not of the form "
                "abfss://container@account.dfs.core.windows.net/key; write it so, and name a domain that is "
                "not Microsoft's in AZURE_STORAGE_ENDPOINT_SUFFIX where penstockd runs"
            )
        check_key(uri, key, "Azure")
        return Location(container, key, host)
    container, _, key = uri.removeprefix(SHORT).partition("/")
    if not uri.startswith(SHORT) or not _CONTAINER.fullmatch(container):
        raise InvalidRequestError(
            f"sources: {uri[:200]!r} is not of the form az://container/key; write it so"
        )
    check_key(uri, key, "Azure")
    return Location(container, key)
