"""Where a daemon's credentials come from, that they are what signs, and that nobody is told them.

All that botocore knows works by being botocore's; each kind is tried once, because a daemon that asked for
credentials in its own way, or kept them, would pass most of these tests and fail its users.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from penstock.client import errors

from ..e2e.conftest import StartDaemon
from ..e2e.support import DaemonProcess, Nursery, expected
from . import faults
from .metadata import CONTAINER_TOKEN, SSO_TOKEN, Keys, MetadataServer
from .moto import ACCESS_KEY, REGION, SECRET_KEY, MotoServer
from .proxy import Exchange, FaultProxy, asks
from .signatures import Gatekeeper
from .support import BLOCK_BYTES, FLAGS, Bucket, assert_no_secret, load_and_compare, refused

KEY = "models/one.safetensors"
STATIC = Keys("AKIAFROMFILE00000000", "secret-from-a-file/+", "")
FIRST = Keys("ASIAFIRST00000000000", "first-secret/+", "FIRSTSESSIONTOKEN/+==")
SECOND = Keys("ASIASECOND0000000000", "second-secret/+", "SECONDSESSIONTOKEN/+==")
ALL_SECRETS = [
    part for keys in (STATIC, FIRST, SECOND) for part in (keys.access_key, keys.secret, keys.token) if part
]

StartWith = Callable[..., DaemonProcess]


@pytest.fixture
def gatekeeper(proxy: FaultProxy) -> Gatekeeper:
    """Before the objects, for every request."""
    keys = {key.access_key: (key.secret, key.token or None) for key in (STATIC, FIRST, SECOND)}
    keeper = Gatekeeper(keys={**keys, ACCESS_KEY: (SECRET_KEY, None)})
    proxy.on(lambda request: True, keeper, times=None)
    return keeper


@pytest.fixture
def start_with(start_daemon: StartDaemon, proxy: FaultProxy) -> Iterator[StartWith]:
    """Starts a daemon that finds its credentials as told; at the end it may have told none of them."""
    daemons: list[DaemonProcess] = []

    def start(*flags: str, **variables: str) -> DaemonProcess:
        variables = {"AWS_ENDPOINT_URL_S3": proxy.endpoint, "AWS_DEFAULT_REGION": REGION, **variables}
        daemons.append(start_daemon(*FLAGS, "--log-level", "debug", *flags, environment=variables))
        return daemons[-1]

    yield start
    for daemon in daemons:
        assert_no_secret(daemon.log(), str(daemon.status()), secrets=ALL_SECRETS)


@pytest.fixture
def metadata() -> Iterator[MetadataServer]:
    server = MetadataServer(FIRST)
    yield server
    server.close()


def test_from_variables(start_with: StartWith, gatekeeper: Gatekeeper, bucket: Bucket) -> None:
    daemon = start_with(
        AWS_ACCESS_KEY_ID=FIRST.access_key,
        AWS_SECRET_ACCESS_KEY=FIRST.secret,
        AWS_SESSION_TOKEN=FIRST.token,
    )
    load_and_compare(daemon, bucket.uri(KEY), bucket.put_random(KEY))
    assert set(gatekeeper.passed) == {FIRST.access_key}


@pytest.mark.parametrize("profile", ["default", "weights"])
def test_from_a_profile_of_the_shared_file(
    profile: str, start_with: StartWith, gatekeeper: Gatekeeper, bucket: Bucket, tmp_path: Path
) -> None:
    shared = tmp_path / "credentials"
    shared.write_text(
        f"[{profile}]\naws_access_key_id = {STATIC.access_key}\naws_secret_access_key = {STATIC.secret}\n"
    )
    chosen = {} if profile == "default" else {"AWS_PROFILE": profile}
    daemon = start_with(AWS_SHARED_CREDENTIALS_FILE=str(shared), **chosen)
    load_and_compare(daemon, bucket.uri(KEY), bucket.put_random(KEY))
    assert set(gatekeeper.passed) == {STATIC.access_key}


def test_a_profile_says_the_endpoint_and_the_region_too(
    start_daemon: StartDaemon, proxy: FaultProxy, gatekeeper: Gatekeeper, bucket: Bucket, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"[profile weights]\nregion = {REGION}\nservices = here\n"
        f"aws_access_key_id = {STATIC.access_key}\naws_secret_access_key = {STATIC.secret}\n"
        f"[services here]\ns3 =\n  endpoint_url = {proxy.endpoint}\n"
    )
    variables = {"AWS_CONFIG_FILE": str(config), "AWS_PROFILE": "weights"}
    daemon = start_daemon(*FLAGS, environment=variables)
    load_and_compare(daemon, bucket.uri(KEY), bucket.put_random(KEY))
    assert set(gatekeeper.passed) == {STATIC.access_key}
    assert_no_secret(daemon.log(), secrets=ALL_SECRETS)


def test_from_a_container(
    start_with: StartWith, gatekeeper: Gatekeeper, metadata: MetadataServer, bucket: Bucket
) -> None:
    daemon = start_with(
        AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{metadata.endpoint}/container",
        AWS_CONTAINER_AUTHORIZATION_TOKEN=CONTAINER_TOKEN,
    )
    load_and_compare(daemon, bucket.uri(KEY), bucket.put_random(KEY))
    assert set(gatekeeper.passed) == {FIRST.access_key}
    assert CONTAINER_TOKEN not in daemon.log()


def test_from_an_instance(
    start_with: StartWith, gatekeeper: Gatekeeper, metadata: MetadataServer, bucket: Bucket
) -> None:
    daemon = start_with(
        AWS_EC2_METADATA_DISABLED="false",
        AWS_EC2_METADATA_SERVICE_ENDPOINT=metadata.endpoint,
        AWS_METADATA_SERVICE_TIMEOUT="30",  # botocore gives it one second, and asks once
    )
    load_and_compare(daemon, bucket.uri(KEY), bucket.put_random(KEY))
    assert set(gatekeeper.passed) == {FIRST.access_key}


def test_from_the_cache_of_single_sign_on(
    start_with: StartWith, gatekeeper: Gatekeeper, metadata: MetadataServer, bucket: Bucket, tmp_path: Path
) -> None:
    url = "https://penstock.example/start"
    cache = tmp_path / ".aws" / "sso" / "cache"
    cache.mkdir(parents=True)
    ends = (datetime.now(timezone.utc) + timedelta(hours=8)).strftime("%Y-%m-%dT%H:%M:%SZ")
    found = {"startUrl": url, "region": REGION, "accessToken": SSO_TOKEN, "expiresAt": ends}
    (cache / f"{hashlib.sha1(url.encode()).hexdigest()}.json").write_text(json.dumps(found))
    config = tmp_path / "config"
    config.write_text(
        f"[profile sso]\nsso_start_url = {url}\nsso_region = {REGION}\nsso_account_id = 123456789012\n"
        "sso_role_name = reader\n"
    )
    daemon = start_with(
        HOME=str(tmp_path),
        AWS_CONFIG_FILE=str(config),
        AWS_PROFILE="sso",
        AWS_ENDPOINT_URL_SSO=metadata.endpoint,
    )
    load_and_compare(daemon, bucket.uri(KEY), bucket.put_random(KEY))
    assert set(gatekeeper.passed) == {FIRST.access_key}
    assert SSO_TOKEN not in daemon.log()


def test_a_token_that_ends_in_mid_load_is_renewed(
    start_with: StartWith,
    proxy: FaultProxy,
    gatekeeper: Gatekeeper,
    metadata: MetadataServer,
    bucket: Bucket,
) -> None:
    tensors = bucket.put_random(KEY, mib=4)

    def renew(exchange: Exchange) -> None:
        metadata.keys = SECOND
        gatekeeper.expired.add(FIRST.access_key)
        gatekeeper(exchange)

    proxy.reset()  # the first rule that applies is the one
    proxy.on(asks("GET", bucket=bucket.name, beyond=BLOCK_BYTES), renew, skip=8)
    proxy.on(lambda request: True, gatekeeper, times=None)
    daemon = start_with(
        AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{metadata.endpoint}/container",
        AWS_CONTAINER_AUTHORIZATION_TOKEN=CONTAINER_TOKEN,
    )
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    assert set(gatekeeper.passed) == {FIRST.access_key, SECOND.access_key}


def test_a_token_that_ended_for_good_fails_the_load_and_says_so(
    start_with: StartWith, gatekeeper: Gatekeeper, bucket: Bucket
) -> None:
    bucket.put_random(KEY)
    gatekeeper.expired.add(FIRST.access_key)
    daemon = start_with(
        AWS_ACCESS_KEY_ID=FIRST.access_key,
        AWS_SECRET_ACCESS_KEY=FIRST.secret,
        AWS_SESSION_TOKEN=FIRST.token,
    )
    message = refused(
        daemon, bucket.uri(KEY), errors.AccessDeniedError, KEY, "ExpiredToken", faults.REQUEST_ID
    )
    assert_no_secret(message, secrets=ALL_SECRETS)


def test_a_wrong_secret_fails_the_load_and_is_not_told(
    start_with: StartWith, gatekeeper: Gatekeeper, bucket: Bucket
) -> None:
    bucket.put_random(KEY)
    daemon = start_with(AWS_ACCESS_KEY_ID=STATIC.access_key, AWS_SECRET_ACCESS_KEY="another-secret")
    message = refused(daemon, bucket.uri(KEY), errors.AccessDeniedError, KEY, "SignatureDoesNotMatch")
    assert_no_secret(message, daemon.log(), secrets=["another-secret", *ALL_SECRETS])


def test_without_credentials_a_load_says_what_is_missing(start_with: StartWith, bucket: Bucket) -> None:
    bucket.put_random(KEY)
    daemon = start_with()
    for key in (KEY, "models/"):
        refused(daemon, bucket.uri(key), errors.AccessDeniedError, bucket.name, "credentials", "unsigned")


@pytest.mark.parametrize("variable", ["PENSTOCK_S3_UNSIGNED", "RUNAI_STREAMER_S3_UNSIGNED"])
def test_public_objects_need_no_credentials(
    variable: str, start_with: StartWith, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY, ACL="public-read")
    daemon = start_with(
        **{variable: "1"}, AWS_ACCESS_KEY_ID=STATIC.access_key, AWS_SECRET_ACCESS_KEY=STATIC.secret
    )
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    load_and_compare(daemon, bucket.uri("models/"), tensors)
    for request in proxy.requests():
        assert request.headers["Authorization"] is None
        assert request.headers["X-Amz-Security-Token"] is None


def test_an_object_that_is_not_public_is_refused_without_a_signature(
    start_with: StartWith, bucket: Bucket
) -> None:
    bucket.put_random(KEY, ACL="private")
    daemon = start_with("--s3-unsigned", "1")
    refused(daemon, bucket.uri(KEY), errors.AccessDeniedError, bucket.name, KEY)


def test_who_asks_pays_where_told_to(
    start_with: StartWith, proxy: FaultProxy, gatekeeper: Gatekeeper, bucket: Bucket
) -> None:
    daemon = start_with(
        "--s3-requester-pays", "1", AWS_ACCESS_KEY_ID=STATIC.access_key, AWS_SECRET_ACCESS_KEY=STATIC.secret
    )
    load_and_compare(daemon, bucket.uri("models/"), bucket.put_random(KEY))
    assert {request.headers["x-amz-request-payer"] for request in proxy.requests()} == {"requester"}
    assert set(gatekeeper.passed) == {STATIC.access_key}


@pytest.mark.parametrize(
    "key", ["with space+plus/größe%20.safetensors", "a//b.safetensors", "(x)!*'~.safetensors"]
)
def test_awkward_keys_are_signed_as_they_are_sent(
    key: str, start_with: StartWith, gatekeeper: Gatekeeper, bucket: Bucket
) -> None:
    daemon = start_with(AWS_ACCESS_KEY_ID=STATIC.access_key, AWS_SECRET_ACCESS_KEY=STATIC.secret)
    load_and_compare(daemon, bucket.uri(key), bucket.put_random(key))
    assert set(gatekeeper.passed) == {STATIC.access_key}


def test_moto_finds_the_signatures_right(
    start_with: StartWith, proxy: FaultProxy, moto: MotoServer, bucket: Bucket
) -> None:
    """By another implementation than ours: HEAD, ranged GET and list, with a user's key."""
    keys = user(moto, "penstock-reader", ["s3:GetObject", "s3:HeadObject", "s3:ListBucket"])
    tensors = bucket.put_random(KEY)
    bucket.put_random("private/two.safetensors")
    daemon = start_with(AWS_ACCESS_KEY_ID=keys.access_key, AWS_SECRET_ACCESS_KEY=keys.secret)
    with moto.verified():
        load_and_compare(daemon, bucket.uri("models/"), tensors)
        load_and_compare(daemon, bucket.uri(KEY), tensors)
    assert {request.method for request in proxy.requests()} == {"GET", "HEAD"}
    assert_no_secret(daemon.log(), secrets=[keys.access_key, keys.secret])


