"""Files of web servers: redirects, versions, logins, and servers that cannot be read from."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.server.checkpoint.catalog import Catalog
from penstock.server.errors import (
    AccessDeniedError,
    CheckpointNotFoundError,
    InvalidRequestError,
    SourceUnavailableError,
)
from penstock.server.sources import Access, RetryingReader, SourceFile
from penstock.server.sources.file.source import FileSource
from penstock.server.sources.objects import ObjectSettings, faults
from penstock.server.sources.web.logins import Logins
from penstock.server.sources.web.source import WebSource
from penstock.server.tier.source import TieredFile, TieredSource

from ....s3.authority import Authority
from ....s3.proxy import Answer, Exchange, FaultProxy
from ...nginx import nginx
from ...support import checkpoint_bytes, until_true
from ...tier.bench import tier_in

CONTENT = random.Random(3).randbytes(400_000)
ROOT = Access(uid=0, privileged=True, prefixes=())
LOCATIONS = """
location /led/ { rewrite ^/led/(.*) /$1 redirect; }
location /round/ { return 302 /round/; }
location /no-etag/ { alias FILES/; etag off; }
location /nothing/ { alias FILES/; etag off; add_header Last-Modified ""; }
location /no-ranges/ { alias FILES/; max_ranges 0; }
location /forbidden/ { deny all; }
location /for-members/ { alias FILES/; auth_basic members; auth_basic_user_file STATE/members; }
location /to-members/ { return 307 /for-members/x; }
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("files")
    (path / "x").write_bytes(CONTENT)
    return path


@pytest.fixture(scope="module")
def port(
    files: Path, tmp_path_factory: pytest.TempPathFactory, require_tool: Callable[[str], str]
) -> Iterator[int]:
    state = tmp_path_factory.mktemp("state")
    (state / "members").write_text("anne:{PLAIN}secret\n")
    locations = LOCATIONS.replace("FILES", str(files)).replace("STATE", str(state))
    with nginx(require_tool("nginx"), files, state, locations) as port:
        yield port


