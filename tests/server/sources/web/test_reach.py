"""How URLs are written, and to which of them a caller may be led."""

from __future__ import annotations

import socket
import ssl
from typing import Any

import pytest

from penstock.server.errors import AccessDeniedError
from penstock.server.sources import Access
from penstock.server.sources.objects import addresses
from penstock.server.sources.objects.connection import Connections
from penstock.server.sources.objects.reach import Reach, WebPath, prefix, redirected

from ...objects import ObjectServer


def user(*prefixes: str) -> Reach:
    return Reach.of(Access(uid=1000, privileged=False, prefixes=tuple(map(prefix, prefixes))))


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("https://Host.Example:443/A%7eb/%c3%a9", "https://host.example/A~b/%C3%A9"),
        ("http://host:80", "http://host/"),
        ("http://host:8080/a b+é", "http://host:8080/a%20b+%C3%A9"),
        ("https://[::1]:9/100%/x", "https://[::1]:9/100%25/x"),
        ("https://h/a%2Fb%2fc%2B+", "https://h/a%2Fb%2Fc%2B+"),
        ("https://h/a//b/", "https://h/a//b/"),
    ],
)
def test_a_url_is_written_in_one_way(written: str, meant: str) -> None:
    assert WebPath.parse(written).url == meant
    assert WebPath.parse(meant).url == meant


@pytest.mark.parametrize(
    "url",
    [
        "https://",
        "https:///x",
        "https://h:99999/x",
        "https://h:x/",
        "https://user@h/x",
        "https://user:hidden@h/x",
        "https://h/x?token=hidden",
        "https://h/x#part",
        "https://hé/x",
        "https://h /x",
        "https://h\\@other/x",
        "https://h%2Fx/",
        "ftp://h/x",
        "https://h/" + "x" * 9000,
    ],
)
def test_what_is_no_plain_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"write|put|name|correct") as refused:
        WebPath.parse(url)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    ("url", "climbs"),
    [
        ("https://h/a/../b", True),
        ("https://h/a/%2e%2E/b", True),
        ("https://h/a/..%2fb", True),
        ("https://h/a%2f..%2fb", True),
        ("https://h/a/..%5cb", True),
        ("https://h/./a", True),
        ("https://h/a..b/.c", False),
        ("https://h/a%20b", False),
    ],
)
def test_ways_up_and_slashes_that_hide_are_seen(url: str, climbs: bool) -> None:
    assert WebPath.parse(url).climbs == climbs


@pytest.mark.parametrize(
    ("prefixes", "url", "allowed"),
    [
        (["https://h/models"], "https://h/models/x", True),
        (["https://H:443/models/"], "https://h/models/x", True),
        (["https://h/models"], "https://h/models-secret/x", False),
        (["https://h/models"], "https://h:8443/models/x", False),
        (["https://h/models"], "http://h/models/x", False),
        (["https://h/models"], "https://h.evil/models/x", False),
        (["https://h/models"], "https://h/models/%2e%2e/secret/x", False),
        (["https://h"], "https://h/x", True),
        (["http://h"], "http://h/x", True),
        (["https://"], "https://anything/x", True),
        (["https://"], "http://anything/x", False),
        ([], "https://h/x", False),
    ],
)
def test_a_prefix_names_a_host_and_what_lies_below_a_path(
    prefixes: list[str], url: str, allowed: bool
) -> None:
    reach = user(*prefixes)
    if allowed:
        reach.check(WebPath.parse(url))
    else:
        with pytest.raises(AccessDeniedError, match="uid 1000 may not load"):
            reach.check(WebPath.parse(url))


@pytest.mark.parametrize("text", ["http://", "https://user@h/", "https:///x", "http://h/?x"])
def test_a_prefix_that_names_no_host_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"https?://"):
        prefix(text)


def test_what_no_prefix_holds_is_asked_for_on_public_addresses_and_without_a_login() -> None:
    reach = user("https://h/models", "http://plain/x")
    for url in ("https://h/models/a?signed=1", "http://plain/x/y"):
        way = reach.way(url, "x")
        assert (way.public_only, way.with_credentials) == (False, True)
    for url in ("https://h/other", "https://h/models/../other", "https://elsewhere/a?signed=1"):
        way = reach.way(url, "x")
        assert (way.public_only, way.with_credentials) == (True, False)
    for url in ("http://plain/other", "http://169.254.169.254/latest", "http://elsewhere/a"):
        with pytest.raises(AccessDeniedError, match=r"x: the server leads to .* by plain http"):
            reach.way(url, "x")


