"""google-auth's part: tokens, or why there are none, in words. Imported when first needed.

Errors name variables, flags and kinds of credentials, but neither their values nor texts of answers.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from datetime import timezone
from types import MappingProxyType
from typing import Any

from ...errors import AccessDeniedError, PenstockError, SourceUnavailableError
from ..objects.faults import Transient
from ..objects.tokens import Token

SCOPES = ("https://www.googleapis.com/auth/devstorage.read_only",)
FILE_VARIABLE = "GOOGLE_APPLICATION_CREDENTIALS"
_PROJECT_LOOKUP = "https://cloudresourcemanager."
_CODES = (
    re.compile(r"""["']error["']:\s*["']([a-z_]{3,60})["']"""),
    re.compile(r"""["']status["']:\s*["']([A-Z_]{3,60})["']"""),
    re.compile(r"Error code ([a-z_]{3,60})\b"),
    re.compile(r"Status: ([0-9]{3})\b"),
)

# At the level `debug` these loggers write requests and answers, tokens among them.
for _name in ("google.auth", "urllib3", "requests"):
    logging.getLogger(_name).setLevel(logging.WARNING)
# Warns of each attempt to reach the metadata server. An error reports it when the last one has failed.
logging.getLogger("google.auth.compute_engine").setLevel(logging.ERROR)


class GoogleCredentials:
    """Credentials of a file, or application default credentials. Used by one thread at a time."""

    def __init__(self, file: str, timeout_seconds: float) -> None:
        """Makes no request. Raises SourceUnavailableError if google-auth is missing."""
        try:
            self._request = _transport(timeout_seconds)
        except ImportError as error:
            raise SourceUnavailableError(
                f"GCS: gs:// sources need google-auth and requests ({error}); install penstock[gcs] where "
                "penstockd runs, or set --gcs-anonymous 1 for public buckets"
            ) from error
        self._file = file
        self._credentials: Any = None

    @property
    def quota_project(self) -> str:
        """The project that pays for requests, if the credentials or GOOGLE_CLOUD_QUOTA_PROJECT name one."""
        return getattr(self._credentials, "quota_project_id", None) or ""

    def fetch(self) -> Token:
        """A new token. Raises PenstockError and Transient."""
        with self._told():
            if self._credentials is None:
                self._credentials = self._found()
            self._credentials.refresh(self._request)
            expiry = self._credentials.expiry
        ends = math.inf if expiry is None else expiry.replace(tzinfo=timezone.utc).timestamp()
        return Token(self._credentials.token, ends)

    def _found(self) -> Any:
        import google.auth

        with warnings.catch_warnings():
            # Warnings about user credentials of the command line tools, and about loading a file of any kind.
            warnings.simplefilter("ignore")
            if self._file:
                return google.auth.load_credentials_from_file(
                    self._file,
                    scopes=SCOPES,
                    request=self._request,
                    quota_project_id=os.environ.get("GOOGLE_CLOUD_QUOTA_PROJECT"),
                )[0]
            return google.auth.default(scopes=SCOPES, request=self._request)[0]

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns google-auth's errors into errors for clients."""
        from google.auth import exceptions

        try:
            yield
        except exceptions.TransportError as error:
            raise Transient("connection", self._no_token(error)) from error
        except exceptions.DefaultCredentialsError as error:
            raise self._none(error) from error
        except exceptions.GoogleAuthError as error:
            if error.retryable or isinstance(error.__cause__, exceptions.TransportError):
                raise Transient("server_error", self._no_token(error)) from error
            raise AccessDeniedError(f"GCS: {self._no_token(error)}; {self._remedy()}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # for malformed files
            raise self._none(error) from error

    def _no_token(self, error: Exception) -> str:
        text = str(error)
        found = (pattern.search(text) for pattern in _CODES)
        code = next((match[1] for match in found if match), type(error).__name__)
        return f"google-auth gets no token for penstockd from {self._kind()} ({code})"

    def _none(self, error: Exception) -> PenstockError:
        if self._file or os.environ.get(FILE_VARIABLE):
            named = "--gcs-credential-file" if self._file else FILE_VARIABLE
            return AccessDeniedError(
                f"GCS: penstockd's credentials cannot be used: the file that {named} names is missing, or is "
                f"none that google-auth can use ({type(error).__name__}); correct it"
            )
        return AccessDeniedError(
            f"GCS: penstockd has no Google credentials ({FILE_VARIABLE} is not set, and no metadata server "
            "answers); give it some in any way that google-auth knows, or set --gcs-anonymous 1 for public "
            "buckets"
        )

    def _kind(self) -> str:
        module = type(self._credentials).__module__
        if ".compute_engine" in module:
            return "the metadata server"
        if ".identity_pool" in module or ".aws" in module or ".pluggable" in module:
            return "workload identity federation"
        if ".impersonated_credentials" in module:
            return "an impersonated account"
        if ".service_account" in module:
            return "a service account's key"
        return "the credentials that it has"

    def _remedy(self) -> str:
        if self._file:
            return "check what --gcs-credential-file names, and the rights of that account"
        if os.environ.get(FILE_VARIABLE):
            return f"check what {FILE_VARIABLE} names, and the rights of that account"
        return "check the service account of this node or pod"


def _transport(timeout_seconds: float) -> Any:
    """The object by which google-auth sends requests. Raises ImportError."""
    import google.auth.transport
    import google.auth.transport.requests

    class Transport(google.auth.transport.requests.Request):
        """Sends requests for tokens, with the daemon's timeout, and no others: google-auth also looks up the
        name of the project, which nothing here needs, and which may be out of reach."""

        def __call__(self, url: str, *arguments: Any, **named: Any) -> Any:
            if url.startswith(_PROJECT_LOOKUP):
                return _NotLookedUp()
            asked: Any = super()
            return asked.__call__(url, *arguments, **{"timeout": timeout_seconds, **named})

    return Transport()


class _NotLookedUp:
    """An answer of google.auth.transport."""

    status = 404
    headers: Mapping[str, str] = MappingProxyType({})
    data = b"{}"
