"""The Hub and web servers: what URIs name, who may load it, and what is answered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from penstock.server.errors import PenstockError
from penstock.server.sources import Access
from penstock.server.sources.hub import answers as hub
from penstock.server.sources.hub import location as hf
from penstock.server.sources.hub import tree
from penstock.server.sources.hub.settings import HubSettings
from penstock.server.sources.objects.addresses import not_public
from penstock.server.sources.objects.reach import Reach
from penstock.server.sources.objects.service import Answer
from penstock.server.sources.web import answers as web
from penstock.server.sources.web.location import admitted, parse
from penstock.server.sources.web.source import _no_lists

from ...error_rule import Example
from . import provoked, said
from .configuration import started

USER = Access(uid=1000, privileged=False, prefixes=("https://h/models", "hf://org/other"))
FILE = hf.parse("hf://org/repo/x")
PINNED = replace(FILE, commit="0123456789" * 4)


def of_hub(status: int, code: str, *, pinned: bool = False, token: bool = False) -> Callable[[], object]:
    answer = Answer(status, {"x-error-code": code}, b"")
    return lambda: hub.failure(answer, PINNED if pinned else FILE, "hub.example", has_token=token)


def of_storage(status: int) -> Callable[[], object]:
    return lambda: hub.storage_failure(Answer(status, {}, b""), FILE)


def of_server(status: int) -> Callable[[], PenstockError | object]:
    return lambda: web.failure(Answer(status, {}, b""), "https://h/x")


def led(url: str) -> Callable[[], object]:
    return lambda: Reach.of(USER).way(url, "https://h/models/x")


def url(text: str, wrong: str, remedy: str) -> Example:
    return provoked(lambda: parse(text), "sources: 'http", wrong, remedy)


EXAMPLES = [
    # ---- URIs of the Hub
    provoked(
        lambda: hf.parse("hf://datasets/x/y"), "hf://datasets/x/y", "is of the Hub's datasets", "name one"
    ),
    provoked(lambda: hf.parse("hf://org"), "'hf://org'", "is not of the form hf://org/repo", "write it so"),
    provoked(lambda: hf.parse("hf://o/r@a b"), "'hf://o/r@a b'", "names no revision", "write a branch"),
    provoked(lambda: hf.parse("hf://o/r/\udcff"), "hf://o/r/", "is no text", "write it in UTF-8"),
    provoked(lambda: hf.parse("hf://o/r/\0"), "hf://o/r/", "holds a NUL character", "remove it"),
    provoked(
        lambda: hf.parse("hf://o/r/" + "x" * 5000),
        "hf://o/r/",
        "has a path of 5000 bytes",
        "name a shorter one",
    ),
    provoked(started("--allow", "hf://-"), "'hf://-'", "names no organisation of the Hub", "write hf://org"),
    provoked(
        lambda: hf.admitted(FILE, USER), "hf://org/repo/x", "uid 1000 may not load", "start it with one"
    ),
    provoked(
        lambda: hf.admitted(hf.parse("hf://org/other/../x"), USER),
        "hf://org/other/../x",
        "its path has a '.' or '..'",
        "name it without",
    ),
    # ---- answers of the Hub
    provoked(of_hub(403, "GatedRepo"), "org/repo", "is gated", "ask for access"),
    provoked(of_hub(401, "RepoNotFound"), "org/repo", "there is no repository", "check the name"),
    provoked(of_hub(404, "RevisionNotFound"), "hf://org/repo/x", "has no revision 'main'", "name a branch"),
    provoked(of_hub(404, "RevisionNotFound", pinned=True), "hf://org/repo/x", "has gone", "load it again"),
    provoked(
        of_hub(401, "", token=True), "hub.example", "does not accept penstockd's token", "set HF_TOKEN anew"
    ),
    provoked(of_hub(403, ""), "hf://org/repo/x", "penstockd may not read org/repo", "check the rights"),
    provoked(of_hub(404, ""), "hf://org/repo/x", "it does not exist", "check the URI"),
    provoked(of_hub(418, ""), "hf://org/repo/x", "it refuses the request", "check HF_ENDPOINT"),
    provoked(of_storage(412), "hf://org/repo/x", "was changed while it was read", "load it again"),
    provoked(of_storage(403), "hf://org/repo/x", "the Hub's storage says HTTP 403", "check that no proxy"),
    provoked(
        lambda: hub.other_content(PINNED), "hf://org/repo/x", "was changed while it was read", "load it"
    ),
    provoked(lambda: hub.no_such_file(PINNED), "hf://org/repo/x", "has no such file", "check the path"),
    provoked(lambda: hub.not_cached(FILE), "hf://org/repo/x", "is not in the Hub's cache", "fetch it into"),
    provoked(lambda: tree.too_many(FILE), "hf://org/repo/x", "has more than 20000 files", "copy those"),
    said("hf://org/repo/", " names no file; ", "add the path of one to it"),
    said("hf://org/repo/d/", ": nothing lies below it; ", "check the URI, and that it names a directory"),
    # ---- its settings
    provoked(
        lambda: HubSettings.of({"HF_TOKEN": "é"}).current_token(),
        "HF_TOKEN",
        "holds no token of the Hub",
        "write one there",
    ),
    provoked(lambda: HubSettings.of({"HF_ENDPOINT": "hub"}), "HF_ENDPOINT", "cannot be used", "write it so"),
    said(
        "the token file /x of the Hub",
        " cannot be read: Permission denied; ",
        "correct it, or set HF_TOKEN",
    ),
    # ---- URLs
    url("https://", "names no host", "write it as https://host/path"),
    url("http:/x", "is no URL of the form https://host/path", "write it so"),
    url("https://h/x?y", "has a query or a fragment", "name the file by its plain URL"),
    url("https://u:p@h/x", "holds a user or a password", "put them into penstockd's netrc file"),
    url("https://h:99999/x", "names a port above 65535", "correct it"),
    provoked(lambda: parse("https://h/\0"), "https://h/", "holds a NUL character", "remove it"),
    provoked(started("--allow", "http://"), "'http://'", "names no host", "add one"),
    provoked(
        lambda: admitted(parse("https://h/x"), USER),
        "https://h/x",
        "uid 1000 may not load",
        "start it with one",
    ),
    provoked(
        lambda: admitted(parse("https://h/models/../x"), USER),
        "https://h/models/../x",
        "its path has a '.' or '..'",
        "rename the file",
    ),
    provoked(
        led("http://h2/x"), "https://h/models/x", "the server leads to h2 by plain http", "have it use https"
    ),
    provoked(lambda: not_public("h"), "h has", "an address that is not public", "start penstockd with"),
    # ---- answers of web servers
    provoked(of_server(401), "https://h/x", "it wants a login", "put one for the host"),
    provoked(of_server(403), "https://h/x", "penstockd may not read it", "check its login"),
    provoked(of_server(404), "https://h/x", "it does not exist", "check the URL"),
    provoked(of_server(412), "https://h/x", "was changed while it was read", "load it again"),
    provoked(of_server(302), "https://h/x", "it leads on more than 5 times", "name the URL that it ends at"),
    provoked(of_server(418), "https://h/x", "it refuses the request", "check the URL and the server"),
    provoked(lambda: web.no_ranges("https://h/x"), "https://h/x", "gives no parts of a file", "use a server"),
    provoked(
        lambda: web.no_version("https://h/x"), "https://h/x", "neither a strong ETag nor", "make the server"
    ),
    provoked(lambda: _no_lists("https://h/d/"), "https://h/d/", "is a directory", "name a file, or an index"),
    said(
        "the netrc file /x, which has penstockd's logins for web servers,",
        " cannot be used: line 1 is malformed; ",
        "correct it, or name another by NETRC",
    ),
]
