"""How certificates of web servers are verified."""

from __future__ import annotations

import importlib.util
import os
import ssl

from ...errors import SourceUnavailableError

_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def verifying(what: str) -> ssl.SSLContext:
    """By the bundle that REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE names; else by the system's (SSL_CERT_FILE and
    SSL_CERT_DIR count), and where that has none, as in small images, by the bundle that botocore brings.
    Raises SourceUnavailableError for a bundle that cannot be used; `what` is who needs it."""
    variable = next((name for name in _VARIABLES if os.environ.get(name)), "")
    path = os.environ[variable] if variable else _fallback()
    try:
        if path is not None and os.path.isdir(path):
            context = ssl.create_default_context(capath=path)
        else:
            context = ssl.create_default_context(cafile=path)
    except (OSError, ssl.SSLError) as error:
        raise SourceUnavailableError(
            f"{what}: the CA bundle {path} cannot be used: {error}; check {variable or 'the installation'}"
        ) from error
    context.set_alpn_protocols(["http/1.1"])
    return context


def _fallback() -> str | None:
    """A bundle to take instead of the system's; None where the system has one."""
    system = ssl.get_default_verify_paths()
    if system.cafile or (system.capath and any(os.scandir(system.capath))):
        return None
    botocore = importlib.util.find_spec("botocore")  # which is not imported by this
    places = list(botocore.submodule_search_locations or ()) if botocore else []
    bundles = [bundle for place in places if os.path.exists(bundle := os.path.join(place, "cacert.pem"))]
    return bundles[0] if bundles else None
