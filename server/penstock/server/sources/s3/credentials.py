"""Why botocore finds no usable credentials, in words.

Names variables and settings, never their values: some are secrets, and others may hold one by mistake.
"""

from __future__ import annotations

import os
import re

from ...errors import AccessDeniedError, PenstockError, SourceUnavailableError

CREDENTIAL_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
)
"""Variables that lead botocore to credentials, or are a part of some."""

_QUOTED = re.compile(r"""\s*(?:"[^"]*"|'[^']*'|\([^)]*\))""")
_PLAIN_CODE = re.compile(r"[A-Za-z][A-Za-z0-9.]{0,99}")
_ROLE = "check the role's trust policy, and what AWS_ROLE_ARN or the profile's role_arn names"


def no_credentials(what: str) -> AccessDeniedError:
    """The error if there are no credentials. `what` is the location that was to be read."""
    found = ", ".join(name for name in CREDENTIAL_VARIABLES if os.environ.get(name))
    so_far = f" (of the variables for them it has {found})" if found else ""
    return AccessDeniedError(
        f"{what}: penstockd has no AWS credentials{so_far}; give it some in any way that boto3 knows, or set "
        "--s3-unsigned 1 for public buckets"
    )


def credentials_failure(error: Exception, what: str) -> PenstockError | None:
    """The error for a failure of botocore that is about credentials; None for any other failure."""
    from botocore import exceptions as botocore

    if isinstance(error, botocore.CredentialRetrievalError | botocore.MetadataRetrievalError):
        # The message may quote a program's standard error, or the body of an answer.
        provider = str(error.kwargs.get("provider", "metadata"))[:50]
        return SourceUnavailableError(
            f"{what}: penstockd's AWS credentials could not be fetched: the provider {provider} failed; "
            f"check it where penstockd runs{_by_variables('AWS_CONTAINER', 'AWS_WEB_IDENTITY')}"
        )
    reason = _reason(error)
    if reason is None:
        return None
    return AccessDeniedError(f"{what}: penstockd's AWS credentials cannot be used: {reason}")


def _reason(error: Exception) -> str | None:
    from botocore import exceptions as botocore

    if isinstance(error, botocore.PartialCredentialsError):
        missing = _QUOTED.sub("", str(error.kwargs["cred_var"])) or "a part"
        return f"those of {error.kwargs['provider']} are partial, {missing} is missing; set it"
    if isinstance(error, botocore.ProfileNotFound):
        variables = _set_variables("AWS_PROFILE", "AWS_DEFAULT_PROFILE") or "the configuration"
        return f"the profile that {variables} names is in no configuration file; create it, or name another"
    if isinstance(error, botocore.SSOError | botocore.TokenRetrievalError | botocore.LoginError):
        return "the session of single sign-on has expired or does not exist; run aws sso login as its user"
    if isinstance(error, botocore.RefreshWithMFAUnsupportedError):
        return (
            "the role wants a code of a second factor, and nobody is there to type one; choose another role"
        )
    if isinstance(error, botocore.InvalidConfigError | botocore.UnknownCredentialError):
        text = _QUOTED.sub("", str(error)).strip().rstrip(".")[:300]
        return f"botocore says {text!r}; correct the profile"
    if isinstance(error, botocore.ConfigParseError | botocore.ConfigNotFound):
        variables = _set_variables("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE") or "~/.aws"
        return f"a configuration file ({variables}) is missing or cannot be parsed; correct it"
    if isinstance(error, botocore.ClientError):
        # The message may quote what was signed.
        code = str(error.response.get("Error", {}).get("Code", ""))
        code = code if _PLAIN_CODE.fullmatch(code) else "an error"
        return f"AWS answers {error.operation_name} with {code}; {_ROLE}"
    if isinstance(error, OSError):
        for name in ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"):
            if error.filename and os.environ.get(name) == error.filename:
                return f"the file that {name} names cannot be read ({error.strerror}); check its mount"
    return None


def _set_variables(*names: str) -> str:
    return " or ".join(name for name in names if os.environ.get(name))


def _by_variables(*beginnings: str) -> str:
    names = sorted(name for name in CREDENTIAL_VARIABLES if name.startswith(beginnings))
    found = _set_variables(*names)
    return f" ({found})" if found else ""
