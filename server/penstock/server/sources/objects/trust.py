"""The authorities that TLS trusts, for stores whose library does not decide that."""

from __future__ import annotations

import importlib.util
import os
import ssl
from collections.abc import Iterator

from ...errors import SourceUnavailableError

_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""The libraries that fetch tokens read these variables too."""


def tls_context(store: str) -> ssl.SSLContext:
    """Trusts the authorities in REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE, a file or a directory. Without these it
    trusts the system's, which SSL_CERT_FILE and SSL_CERT_DIR replace, and if there are none, certifi's.
    Raises SourceUnavailableError."""
    variable = next((name for name in _VARIABLES if os.environ.get(name)), "")
    path = os.environ[variable] if variable else None
    try:
        if path and os.path.isdir(path):
            context = ssl.create_default_context(capath=path)
        else:
            context = ssl.create_default_context(cafile=path or _without_the_system_s())
    except (OSError, ssl.SSLError) as error:
        raise SourceUnavailableError(
            f"{store}: the CA bundle {path} cannot be used: {error}; check {variable or 'SSL_CERT_FILE'}"
        ) from error
    context.set_alpn_protocols(["http/1.1"])
    return context


def _without_the_system_s() -> str | None:
    """A bundle of authorities, if the system has none, as in small images."""
    system = ssl.get_default_verify_paths()
    if system.cafile or (system.capath and any(os.scandir(system.capath))):
        return None
    return next(filter(os.path.exists, _bundles()), None)


def _bundles() -> Iterator[str]:
    """Bundles in installed packages, which this does not import."""
    for package in ("certifi", "botocore"):
        found = importlib.util.find_spec(package)
        for place in found.submodule_search_locations or () if found else ():
            yield os.path.join(place, "cacert.pem")
