"""The way to storage: TLS with a private authority, proxies, addressing, regions, names and ports without a
server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.client import errors

from ..e2e.conftest import StartDaemon
from ..e2e.support import DaemonProcess, wait_until
from ..ports import free_port
from . import faults
from .authority import Authority
from .moto import MotoServer
from .proxy import Exchange, FaultProxy, Request, asks
from .support import BLOCK_BYTES, FLAGS, RETRIES, Bucket, environment, load_and_compare, refused
from .tunnel import Tunnel

KEY = "models/one.safetensors"
HOST = "localhost.penstock.test"
"""Resolves nowhere: only through a proxy can it be reached. moto takes the first part of other names for a
bucket."""


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def https(authority: Authority, moto: MotoServer) -> Iterator[FaultProxy]:
    proxy = FaultProxy(moto.port, tls=authority.server("127.0.0.1", HOST, f"*.{HOST}"))
    yield proxy
    proxy.close()


def start(start_daemon: StartDaemon, endpoint: str, *flags: str, **variables: str) -> DaemonProcess:
    return start_daemon(*FLAGS, *flags, environment=environment(endpoint, **variables))


def test_a_private_authority_is_trusted_when_told_to(
    start_daemon: StartDaemon, https: FaultProxy, authority: Authority, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY)
    daemon = start(start_daemon, https.endpoint, AWS_CA_BUNDLE=str(authority.bundle))
    rule = https.on(asks("GET", beyond=BLOCK_BYTES), faults.cut(1000), times=4)
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    load_and_compare(daemon, bucket.uri("models/"), tensors)
    assert len(rule.hits) == 4


def test_a_profile_may_name_the_authority(
    start_daemon: StartDaemon, https: FaultProxy, authority: Authority, bucket: Bucket, tmp_path: Path
) -> None:
    config = tmp_path / "config"
    config.write_text(f"[profile here]\nca_bundle = {authority.bundle}\n")
    daemon = start(start_daemon, https.endpoint, AWS_CONFIG_FILE=str(config), AWS_PROFILE="here")
    load_and_compare(daemon, bucket.uri(KEY), bucket.put_random(KEY))


@pytest.mark.parametrize("key", [KEY, "models/"])
def test_an_unknown_authority_is_refused(
    key: str, start_daemon: StartDaemon, https: FaultProxy, bucket: Bucket
) -> None:
    bucket.put_random(KEY)
    daemon = start(start_daemon, https.endpoint)
    refused(
        daemon,
        bucket.uri(key),
        errors.SourceUnavailableError,
        bucket.name,
        key,
        "certificate",
        "AWS_CA_BUNDLE",
    )
    assert not https.requests()


def test_another_authority_s_bundle_is_refused(
    start_daemon: StartDaemon, https: FaultProxy, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.put_random(KEY)
    other = Authority(tmp_path, "another")
    daemon = start(start_daemon, https.endpoint, AWS_CA_BUNDLE=str(other.bundle))
    refused(daemon, bucket.uri(KEY), errors.SourceUnavailableError, bucket.name, KEY, "certificate")


@pytest.mark.parametrize("key", [KEY, "models/"])
def test_a_certificate_for_another_host_is_refused(
    key: str, start_daemon: StartDaemon, moto: MotoServer, authority: Authority, bucket: Bucket
) -> None:
    bucket.put_random(KEY)
    proxy = FaultProxy(moto.port, tls=authority.server("elsewhere.penstock.test"))
    try:
        daemon = start(start_daemon, proxy.endpoint, AWS_CA_BUNDLE=str(authority.bundle))
        refused(daemon, bucket.uri(key), errors.SourceUnavailableError, bucket.name, key, "certificate")
        assert not proxy.requests()
    finally:
        proxy.close()


def test_a_bundle_that_is_not_there_is_named(
    start_daemon: StartDaemon, https: FaultProxy, bucket: Bucket, tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing.pem")
    daemon = start(start_daemon, https.endpoint, AWS_CA_BUNDLE=missing)
    refused(daemon, bucket.uri(KEY), errors.SourceUnavailableError, missing)


@pytest.fixture
def tunnel(https: FaultProxy) -> Iterator[Tunnel]:
    tunnel = Tunnel(https.port)
    yield tunnel
    tunnel.close()


def test_https_goes_through_the_proxy_of_the_environment(
    start_daemon: StartDaemon, https: FaultProxy, tunnel: Tunnel, authority: Authority, bucket: Bucket
) -> None:
    """End to end encrypted: the proxy learns a name and a port."""
    tensors = bucket.put_random(KEY)
    daemon = start(
        start_daemon,
        f"https://{HOST}:8443",
        "--s3-addressing",
        "path",
        AWS_CA_BUNDLE=str(authority.bundle),
        HTTPS_PROXY=tunnel.url.replace("//", "//user:pass%2Fword@"),
    )
    load_and_compare(daemon, bucket.uri("models/"), tensors)
    assert {line.rpartition(" ")[0] for line in tunnel.asked} == {f"CONNECT {HOST}:8443"}
    assert tunnel.credentials == {"Basic dXNlcjpwYXNzL3dvcmQ="}
    assert {request.headers["Host"] for request in https.requests()} == {f"{HOST}:8443"}
    assert "pass%2Fword" not in daemon.log()


def test_a_name_without_proxy_is_asked_directly(
    start_daemon: StartDaemon, https: FaultProxy, tunnel: Tunnel, authority: Authority, bucket: Bucket
) -> None:
    daemon = start(
        start_daemon,
        https.endpoint,
        AWS_CA_BUNDLE=str(authority.bundle),
        HTTPS_PROXY=tunnel.url,
        NO_PROXY="example.org,127.0.0.1",
    )
    load_and_compare(daemon, bucket.uri("models/"), bucket.put_random(KEY))
    assert tunnel.asked == []


def test_plain_http_goes_through_its_own_proxy(
    start_daemon: StartDaemon, proxy: FaultProxy, bucket: Bucket
) -> None:
    tunnel = Tunnel(proxy.port)
    try:
        daemon = start(start_daemon, f"http://{HOST}", "--s3-addressing", "path", HTTP_PROXY=tunnel.url)
        load_and_compare(daemon, bucket.uri("models/"), bucket.put_random(KEY))
        assert f"GET http://{HOST}/{bucket.name}/{KEY} HTTP/1.1" in tunnel.asked
    finally:
        tunnel.close()


@pytest.mark.parametrize("key", [KEY, "models/"])
def test_a_proxy_that_does_not_answer_is_named(
    key: str, start_daemon: StartDaemon, https: FaultProxy
) -> None:
    port = free_port()
    daemon = start(start_daemon, https.endpoint, HTTPS_PROXY=f"http://user:secretword@127.0.0.1:{port}")
    message = refused(daemon, f"s3://any/{key}", errors.SourceUnavailableError, key, f"127.0.0.1:{port}")
    assert "secretword" not in message + daemon.log()


@pytest.mark.parametrize("key", [KEY, "models/"])
@pytest.mark.parametrize(
    ("status", "remedy"), [(407, "its user and password"), (403, "lets 127.0.0.1"), (502, "--object-retries")]
)
def test_a_proxy_that_lets_nothing_through_is_named_with_what_it_says(
    status: int, remedy: str, key: str, start_daemon: StartDaemon, https: FaultProxy, tunnel: Tunnel
) -> None:
    tunnel.refuses = status
    place = f"127.0.0.1:{tunnel.port}"
    daemon = start(start_daemon, https.endpoint, HTTPS_PROXY=f"http://user:secretword@{place}")
    said = (f"the proxy {place} answered {status}", remedy)
    message = refused(daemon, f"s3://any/{key}", errors.SourceUnavailableError, key, *said)
    assert ("check HTTPS_PROXY" in message) == (status != 502)
    assert len(tunnel.asked) == (RETRIES if status == 502 else 1)
    assert "secretword" not in message + daemon.log()


def test_a_proxy_of_plain_http_that_wants_a_password_is_named(
    start_daemon: StartDaemon, tunnel: Tunnel
) -> None:
    tunnel.refuses = 407
    daemon = start(start_daemon, f"http://{HOST}", "--s3-addressing", "path", HTTP_PROXY=tunnel.url)
    said = (f"the proxy 127.0.0.1:{tunnel.port} answered 407", "HTTP_PROXY", "password")
    refused(daemon, f"s3://any/{KEY}", errors.SourceUnavailableError, KEY, *said)
    assert len(tunnel.asked) == 1


@pytest.mark.parametrize("proxy_url", ["http://user:/secretword@127.0.0.1:1", "user:secretword@127.0.0.1:x"])
def test_a_proxy_whose_url_is_none_is_not_told_but_named(
    proxy_url: str, start_daemon: StartDaemon, https: FaultProxy
) -> None:
    """As when a password is not encoded."""
    daemon = start(start_daemon, https.endpoint, HTTPS_PROXY=proxy_url)
    message = refused(daemon, f"s3://any/{KEY}", errors.SourceUnavailableError, "HTTPS_PROXY", "%2F")
    assert "secretword" not in message + daemon.log()


@pytest.mark.parametrize("through_proxy", [False, True])
def test_a_password_in_the_endpoint_goes_nowhere(
    through_proxy: bool, start_daemon: StartDaemon, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY)
    tunnel = Tunnel(proxy.port)
    try:
        place = HOST if through_proxy else f"127.0.0.1:{proxy.port}"
        variables = {"HTTP_PROXY": tunnel.url} if through_proxy else {}
        endpoint = f"http://user:secretword@{place}"
        daemon = start(start_daemon, endpoint, "--s3-addressing", "path", **variables)
        load_and_compare(daemon, bucket.uri("models/"), tensors)
        assert {request.headers["Host"] for request in proxy.requests()} == {place}
        proxy.on(asks(), faults.reset, times=None)
        message = refused(daemon, bucket.uri(KEY), errors.SourceUnavailableError, place)
        assert "secretword" not in message + daemon.log() + str(daemon.status()) + str(tunnel.asked)
    finally:
        tunnel.close()


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        (("--s3-addressing", "virtual"), {}),
        ((), {"PENSTOCK_S3_ADDRESSING": "virtual"}),
        ((), {"RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "1"}),
    ],
)
def test_a_bucket_may_be_a_host(
    flags: tuple[str, ...],
    variables: dict[str, str],
    start_daemon: StartDaemon,
    proxy: FaultProxy,
    bucket: Bucket,
) -> None:
    """moto takes the bucket from the Host header; the name itself resolves only at the proxy."""
    tunnel = Tunnel(proxy.port)
    try:
        # The proxy makes a connection for every request.
        flags = (*flags, "--object-block-size", "1MiB")
        daemon = start(start_daemon, f"http://{HOST}", *flags, HTTP_PROXY=tunnel.url, **variables)
        load_and_compare(daemon, bucket.uri(KEY), bucket.put_random(KEY))
        load_and_compare(daemon, bucket.uri("models/"), bucket.put_random(KEY))
        assert {request.headers["Host"] for request in proxy.requests()} == {f"{bucket.name}.{HOST}"}
        assert f"GET http://{bucket.name}.{HOST}/{KEY} HTTP/1.1" in tunnel.asked
    finally:
        tunnel.close()


@pytest.mark.parametrize("status", [301, 307, 400])
def test_a_bucket_of_another_region_is_found_there_and_remembered(
    status: int, daemon: DaemonProcess, proxy: FaultProxy, moto: MotoServer
) -> None:
    bucket = Bucket(moto, f"penstock-elsewhere-{status}", region="ap-south-1")
    tensors = bucket.put_random(KEY)
    code = {301: "PermanentRedirect", 307: "TemporaryRedirect", 400: "AuthorizationHeaderMalformed"}[status]
    answer = faults.error_answer(status, code, ("x-amz-bucket-region", "ap-south-1"))

    def elsewhere(request: Request) -> bool:
        return request.bucket == bucket.name and "/ap-south-1/" not in request.headers["Authorization"]

    rule = proxy.on(elsewhere, faults.raw_answer(answer), times=None)
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    assert len(rule.hits) == 1
    load_and_compare(daemon, bucket.uri("models/"), tensors)
    assert len(rule.hits) == 1


@pytest.mark.parametrize("key", [KEY, "models/"])
def test_a_redirect_that_goes_in_circles_ends(
    key: str, daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    regions = iter([f"region-{number}" for number in range(1000)])

    def redirect(exchange: Exchange) -> None:
        exchange.send(faults.error_answer(301, "PermanentRedirect", ("x-amz-bucket-region", next(regions))))

    rule = proxy.on(asks(bucket=bucket.name), redirect, times=None)
    bucket.put_random(KEY)
    refused(daemon, bucket.uri(key), errors.SourceUnavailableError, bucket.name, key, "region")
    assert len(rule.hits) < 10


@pytest.mark.parametrize("key", [KEY, "models/"])
def test_a_host_that_does_not_resolve_is_named(key: str, start_daemon: StartDaemon) -> None:
    daemon = start(start_daemon, "http://no-such-host.invalid:9000", "--s3-addressing", "path")
    refused(
        daemon, f"s3://bucket/{key}", errors.SourceUnavailableError, "bucket", key, "no-such-host.invalid"
    )


@pytest.mark.parametrize("key", [KEY, "models/"])
def test_a_port_on_which_nobody_listens_is_named(key: str, start_daemon: StartDaemon) -> None:
    endpoint = f"127.0.0.1:{free_port()}"
    daemon = start(start_daemon, f"http://{endpoint}")
    refused(daemon, f"s3://bucket/{key}", errors.SourceUnavailableError, "bucket", key, endpoint)


def test_a_server_that_restarts_in_mid_load_costs_no_byte(
    start_daemon: StartDaemon, moto: MotoServer, bucket: Bucket
) -> None:
    """Connections end, new ones are refused until it is back."""
    tensors = bucket.put_random(KEY, mib=4)
    proxy = FaultProxy(moto.port)
    try:
        daemon = start(start_daemon, proxy.endpoint, "--object-retries", "12")
        proxy.on(asks("GET", bucket=bucket.name, beyond=BLOCK_BYTES), Exchange.close_proxy, skip=8)
        with daemon.client() as client, client.load(bucket.uri(KEY), memory_limit="2MiB") as load:
            wait_until(lambda: proxy.refusing, "the server to go")
            proxy.drop_connections()
            proxy.open()
            for name, tensor in load:
                assert tensor.equal(tensors.pop(name))
        assert not tensors
    finally:
        proxy.close()


def test_a_server_that_is_gone_in_mid_load_fails_it(
    start_daemon: StartDaemon, moto: MotoServer, bucket: Bucket
) -> None:
    bucket.put_random(KEY, mib=4)
    proxy = FaultProxy(moto.port)
    try:
        daemon = start(start_daemon, proxy.endpoint)
        proxy.on(
            asks("GET", bucket=bucket.name, beyond=BLOCK_BYTES), Exchange.close_proxy, skip=8, times=None
        )
        refused(daemon, bucket.uri(KEY), errors.SourceUnavailableError, bucket.name, KEY)
    finally:
        proxy.close()