@pytest.mark.parametrize(
    ("allowed", "asked", "needed"),
    [("s3:ListBucket", KEY, "s3:GetObject"), ("s3:GetObject", "models/", "s3:ListBucket")],
)
def test_moto_refuses_what_a_policy_does_not_allow(
    start_with: StartWith, moto: MotoServer, bucket: Bucket, allowed: str, asked: str, needed: str
) -> None:
    keys = user(moto, f"penstock-{allowed[3:]}", [allowed])
    bucket.put_random(KEY)
    daemon = start_with(AWS_ACCESS_KEY_ID=keys.access_key, AWS_SECRET_ACCESS_KEY=keys.secret)
    with moto.verified():
        message = refused(
            daemon,
            bucket.uri(asked),
            errors.AccessDeniedError,
            bucket.name,
            asked,
            f"credentials {needed} for",
        )
    assert_no_secret(message, daemon.log(), secrets=[keys.access_key, keys.secret])


def test_by_web_identity_as_a_pod_has_it(
    start_with: StartWith, moto: MotoServer, bucket: Bucket, tmp_path: Path
) -> None:
    """As IRSA: a token in a file buys a role's keys at STS, and moto verifies what they sign."""
    token = tmp_path / "token"
    token.write_text("penstock-web-identity-token")
    daemon = start_with(
        AWS_ROLE_ARN=role(moto, "penstock-pod"),
        AWS_WEB_IDENTITY_TOKEN_FILE=str(token),
        AWS_ENDPOINT_URL_STS=moto.endpoint,
    )
    tensors = bucket.put_random(KEY)
    two = bucket.put_random("models/two.safetensors", seed=1)
    # moto's STS knows no anonymous question while it verifies.
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    with moto.verified():
        load_and_compare(daemon, bucket.uri("models/two.safetensors"), two)
    assert "penstock-web-identity-token" not in daemon.log()


