"""Whom TLS trusts where a store's library does not say."""

from __future__ import annotations

import os
import ssl

from ...errors import SourceUnavailableError

_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""Which the libraries that fetch tokens read, too."""


def tls_context(store: str) -> ssl.SSLContext:
    """By REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE, a file or a directory; else by what the system trusts, which
    SSL_CERT_FILE and SSL_CERT_DIR replace; else by certifi. Raises SourceUnavailableError."""
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
    """A bundle of authorities, where the system has none: small images do not."""
    paths = ssl.get_default_verify_paths()
    if paths.cafile is not None or paths.capath is not None:
        return None
    try:
        import certifi
    except ImportError:
        return None
    return certifi.where()
