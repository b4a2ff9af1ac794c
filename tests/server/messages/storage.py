"""Where files and objects are, who may read them, and what storage answers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from botocore.exceptions import (
    ClientError,
    ConfigParseError,
    CredentialRetrievalError,
    InvalidConfigError,
    PartialCredentialsError,
    ProfileNotFound,
    RefreshWithMFAUnsupportedError,
    UnauthorizedSSOTokenError,
)

from penstock.server.sources import Access, too_slow
from penstock.server.sources.file.local_file import open_file
from penstock.server.sources.file.paths import local_path
from penstock.server.sources.file.tree import walk
from penstock.server.sources.looking import too_many_names
from penstock.server.sources.objects.keys import check_access
from penstock.server.sources.objects.service import Answer
from penstock.server.sources.s3.answers import Said, failure
from penstock.server.sources.s3.credentials import credentials_failure, no_credentials
from penstock.server.sources.s3.location import parse

from ..support import ROOT, checkpoint_bytes
from . import catalog, provoked, resolved, said

GOOD = checkpoint_bytes([4])
USER = Access(uid=1000, privileged=False, prefixes=("/nowhere", "s3://other"))


def opened(*, link: str, access: Access | None = None) -> Callable[[], object]:
    """Opens a link in a directory that others may read."""

    def provoke() -> object:
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "m.safetensors"
            path.symlink_to(link)
            return open_file(str(path), access or Access(uid=1000, privileged=False, prefixes=(name,)))

    return provoke


def answered(
    status: int, code: str = "", *, key: str = "s3://b/k", listing: bool = False
) -> Callable[[], object]:
    body = f"<Error><Code>{code}</Code></Error>".encode()
    return lambda: failure(Said.of(Answer(status, {}, body)), parse(key), listing=listing)


def a_fifo() -> object:
    with tempfile.TemporaryDirectory() as name:
        os.mkfifo(f"{name}/fifo")
        return open_file(f"{name}/fifo", ROOT)


CREDENTIALS = [
    (
        PartialCredentialsError(provider="env", cred_var="X"),
        "those of env are partial, X is missing",
        "set it",
    ),
    (ProfileNotFound(profile="x"), "is in no configuration file", "create it, or name another"),
    (UnauthorizedSSOTokenError(), "single sign-on has expired", "run aws sso login"),
    (RefreshWithMFAUnsupportedError(), "wants a code of a second factor", "choose another role"),
    (InvalidConfigError(error_msg='The profile "x" is odd.'), "'The profile is odd'", "correct the profile"),
    (ConfigParseError(path="x"), "is missing or cannot be parsed", "correct it"),
    (ClientError({"Error": {"Code": "E"}}, "AssumeRole"), "AWS answers AssumeRole with E", "check the role"),
    (CredentialRetrievalError(provider="p", error_msg="x"), "the provider p failed", "check it"),
]


def without_credentials(error: Exception) -> Callable[[], object]:
    return lambda: credentials_failure(error, "s3://b/k")


def located(source: str) -> Callable[[], object]:
    def provoke() -> object:
        with catalog() as (made, _):
            return made.location(source)

    return provoke


def listed(*, link: str = "", mode: int = 0o755) -> Callable[[], object]:
    """What a user gets of a tree with a link, or with a mode."""

    def provoke() -> object:
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "d").mkdir()
            (Path(name) / "d" / "link").symlink_to(link or "nowhere")
            os.chmod(Path(name) / "d", mode)
            os.chown(name, os.getuid(), os.getgid())
            os.chmod(name, 0o755)
            access = Access(uid=os.getuid() + 1, privileged=False, prefixes=(name,), for_fetch=True)
            return list(walk(name, access, lambda name: name.endswith("/"), lambda _: nullcontext()))

    return provoke


EXAMPLES = [
    provoked(
        listed(link=".."), "link/", "leads to a directory that holds it", "remove the link, or leave it"
    ),
    provoked(listed(mode=0o700), "/d", "its mode 0700 does not let it", "change the mode, or leave it out"),
    provoked(
        lambda: list(walk(__file__, ROOT, bool, lambda _: nullcontext())),
        __file__,
        "is a file, and no directory",
        "name a directory",
    ),
    provoked(lambda: too_many_names("/m"), "/m", "holds more than 100000 names", "name a directory below it"),
    said(
        "s3://b/k",
        ": the store names its version by 2000 characters (ETag, Last-Modified), more than 1024; ",
        "have it send a shorter ETag",
    ),
    said(
        "s3://b/k",
        ": the store says that it has 9999999999999999999 bytes, more than any object can have; ",
        "check the endpoint",
    ),
    provoked(resolved({}, "../\0"), "sources: ", "holds a NUL character", "remove it"),
    provoked(lambda: local_path("file://["), "file://[", "is neither a path nor a URI", "write one"),
    provoked(lambda: local_path("file://h/x"), "file://h/x", "is not of the form file:///", "write it so"),
    provoked(located("S3://b/k"), "'S3://b/k'", "sources", "write s3:// in lower case"),
    provoked(located("ftp://b/k"), "'ftp://b/k'", "knows no ftp:// sources", "use a path or s3://"),
    provoked(lambda: local_path("model"), "'model'", "is a relative path", "make it absolute"),
    provoked(lambda: open_file("/nowhere/x", ROOT), "/nowhere/x", "does not exist where", "check the path"),
    provoked(lambda: open_file("/else/x", USER), "/else/x", "uid 1000 may not load", "start it with one"),
    provoked(
        lambda: open_file("/" + "x" * 300, ROOT), "/xxx", "is too long for a path", "name a shorter one"
    ),
    provoked(a_fifo, "fifo", "is not a regular file", "name one"),
    provoked(
        opened(link="gone"), "m.safetensors", "is a link to gone, which does not exist", "mount or fetch"
    ),
    provoked(opened(link="/etc/passwd"), "m.safetensors", "leaves the allowed directory", "make it relative"),
    provoked(opened(link="m.safetensors"), "m.safetensors", "follows too many links", "name the file itself"),
    said("/m/x: penstockd (uid 65534)", " may not read it; ", "check its permissions"),
    said("/m/x", " is not a regular file; ", "name one"),
    said("/m/x", " cannot be opened: Input/output error; ", "check the file system"),
    said(
        "/m/x",
        " cannot be opened: a process has a lease on it (F_SETLEASE), or renames directories all the time; ",
        "end that process, or try again later",
    ),
    said("/m", " cannot be listed: Input/output error; ", "check the file system"),
    said("/m/x: reading at byte 9", " failed: Input/output error; ", "check the file system"),
    said("/m/x: asking for its size and times", " failed: Stale file handle; ", "check the file system"),
    said("/m/x", " was changed while it was read (it ended early); ", "load it again"),
    said("s3://b/k", " was changed while it was read; ", "load it again"),
    provoked(
        lambda: too_slow("/m/x", 9),
        "/m/x",
        "storage is too slow: reading had reached byte 9 when its time limit passed",
        "check whether it answers",
    ),
    said(
        "/m",
        " cannot be opened: threads wait for 64 other mounts already; ",
        "see penstock status for those that hang, or try again later",
    ),
    said(
        "/m/x",
        " cannot be opened: penstockd has as many files open as it may (9), and needs two for each file "
        "of a load; ",
        "raise the limit where it starts (ulimit -n, LimitNOFILE=), or load fewer files at a time",
    ),
    said(
        "/m/x",
        " cannot be opened: the machine has as many files open as it allows; ",
        "raise the sysctl fs.file-max",
    ),
    said("s3://b/k/", ": no object lies below it; ", "check the URI, and that it names a directory"),
    said("s3://b/k?versionId=1", " is a version of one object, and no directory; ", "name a directory"),
    # ---- S3
    provoked(lambda: parse("s3://-/k"), "s3://-/k", "is not of the form s3://bucket/key", "write it so"),
    provoked(lambda: parse("s3://b/k?versionId=/"), "s3://b/k", "ends in no version id", "correct it"),
    provoked(lambda: parse("s3://b/\udcff"), "s3://b/", "is no text", "write it in UTF-8"),
    provoked(lambda: parse("s3://b/\0"), "s3://b/", "holds a NUL character", "remove it"),
    provoked(
        lambda: parse("s3://b/" + "x" * 2000), "s3://b/", "has a key of 2000 bytes", "name a shorter one"
    ),
    provoked(
        lambda: parse("s3://arn:aws:s3:::x/k"), "arn:aws:s3:::x", "is an ARN", "write the access point's"
    ),
    provoked(
        lambda: parse("s3://x--a--x-s3/k"),
        "x--a--x-s3",
        "is a directory bucket of S3 Express",
        "copy the checkpoint",
    ),
    provoked(
        lambda: check_access(parse("s3://b/k"), USER),
        "s3://b/k",
        "uid 1000 may not load",
        "start it with one",
    ),
    provoked(
        lambda: check_access(parse("s3://b/../k"), USER),
        "s3://b/../k",
        "its key has a '.'",
        "rename the object",
    ),
    provoked(answered(404), "s3://b/k", "it does not exist", "check the URI and the endpoint"),
    provoked(answered(412), "s3://b/k", "was changed while it was read", "load it again"),
    provoked(
        answered(403, "AccessDenied"),
        "s3://b/k",
        "HTTP 403 AccessDenied",
        "give penstockd's credentials s3:GetObject",
    ),
    provoked(
        answered(403, "AccessDenied", listing=True),
        "s3://b/k",
        "HTTP 403 AccessDenied",
        "name the files or their index",
    ),
    provoked(answered(403, "ExpiredToken"), "s3://b/k", "have expired", "refresh them"),
    provoked(
        answered(405, key="s3://b/k?versionId=1"),
        "s3://b/k",
        "that version is a delete marker",
        "name another",
    ),
    provoked(answered(301), "s3://b/k", "the bucket is elsewhere", "set AWS_REGION"),
    provoked(answered(418), "s3://b/k", "it refuses the request", "check the endpoint"),
    provoked(lambda: no_credentials("s3://b/k"), "s3://b/k", "has no AWS credentials", "give it some"),
    *(
        provoked(without_credentials(error), "s3://b/k", wrong, remedy)
        for error, wrong, remedy in CREDENTIALS
    ),
    said(
        "s3://b/k",
        ": s3:// sources need boto3 (No module named 'boto3'); ",
        "install penstock[server] where penstockd runs",
    ),
    said("sources: 's3://b/k'", " cannot be asked of S3: it is no bucket or key; ", "correct it"),
    said("S3: the CA bundle /ca.pem", " cannot be used: no such file; ", "check AWS_CA_BUNDLE"),
    said("s3://b/", " names no object; ", "add a key to it"),
    said("s3://b/p/", " holds more than 100000 names; ", "name the files or their index"),
    said(
        "s3://b/k: the certificate of host",
        " is not trusted: self-signed certificate; ",
        "if its authority is private, name its bundle in AWS_CA_BUNDLE (S3) or REQUESTS_CA_BUNDLE",
    ),
    said(
        "s3://b/k",
        ": the store gives it neither a strong ETag nor a Last-Modified, so that a change while it is read "
        "could not be noticed; ",
        "use a store that does",
    ),
    said(
        "HTTPS_PROXY",
        " is no URL of a proxy; ",
        "write http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT with each '/', '?', '#', '@' and ':' of "
        "the two as %2F, %3F, %23, %40 and %3A",
    ),
    said(
        "HTTPS_PROXY",
        " names a proxy of the kind socks5://; penstockd can use http:// ones, for https too; ",
        "set one",
    ),
    said("s3://b/k", ": the proxy p:1 answered 407; ", "check HTTPS_PROXY, its user and password"),
    said(
        "s3://b/k",
        ": reading at byte 9 failed 8 times in a row, at last: HTTP 503; ",
        "check the endpoint and the network, or raise --object-retries or --object-timeout",
    ),
    said("penstockd", " stops, and this read was cut off; ", "try again in a moment"),
    said(
        "s3://b/k",
        ": its store cannot be asked, and no earlier load asked for it; ",
        "load it again when the store answers",
    ),
    said(
        "s3://b/k",
        ": its store cannot be asked, and the tier's disk has no bytes from 9 on; ",
        "load it again when the store answers",
    ),
    said(
        "s3://b/k",
        ": its store had nothing there when it was last asked, and does not answer now; ",
        "check the URI, and load it again when the store answers",
    ),
]