def test_by_assuming_a_role(start_with: StartWith, moto: MotoServer, bucket: Bucket, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"[profile base]\naws_access_key_id = {STATIC.access_key}\naws_secret_access_key = {STATIC.secret}\n"
        f"[profile role]\nrole_arn = {role(moto, 'penstock-assumed')}\nsource_profile = base\n"
    )
    daemon = start_with(AWS_CONFIG_FILE=str(config), AWS_PROFILE="role", AWS_ENDPOINT_URL_STS=moto.endpoint)
    tensors = bucket.put_random(KEY)
    two = bucket.put_random("models/two.safetensors", seed=1)
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    with moto.verified():
        load_and_compare(daemon, bucket.uri("models/two.safetensors"), two)


def test_a_client_needs_no_credentials(
    daemon: DaemonProcess, bucket: Bucket, nursery_process: Nursery
) -> None:
    """Nor does it get any: it and its environment know nothing of AWS."""
    tensors = bucket.put_random(KEY)
    client = nursery_process.start(
        "load", socket_dir=daemon.socket_dir, source=bucket.uri(KEY), pause_after=0
    )
    client.hear("paused")
    variables = Path(f"/proc/{client.pid}/environ").read_bytes().decode(errors="replace")
    assert "AWS_ACCESS_KEY_ID" not in variables
    assert "AWS_ENDPOINT_URL" not in variables
    client.go()
    assert client.hear("loaded")["found"] == expected(tensors)
    client.end()


def user(moto: MotoServer, name: str, actions: list[str]) -> Keys:
    """A new user of moto's who may do that everywhere."""
    iam = moto.client("iam")
    iam.create_user(UserName=name)
    policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": actions, "Resource": "*"}]}
    iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=json.dumps(policy))
    made = iam.create_access_key(UserName=name)["AccessKey"]
    return Keys(made["AccessKeyId"], made["SecretAccessKey"], "")


def role(moto: MotoServer, name: str) -> str:
    """The ARN of a new role of moto's that may read objects."""
    iam = moto.client("iam")
    trust = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": "*", "Action": "sts:*"}]}
    arn: str = iam.create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(trust))["Role"]["Arn"]
    statement = {"Effect": "Allow", "Action": ["s3:*"], "Resource": "*"}
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    iam.put_role_policy(RoleName=name, PolicyName="p", PolicyDocument=json.dumps(policy))
    return arn