@pytest.fixture
def site(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """nginx, behind what records requests."""
    monkeypatch.setattr(faults, "FIRST_DELAY_SECONDS", 0.0)
    monkeypatch.setenv("NETRC", os.devnull)
    with contextlib.closing(FaultProxy(port)) as proxy:
        yield proxy


@pytest.fixture
def source() -> Iterator[WebSource]:
    settings = ObjectSettings(retries=3, timeout_seconds=20.0, connections=4)
    with ThreadPoolExecutor(4) as workers:
        made = WebSource(settings, lambda uid: workers, lambda reason: None)
        yield made
        made.stop()


def user(*prefixes: str) -> Access:
    return Access(uid=1000, privileged=False, prefixes=prefixes)


def read(file: SourceFile, start: int = 0) -> bytes:
    buffer = bytearray(file.size_bytes - start)
    RetryingReader(file).read_into(start, [memoryview(buffer)])
    return bytes(buffer)


def content(source: WebSource, url: str, access: Access = ROOT) -> bytes:
    with contextlib.closing(source.open(url, access)) as file:
        return read(file)


def test_no_answer_is_compressed(site: FaultProxy, source: WebSource) -> None:
    """This nginx compresses all that may be."""
    assert content(source, f"{site.endpoint}/x") == CONTENT
    assert {request.headers["Accept-Encoding"] for request in site.requests()} == {"identity"}


def test_an_index_brings_its_files_whatever_they_are_called(
    site: FaultProxy, source: WebSource, files: Path
) -> None:
    names = ["model 1.safetensors", "sub/50%25+é.safetensors"]
    for number, name in enumerate(names):
        (files / name).parent.mkdir(exist_ok=True)
        (files / name).write_bytes(checkpoint_bytes([10], prefix=f"{number}-"))
    index = {"weight_map": {"0-0": names[0], "1-0": names[1]}}
    (files / "model.safetensors.index.json").write_text(json.dumps(index))
    with ThreadPoolExecutor(2) as workers:
        catalog = Catalog([FileSource(lambda path, uid: workers), source])
        url = f"{site.endpoint}/model.safetensors.index.json"
        with contextlib.closing(catalog.resolve([url], ROOT)) as checkpoint:
            assert [list(table.names()) for table in checkpoint.tables] == [["0-0"], ["1-0"]]


# ---- redirects ----------------------------------------------------------------------------------


def test_a_redirect_is_followed_and_remembered(site: FaultProxy, source: WebSource) -> None:
    with contextlib.closing(source.open(f"{site.endpoint}/led/x", ROOT)) as file:
        assert read(file) == CONTENT
        assert read(file, 100) == CONTENT[100:]
        assert file.uri == f"{site.endpoint}/led/x"
    assert len([request for request in site.requests() if request.path == "/led/x"]) == 1


def test_redirects_without_end_are_given_up(site: FaultProxy, source: WebSource) -> None:
    with pytest.raises(SourceUnavailableError, match="leads on more than 5 times"):
        source.open(f"{site.endpoint}/round/x", ROOT)
    assert len(site.requests()) == 6


def test_where_a_redirect_led_is_asked_for_again_when_its_time_is_over(
    site: FaultProxy, source: WebSource
) -> None:
    with contextlib.closing(source.open(f"{site.endpoint}/led/x", ROOT)) as file:
        site.on(lambda request: request.path == "/x", lambda exchange: exchange.send(Answer(403, [], b"")))
        assert read(file) == CONTENT
    assert len([request for request in site.requests() if request.path == "/led/x"]) == 2


def test_a_user_is_led_below_a_prefix_or_to_public_hosts_alone(site: FaultProxy, source: WebSource) -> None:
    url, there = f"{site.endpoint}/led/x", f"{site.endpoint}/x"
    assert content(source, url, user(f"{site.endpoint}/led", there)) == CONTENT
    site.reset()
    for prefixes in ([f"{site.endpoint}/led"], [f"{site.endpoint}/led", "https://"]):
        with pytest.raises(AccessDeniedError, match="by plain http"):
            source.open(url, user(*prefixes))
    assert not [request for request in site.requests() if request.path == "/x"]


def test_a_user_whom_a_prefix_lets_to_every_host_is_let_to_public_ones(
    site: FaultProxy, source: WebSource
) -> None:
    url = site.endpoint.replace("http://", "https://") + "/x"
    with pytest.raises(AccessDeniedError, match="not public"):
        source.open(url, user("https://"))
    with pytest.raises(AccessDeniedError, match="may not load"):
        source.open(f"{site.endpoint}/x", user("https://"))
    assert site.requests() == []


# ---- versions -----------------------------------------------------------------------------------


def test_without_an_etag_the_time_of_the_last_change_is_the_version(
    site: FaultProxy, source: WebSource
) -> None:
    assert content(source, f"{site.endpoint}/no-etag/x") == CONTENT
    conditions = {request.headers["If-Unmodified-Since"] for request in site.requests()}
    assert len(conditions - {None}) == 1


def test_a_weak_etag_is_no_condition(site: FaultProxy, source: WebSource) -> None:
    def weaken(exchange: Exchange) -> None:
        exchange.send(exchange.upstream().with_header("ETag", 'W/"1"'))

    site.on(lambda request: True, weaken, times=None)
    assert content(source, f"{site.endpoint}/x") == CONTENT
    assert {request.headers["If-Match"] for request in site.requests()} == {None}


def test_what_says_nothing_of_its_version_is_refused(site: FaultProxy, source: WebSource) -> None:
    with pytest.raises(SourceUnavailableError, match="neither a strong ETag nor a Last-Modified"):
        source.open(f"{site.endpoint}/nothing/x", ROOT)


def test_a_server_without_ranges_is_refused_at_once_with_what_to_do(
    site: FaultProxy, source: WebSource
) -> None:
    with pytest.raises(SourceUnavailableError, match=r"gives no parts of a file.*such as nginx"):
        source.open(f"{site.endpoint}/no-ranges/x", ROOT)
    assert len(site.requests()) == 1


@pytest.mark.parametrize("path", ["x", "no-etag/x"])
def test_a_file_that_a_server_changed_a_moment_ago_is_read_and_not_kept(
    path: str, site: FaultProxy, source: WebSource, files: Path, tmp_path: Path
) -> None:
    """The ETag of nginx has seconds: another write within this one would not give it another."""
    now = time.time()
    with tier_in(tmp_path / "tier") as tier:
        tiered = TieredSource(source, tier)
        for age, kept in ((-60, False), (60, True)):
            os.utime(files / "x", (now - age, now - age))
            with contextlib.closing(tiered.open(f"{site.endpoint}/{path}", ROOT)) as file:
                assert isinstance(file, TieredFile)
                assert read(file) == CONTENT
                until_true(lambda: not tier.waiting_bytes)
                assert file.has(0, file.size_bytes) is kept


def test_python_s_own_server_is_one_without_ranges(source: WebSource, files: Path) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Nothing."""

    handler = functools.partial(Quiet, directory=str(files))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        with pytest.raises(SourceUnavailableError, match="gives no parts of a file"):
            source.open(f"http://127.0.0.1:{server.server_port}/x", ROOT)
        server.shutdown()


# ---- logins -------------------------------------------------------------------------------------


def test_a_login_goes_to_its_host_and_to_no_other(
    site: FaultProxy, port: int, source: WebSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("default login d password everybody\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with pytest.raises(AccessDeniedError, match=r"HTTP 401.*netrc"):
        source.open(f"{site.endpoint}/for-members/x", ROOT)
    netrc.write_text("machine 127.0.0.1 login anne password secret\n")
    assert content(source, f"{site.endpoint}/for-members/x") == CONTENT
    # nginx leads on under its own name, which is another port, and so another server.
    site.reset()
    with contextlib.closing(FaultProxy(port)) as other:

        def lead(exchange: Exchange) -> None:
            exchange.send(Answer(302, [("Location", f"{other.endpoint}/for-members/x")], b""))

        site.on(lambda request: True, lead, times=None)
        with pytest.raises(AccessDeniedError, match="HTTP 401"):
            source.open(f"{site.endpoint}/elsewhere", ROOT)
        assert site.requests()[0].headers["Authorization"]
        assert {request.headers["Authorization"] for request in other.requests()} == {None}


def test_the_default_login_is_for_no_host_not_even_one_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine h login anne password secret\ndefault login d password everybody\n")
    monkeypatch.setenv("NETRC", str(netrc))
    logins = Logins()
    assert logins.header("h") == {"Authorization": "Basic YW5uZTpzZWNyZXQ="}
    assert logins.header("default") == logins.header("other") == {}
    netrc.unlink()
    assert logins.header("h") == {}


def test_of_a_netrc_file_that_is_malformed_only_the_line_is_told(
    site: FaultProxy, source: WebSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine h login anne passwort SECRET\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with pytest.raises(SourceUnavailableError, match="line 1 is malformed") as refused:
        source.open(f"{site.endpoint}/x", ROOT)
    assert "SECRET" not in str(refused.value)


# ---- errors -------------------------------------------------------------------------------------


def test_what_a_server_refuses_is_told_with_what_to_do(site: FaultProxy, source: WebSource) -> None:
    with pytest.raises(AccessDeniedError, match="HTTP 403: penstockd may not read it"):
        source.open(f"{site.endpoint}/forbidden/x", ROOT)
    with pytest.raises(CheckpointNotFoundError, match="HTTP 404: it does not exist"):
        source.open(f"{site.endpoint}/none", ROOT)


def test_secrets_in_urls_are_refused_and_not_told(source: WebSource) -> None:
    for url in ("https://anne:SECRET@h/x", "https://h/x?token=SECRET", "https://h/x#SECRET"):
        with pytest.raises(InvalidRequestError, match="netrc") as refused:
            source.location(url)
        assert "SECRET" not in str(refused.value)


# ---- TLS ----------------------------------------------------------------------------------------


def test_certificates_are_verified(
    port: int, source: WebSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: FaultProxy
) -> None:
    authority = Authority(tmp_path)
    with contextlib.closing(FaultProxy(port, tls=authority.server("127.0.0.1"))) as https:
        with pytest.raises(SourceUnavailableError, match=r"is not trusted.*REQUESTS_CA_BUNDLE"):
            source.open(f"{https.endpoint}/x", ROOT)
        assert https.requests() == []
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.bundle))
        trusting = WebSource(source._settings, source._workers, lambda reason: None)
        try:
            assert content(trusting, f"{https.endpoint}/x", user(f"{https.endpoint}/")) == CONTENT
        finally:
            trusting.stop()