@pytest.mark.parametrize(
    ("location", "led"),
    [
        ("/y", "https://h/y"),
        ("y?a=b#c", "https://h/d/y?a=b"),
        ("//other/y", "https://other/y"),
        ("http://other:8/y", "http://other:8/y"),
        ("", None),
        ("file:///etc/passwd", None),
        ("gopher://h/x", None),
        ("https://user:password@h/x", None),
        ("https://h/a b", None),
        ("https://h/é", None),
        ("https://h/\r\nX: y", None),
        ("https://[::1/x", None),
        ("https://h/" + "x" * 9000, None),
    ],
)
def test_redirects_lead_to_web_servers_alone(location: str, led: str | None) -> None:
    assert redirected("https://h/d/x", location) == led


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("100.64.0.1", False),
        ("100.100.100.200", False),  # Alibaba's metadata
        ("169.254.169.254", False),  # everybody's
        ("169.254.170.2", False),
        ("168.63.129.16", False),  # Azure's
        ("192.0.0.192", False),  # Oracle's
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("::7f00:1", False),
        ("64:ff9b:1::7f00:1", False),
        ("fe80::1%eth0", False),
        ("fd00:ec2::254", False),  # AWS's
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::808:808", True),
        ("2002:7f00:1::", False),
        ("2001:0:1::1", False),
        ("fec0::1", False),  # of a site
        ("5f00::1", False),  # of a network's own routers
        ("3fff::1", False),
        ("1::1", False),  # given to nobody
        ("4000::1", False),
        ("::127.0.0.1", False),
        ("192.88.99.1", False),
    ],
)
def test_addresses_are_public_or_not(address: str, public: bool) -> None:
    assert addresses.is_public(address) == public


@pytest.fixture
def connections() -> Any:
    made = Connections(timeout_seconds=20, idle=4, tls=ssl.create_default_context())
    yield made
    made.close()


@pytest.mark.parametrize(
    "name", ["127.0.0.1", "localhost", "127.1", "0x7f000001", "2130706433", "[::ffff:127.0.0.1]"]
)
def test_no_spelling_of_a_loopback_address_is_connected_to(
    connections: Connections, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for variable in ("http_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    server = ObjectServer()
    try:
        port = server.url.rpartition(":")[2]
        with (
            pytest.raises(AccessDeniedError, match="not public"),
            connections.exchange("x", "GET", f"http://{name}:{port}/b/k", {}, public_only=True),
        ):
            pass
        assert server.asked == []
    finally:
        server.close()


def test_a_connection_that_others_may_have_is_not_taken_by_who_may_not(connections: Connections) -> None:
    server = ObjectServer()
    server.put("k", b"x")
    url = f"{server.url}/b/k"
    try:
        with connections.exchange("x", "HEAD", url, {}) as exchange:
            exchange.finish()
        with (
            pytest.raises(AccessDeniedError, match="not public"),
            connections.exchange("x", "HEAD", url, {}, public_only=True),
        ):
            pass
        assert len(server.asked) == 1
    finally:
        server.close()


def test_a_name_is_looked_up_once_and_what_was_checked_is_connected_to(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that answers otherwise the second time leads nowhere else."""
    server = ObjectServer()
    server.put("k", b"x")
    asked: list[str] = []
    look_up = socket.getaddrinfo

    def rebinding(host: Any, *arguments: Any, **named: Any) -> Any:
        if host == "rebinding.test":
            asked.append(host)
            host = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
        return look_up(host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(addresses, "is_public", lambda address: address == "127.0.0.1")
    try:
        url = f"http://rebinding.test:{server.url.rpartition(':')[2]}/b/k"
        with connections.exchange("x", "HEAD", url, {}, public_only=True) as exchange:
            assert exchange.status == 200
            exchange.finish()
        assert asked == ["rebinding.test"]
    finally:
        server.close()


def test_one_address_that_is_not_public_is_enough_to_refuse_a_name(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 9)) for address in ("8.8.8.8", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with (
        pytest.raises(AccessDeniedError, match=r"both\.test has an address that is not public"),
        connections.exchange("x", "GET", "https://both.test/k", {}, public_only=True),
    ):
        pass


def test_a_proxy_is_not_asked_for_what_is_not_public(
    connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = ObjectServer()
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("http_proxy", proxy.url)
    try:
        with (
            pytest.raises(AccessDeniedError, match="not public"),
            connections.exchange("x", "GET", "http://169.254.169.254/latest", {}, public_only=True),
        ):
            pass
        assert proxy.asked == []
    finally:
        proxy.close()
