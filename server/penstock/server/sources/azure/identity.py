"""azure-identity's part: tokens, or why there are none, in words. Imported when first needed.

Asks only for kinds of identity that make sense on a node. If variables name one, it is used alone: the one
that AKS mounts for workload identity, or a client's secret or certificate. Otherwise it asks for a managed
identity, or the login of `az`.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

from ...errors import AccessDeniedError, PenstockError, SourceUnavailableError
from ..objects.faults import Transient
from ..objects.tokens import Token

SCOPE = "https://storage.azure.com/.default"
_CODES = (
    re.compile(r"\b(AADSTS[0-9]{4,10})\b"),
    re.compile(r"\b(invalid_[a-z_]{3,40}|unauthorized_client)\b"),
    re.compile(r"\b(HTTP [0-9]{3})\b"),
)

# These loggers write requests, and each credential that they try.
for _name in ("azure", "msal", "urllib3"):
    logging.getLogger(_name).setLevel(logging.ERROR)


class AzureIdentity:
    """Used by one thread at a time."""

    def __init__(self, timeout_seconds: float) -> None:
        """Makes no request. Raises PenstockError."""
        try:
            import azure.identity
        except ImportError as error:
            raise SourceUnavailableError(
                f"Azure: tokens need azure-identity ({error}); install penstock[azure] where penstockd runs, "
                "or give it an account key, a SAS or a connection string, or set --azure-anonymous 1"
            ) from error
        named = os.environ.get
        timeouts = {"connection_timeout": timeout_seconds, "read_timeout": timeout_seconds}
        # Few attempts: the engine makes more, and can be stopped between them.
        brief: dict[str, Any] = {"retry_total": 1, **timeouts}
        try:
            if named("AZURE_FEDERATED_TOKEN_FILE"):
                self._kind = "workload identity"
                self._variables = "AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_FEDERATED_TOKEN_FILE"
                self._credential: Any = azure.identity.WorkloadIdentityCredential(**brief)
            elif named("AZURE_CLIENT_SECRET") or named("AZURE_CLIENT_CERTIFICATE_PATH"):
                self._kind = "a client's secret or certificate"
                self._variables = (
                    "AZURE_CLIENT_ID, AZURE_TENANT_ID, and AZURE_CLIENT_SECRET or "
                    "AZURE_CLIENT_CERTIFICATE_PATH"
                )
                self._credential = azure.identity.EnvironmentCredential(**brief)
            else:
                self._kind = "a managed identity"
                self._variables = "AZURE_CLIENT_ID, where the node has several identities"
                self._credential = azure.identity.DefaultAzureCredential(
                    exclude_environment_credential=True,
                    exclude_workload_identity_credential=True,
                    exclude_shared_token_cache_credential=True,
                    exclude_visual_studio_code_credential=True,
                    exclude_developer_cli_credential=True,
                    exclude_powershell_credential=True,
                    exclude_broker_credential=True,
                    **timeouts,
                )
        except (ValueError, OSError) as error:
            raise self._none(error) from error

    def fetch(self) -> Token:
        """A new token. Raises PenstockError and Transient."""
        from azure.core import exceptions
        from azure.identity import CredentialUnavailableError

        try:
            token = self._credential.get_token(SCOPE)
        except CredentialUnavailableError as error:
            raise self._none(error) from error
        except (exceptions.ServiceRequestError, exceptions.ServiceResponseError) as error:
            raise Transient("connection", self._no_token(error)) from error
        except exceptions.ClientAuthenticationError as error:
            if error.response is None and self._kind == "a managed identity":  # nor the login of `az`
                raise self._none(error) from error
            if (error.status_code or 0) >= 500 or error.status_code == 429:
                raise Transient("server_error", self._no_token(error)) from error
            raise AccessDeniedError(f"Azure: {self._no_token(error)}; check {self._variables}") from error
        except exceptions.AzureError as error:
            raise Transient("server_error", self._no_token(error)) from error
        except (ValueError, OSError) as error:
            raise self._none(error) from error
        return Token(token.token, float(token.expires_on))

    def _no_token(self, error: Exception) -> str:
        text = str(error)
        found = (pattern.search(text) for pattern in _CODES)
        code = next((match[1] for match in found if match), type(error).__name__)
        return f"azure-identity gets no token for penstockd from {self._kind} ({code})"

    def _none(self, error: Exception) -> PenstockError:
        if self._kind == "a managed identity":
            return AccessDeniedError(
                "Azure: penstockd has no Azure credentials (no variable names any, and the node has no "
                "managed identity that answers); give it some in any way that docs/stores.md lists, or set "
                "--azure-anonymous 1 for public containers"
            )
        return AccessDeniedError(
            f"Azure: {self._kind} cannot be used ({type(error).__name__}); check {self._variables}, and that "
            "the files they name are mounted"
        )
