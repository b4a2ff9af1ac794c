"""Credentials that are there and cannot be used: the error says why, by the names of variables and settings
and never by their values."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from penstock.client import errors

from ..e2e.conftest import StartDaemon
from .moto import REGION, MotoServer
from .support import FLAGS, Bucket, assert_no_secret, refused

KEY = "models/one.safetensors"
VALUE = "AKIAVALUE00000000000"
SECRET = "value-of-a-secret"


def refuses(
    start_daemon: StartDaemon,
    bucket: Bucket,
    *parts: str,
    kind: type[errors.PenstockError] = errors.AccessDeniedError,
    **variables: str,
) -> str:
    """The message with which a daemon with these variables refuses a load; it names no value of them."""
    daemon = start_daemon(
        *FLAGS, "--log-level", "debug", environment={"AWS_DEFAULT_REGION": REGION, **variables}
    )
    message = refused(daemon, bucket.uri(KEY), kind, "S3", "credentials", *parts)
    assert_no_secret(message, daemon.log(), secrets=[VALUE, SECRET])
    return message


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": VALUE}, "partial, AWS_SECRET_ACCESS_KEY is missing; set it"),
        (
            {"AWS_ACCESS_KEY_ID": VALUE, "AWS_SECRET_ACCES_KEY": SECRET},
            "partial, AWS_SECRET_ACCESS_KEY is missing; set it",
        ),
        ({"AWS_SECRET_ACCESS_KEY": SECRET}, "of the variables for them it has AWS_SECRET_ACCESS_KEY"),
        ({"AWS_PROFILE": VALUE}, "the profile that AWS_PROFILE names is in no configuration file"),
    ],
)
def test_variables_that_are_partial_or_lead_nowhere_are_named(
    variables: dict[str, str], said: str, start_daemon: StartDaemon, bucket: Bucket
) -> None:
    refuses(start_daemon, bucket, said, kind=errors.AccessDeniedError, **variables)


def test_a_partial_profile_says_what_it_lacks(
    start_daemon: StartDaemon, bucket: Bucket, tmp_path: Path
) -> None:
    shared = tmp_path / "credentials"
    shared.write_text(f"[default]\naws_access_key_id = {VALUE}\n")
    refuses(
        start_daemon,
        bucket,
        "aws_secret_access_key is missing",
        AWS_SHARED_CREDENTIALS_FILE=str(shared),
    )


@pytest.mark.parametrize("expires", ["2020-01-01T00:00:00Z", None])
def test_a_session_of_single_sign_on_that_expired_or_never_began_says_how_to_begin_one(
    expires: str | None, start_daemon: StartDaemon, bucket: Bucket, tmp_path: Path
) -> None:
    url = "https://penstock.example/start"
    if expires:
        cache = tmp_path / ".aws" / "sso" / "cache"
        cache.mkdir(parents=True)
        found = {"startUrl": url, "region": REGION, "accessToken": SECRET, "expiresAt": expires}
        (cache / f"{hashlib.sha1(url.encode()).hexdigest()}.json").write_text(json.dumps(found))
    config = tmp_path / "config"
    config.write_text(
        f"[profile sso]\nsso_start_url = {url}\nsso_region = {REGION}\nsso_account_id = 123456789012\n"
        "sso_role_name = reader\n"
    )
    refuses(
        start_daemon,
        bucket,
        "single sign-on has expired",
        "aws sso login",
        HOME=str(tmp_path),
        AWS_CONFIG_FILE=str(config),
        AWS_PROFILE="sso",
    )


def test_a_role_that_cannot_be_assumed_is_said_with_what_aws_answers(
    start_daemon: StartDaemon, moto: MotoServer, bucket: Bucket, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"[profile base]\naws_access_key_id = {VALUE}\naws_secret_access_key = {SECRET}\n"
        "[profile role]\nrole_arn = arn:aws:iam::123456789012:role/none\nsource_profile = base\n"
    )
    with moto.verified():
        message = refuses(
            start_daemon,
            bucket,
            "AWS answers AssumeRole with",
            "trust policy",
            AWS_CONFIG_FILE=str(config),
            AWS_PROFILE="role",
            AWS_ENDPOINT_URL_STS=moto.endpoint,
        )
    assert "arn:aws" not in message


def test_a_profile_whose_source_is_missing_says_so(
    start_daemon: StartDaemon, bucket: Bucket, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"[profile role]\nrole_arn = arn:aws:iam::123456789012:role/none\nsource_profile = {VALUE}\n"
    )
    refuses(
        start_daemon,
        bucket,
        "does not exist",
        "correct the profile",
        AWS_CONFIG_FILE=str(config),
        AWS_PROFILE="role",
    )


def test_a_configuration_that_cannot_be_parsed_is_named_by_its_variable(
    start_daemon: StartDaemon, bucket: Bucket, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.write_text(f"[profile x\naws_access_key_id = {VALUE}\n")
    refuses(start_daemon, bucket, "(AWS_CONFIG_FILE or", "cannot be parsed", AWS_CONFIG_FILE=str(config))


def test_a_token_file_that_is_not_mounted_is_named_by_its_variable(
    start_daemon: StartDaemon, bucket: Bucket, tmp_path: Path
) -> None:
    refuses(
        start_daemon,
        bucket,
        "the file that AWS_WEB_IDENTITY_TOKEN_FILE names cannot be read",
        AWS_ROLE_ARN="arn:aws:iam::123456789012:role/pod",
        AWS_WEB_IDENTITY_TOKEN_FILE=str(tmp_path / "missing"),
    )


def test_a_program_for_credentials_that_fails_is_told_without_what_it_wrote(
    start_daemon: StartDaemon, bucket: Bucket, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho {SECRET} >&2\nexit 1\n")
    program.chmod(0o755)
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = {program}\n")
    refuses(
        start_daemon,
        bucket,
        "the provider custom-process failed",
        kind=errors.SourceUnavailableError,
        AWS_CONFIG_FILE=str(config),
    )
