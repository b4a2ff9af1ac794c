"""What the Hub is asked, how often, and with which token."""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from penstock.server.errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointInvalidError,
    CheckpointNotFoundError,
    PenstockError,
    SourceUnavailableError,
)
from penstock.server.sources import Access, RetryingReader, SourceFile
from penstock.server.sources.hub import tree
from penstock.server.sources.hub.answers import wait_seconds
from penstock.server.sources.hub.api import HubApi, until
from penstock.server.sources.hub.location import parse
from penstock.server.sources.hub.settings import HubSettings
from penstock.server.sources.hub.source import HubSource
from penstock.server.sources.objects import ObjectSettings
from penstock.server.sources.objects.faults import Transient
from penstock.server.sources.objects.service import Answer

from ...hub_server import Call, HubServer, huggingface_hub_online
from .conftest import Sources

CONTENT = random.Random(3).randbytes(400_000)
WEIGHTS = "model.safetensors"
REPOSITORY = "org/repo"
TOP = f"hf://{REPOSITORY}"


def root() -> Access:
    """Of a new load."""
    return Access(uid=0, privileged=True, prefixes=())


def user(*prefixes: str) -> Access:
    return Access(uid=1000, privileged=False, prefixes=prefixes)


def read(file: SourceFile, start: int = 0, end: int | None = None) -> bytes:
    buffer = bytearray((file.size_bytes if end is None else end) - start)
    RetryingReader(file).read_into(start, [memoryview(buffer)])
    return bytes(buffer)


def content(source: HubSource, location: str, access: Access | None = None) -> bytes:
    with contextlib.closing(source.open(location, access or root())) as file:
        return read(file)


# ---- the server is one --------------------------------------------------------------------------


def test_huggingface_hub_takes_the_tests_server_for_a_hub(hub: HubServer, tmp_path: Path) -> None:
    with huggingface_hub_online():
        _check_hub(hub, tmp_path)


def _check_hub(hub: HubServer, tmp_path: Path) -> None:
    files = {WEIGHTS: CONTENT, "config.json": b"{}", "sub/é ü.safetensors": CONTENT[:1000]}
    sha = hub.commit(REPOSITORY, files)
    hub.page_size = 2
    api = huggingface_hub.HfApi(endpoint=hub.url, token=False)
    assert api.model_info(REPOSITORY).sha == sha
    listed = {item.path: item for item in api.list_repo_tree(REPOSITORY, recursive=True)}
    assert set(files) <= set(listed)
    weights = listed[WEIGHTS]
    assert isinstance(weights, huggingface_hub.hf_api.RepoFile)
    assert weights.lfs is not None
    assert weights.lfs.sha256 == hashlib.sha256(CONTENT).hexdigest()
    folder = Path(api.snapshot_download(REPOSITORY, cache_dir=tmp_path))
    assert {name: (folder / name).read_bytes() for name in files} == files
    hub.repositories["org/gated"] = hub.repositories["org/private"] = hub.repositories[REPOSITORY]
    for repository, revision, name, error in (
        ("org/none", "main", WEIGHTS, RepositoryNotFoundError),
        (REPOSITORY, "none", WEIGHTS, RevisionNotFoundError),
        (REPOSITORY, "main", "none", EntryNotFoundError),
    ):
        with pytest.raises(error):
            api.hf_hub_download(repository, name, revision=revision, cache_dir=tmp_path)
    hub.repositories[REPOSITORY].gated = True
    with pytest.raises(GatedRepoError):
        api.hf_hub_download(REPOSITORY, WEIGHTS, cache_dir=tmp_path / "other")


# ---- how often ----------------------------------------------------------------------------------


def test_a_load_asks_for_a_commit_and_a_tree_once_and_for_each_file_once(
    hub: HubServer, source: HubSource
) -> None:
    files = {f"model-{number}.safetensors": CONTENT[number:] for number in range(3)}
    hub.commit(REPOSITORY, files)
    load = root()
    names = source.list(TOP, load)
    assert names == sorted(files)
    with ThreadPoolExecutor(8) as threads:
        opened = [source.open(source.join(TOP, name), load) for name in names]
        parts = [
            (file, start, threads.submit(read, file, start, start + 50_000))
            for file in opened
            for start in range(0, 350_000, 50_000)
        ]
        for file, start, part in parts:
            assert part.result(60) == files[file.uri.rpartition("/")[2]][start : start + 50_000]
    assert (hub.asks("/revision/"), hub.asks("/tree/"), hub.asks("/resolve/")) == (1, 1, 3)


def test_a_load_of_what_is_known_asks_for_the_commit_alone(hub: HubServer, source: HubSource) -> None:
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT})
    content(source, f"{TOP}/{WEIGHTS}")
    hub.asked.clear()
    hub.stored.clear()
    with contextlib.closing(source.open(f"{TOP}/{WEIGHTS}", root())) as file:
        assert file.size_bytes == len(CONTENT)
        assert hub.stored == []
        assert read(file) == CONTENT
    assert [call.path for call in hub.asked] == [f"/api/models/{REPOSITORY}/revision/main"]


def test_a_commit_that_is_named_is_not_asked_for(hub: HubServer, source: HubSource) -> None:
    first = hub.commit(REPOSITORY, {WEIGHTS: CONTENT})
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT[::-1]})
    assert content(source, f"{TOP}@{first}/{WEIGHTS}") == CONTENT
    assert hub.asks("/revision/") == 0


def test_a_branch_that_moves_is_one_commit_for_all_of_a_load(hub: HubServer, source: HubSource) -> None:
    hub.commit(REPOSITORY, {"a.safetensors": CONTENT, "b.safetensors": CONTENT})
    load = root()
    with contextlib.closing(source.open(f"{TOP}/a.safetensors", load)) as file:
        assert read(file, 0, 1000) == CONTENT[:1000]
        hub.commit(REPOSITORY, {"a.safetensors": CONTENT[::-1], "b.safetensors": CONTENT[::-1]})
        assert read(file, 200_000) == CONTENT[200_000:]
        assert content(source, f"{TOP}/b.safetensors", load) == CONTENT
        assert content(source, f"{TOP}@main/b.safetensors") == CONTENT[::-1]
        with contextlib.closing(source.open(f"{TOP}/a.safetensors", root())) as again:
            assert again.version != file.version


def test_a_commit_that_leaves_the_weights_as_they_were_leaves_their_version(
    hub: HubServer, source: HubSource
) -> None:
    versions = []
    for text in (b"one", b"two"):
        hub.commit(REPOSITORY, {WEIGHTS: CONTENT, "README.md": text})
        with contextlib.closing(source.open(f"{TOP}/{WEIGHTS}", root())) as file:
            versions.append(file.version)
            assert [one.value for one in file.checksums] == [hashlib.sha256(CONTENT).hexdigest()]
    assert versions[0] == versions[1]


def test_branches_tags_and_pull_requests_are_revisions(hub: HubServer, source: HubSource) -> None:
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT})
    for ref, written in (("v1.0", "v1.0"), ("refs/pr/7", "refs/pr/7"), ("dev/x", "dev%2Fx")):
        hub.commit(REPOSITORY, {WEIGHTS: ref.encode()}, ref=ref)
        location = f"{TOP}@{written}/{WEIGHTS}"
        assert source.location(location) == location
        assert content(source, location) == ref.encode()


def test_a_repository_is_one_whether_models_stands_before_it_or_not(source: HubSource) -> None:
    assert source.location(f"hf://models/{REPOSITORY}/x") == source.location(f"{TOP}/x") == f"{TOP}/x"


def test_lists_come_in_pages_and_deep_files_belong_to_their_directories(
    hub: HubServer, source: HubSource
) -> None:
    files = {f"m/{number}.safetensors": b"x" for number in range(7)} | {"m/deep/x.safetensors": b"y"}
    hub.commit(REPOSITORY, {**files, "other": b""})
    hub.page_size = 3
    assert source.list(f"{TOP}/m", root()) == [f"{number}.safetensors" for number in range(7)]
    assert source.list(f"{TOP}/m/deep/", root()) == ["x.safetensors"]
    assert source.list(f"{TOP}/other", root()) is None


def test_small_files_come_from_the_hub_itself_and_from_any_offset(hub: HubServer, source: HubSource) -> None:
    hub.commit(REPOSITORY, {"config.json": CONTENT[:90_000]})
    with contextlib.closing(source.open(f"{TOP}/config.json", root())) as file:
        assert read(file, 70_000, 80_000) == CONTENT[70_000:80_000]
        assert read(file) == CONTENT[:90_000]
        assert not file.checksums
    assert hub.stored == []
    assert hub.asks("/resolve/") == 1


def test_a_repository_that_was_renamed_is_followed(hub: HubServer, source: HubSource) -> None:
    hub.commit("new/name", {WEIGHTS: CONTENT, "a.json": b"{}"})
    hub.renamed["org/old"] = "new/name"
    assert content(source, f"hf://org/old/{WEIGHTS}") == CONTENT
    assert content(source, "hf://org/old/a.json") == b"{}"


# ---- addresses that expire ----------------------------------------------------------------------


def test_an_address_that_expired_is_asked_for_again(hub: HubServer, source: HubSource) -> None:
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT})
    with contextlib.closing(source.open(f"{TOP}/{WEIGHTS}", root())) as file:
        read(file, 0, 1000)
        hub.expire()
        assert read(file, 200_000) == CONTENT[200_000:]
    assert hub.asks("/resolve/") == 2


def test_an_address_is_used_until_shortly_before_it_expires() -> None:
    now = time.monotonic()
    assert now + 25 < until("https://h/x?X-Amz-Expires=40") < now + 40
    assert now + 100 < until(f"https://h/x?Expires={int(time.time()) + 300}") < now + 300
    for url in ("https://h/x", "https://h/x?Expires=1", "https://h/x?Expires=x"):  # the clocks may differ
        assert until(url) > now + 1000


def test_storage_that_refuses_new_addresses_too_ends_the_read(hub: HubServer, source: HubSource) -> None:
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT})

    def refuse(call: Call) -> bool:
        call.refuse(403, "")
        return True

    hub.storage_hooks.append(refuse)
    with (
        contextlib.closing(source.open(f"{TOP}/{WEIGHTS}", root())) as file,
        pytest.raises(SourceUnavailableError, match=r"storage says HTTP 403"),
    ):
        read(file)
    assert hub.asks("/resolve/") == 2


def test_a_hub_that_has_another_content_than_it_listed_is_a_change(hub: HubServer, source: HubSource) -> None:
    sha = hub.commit(REPOSITORY, {WEIGHTS: CONTENT})
    with contextlib.closing(source.open(f"{TOP}/{WEIGHTS}", root())) as file:
        hub.repositories[REPOSITORY].commits[sha][WEIGHTS] = CONTENT[::-1]
        with pytest.raises(CheckpointChangedError, match="another content"):
            read(file)


# ---- the token ----------------------------------------------------------------------------------


def test_the_token_goes_to_the_hub_and_never_to_its_storage(
    hub: HubServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.tokens.add("hf_SECRET")
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT, "a.json": b"{}"})
    hub.repositories[REPOSITORY].private = True
    with pytest.raises(CheckpointNotFoundError, match=r"may not see it.*HF_TOKEN"):
        content(sources(), f"{TOP}/{WEIGHTS}")
    hub.asked.clear()
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    source = sources()
    assert content(source, f"{TOP}/{WEIGHTS}") == CONTENT
    assert content(source, f"{TOP}/a.json") == b"{}"
    assert {call.headers.get("authorization") for call in hub.asked} == {"Bearer hf_SECRET"}
    assert hub.stored
    assert not any("authorization" in call.headers or "SECRET" in call.target for call in hub.stored)


def test_a_redirect_of_storage_back_to_the_hub_brings_no_token_there(
    hub: HubServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.tokens.add("hf_SECRET")
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT})
    hub.commit("org/private", {"config.json": CONTENT[:1000]})
    hub.repositories["org/private"].private = True
    secret = f"{hub.url}/org/private/resolve/main/config.json"

    def lead(call: Call) -> bool:
        call.answer(302, b"", {"Location": secret})
        return True

    hub.storage_hooks.append(lead)
    with (
        contextlib.closing(sources().open(f"{TOP}/{WEIGHTS}", root())) as file,
        pytest.raises(PenstockError),
    ):
        read(file)
    led = [call for call in hub.asked if "/org/private/" in call.path or "resolve-cache" in call.path]
    assert led
    assert not any("authorization" in call.headers for call in led)


def test_what_the_hub_leads_on_to_for_storage_brings_no_token_either(
    hub: HubServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that the Hub no longer uses, of a repository that only the token opens."""
    hub.tokens.add("hf_SECRET")
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT})
    hub.commit("org/private", {WEIGHTS: CONTENT[::-1]})
    hub.repositories["org/private"].private = True
    hub.renamed["org/former"] = "org/private"

    def lead(call: Call) -> bool:
        call.answer(302, b"", {"Location": f"{hub.url}/org/former/resolve/main/{WEIGHTS}"})
        return True

    hub.storage_hooks.append(lead)
    with (
        contextlib.closing(sources().open(f"{TOP}/{WEIGHTS}", root())) as file,
        pytest.raises(PenstockError),
    ):
        read(file)
    led = [call for call in hub.asked if "/org/private/" in call.path]
    assert led
    assert not any("authorization" in call.headers for call in led)


def test_a_token_that_is_written_anew_counts_from_then_on(
    hub: HubServer, source: HubSource, tmp_path: Path
) -> None:
    token = tmp_path / "home" / "token"
    token.parent.mkdir(exist_ok=True)
    token.write_text("hf_OLD\n")
    hub.tokens = {"hf_OLD"}
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT})
    assert content(source, f"{TOP}/{WEIGHTS}") == CONTENT
    hub.tokens = {"hf_NEW"}
    with pytest.raises(AccessDeniedError, match="does not accept penstockd's token") as refused:
        source.open(f"{TOP}/{WEIGHTS}", root())
    assert "hf_OLD" not in str(refused.value)
    token.write_text("hf_NEW\n")
    assert content(source, f"{TOP}/{WEIGHTS}") == CONTENT


def test_what_is_no_token_is_refused_and_not_told(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET\r\nX-Other: 1 é")
    with pytest.raises(SourceUnavailableError, match="HF_TOKEN holds no token") as refused:
        sources().open(f"{TOP}/{WEIGHTS}", root())
    assert "SECRET" not in str(refused.value)


# ---- what is missing ----------------------------------------------------------------------------


def test_each_thing_that_is_missing_is_told_with_what_to_do(hub: HubServer, source: HubSource) -> None:
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT})
    hub.commit("org/gated", {WEIGHTS: CONTENT})
    hub.repositories["org/gated"].gated = True
    for location, kind, message in (
        ("hf://org/none/x", CheckpointNotFoundError, "RepoNotFound.*no repository org/none"),
        (f"{TOP}@none/{WEIGHTS}", CheckpointNotFoundError, "RevisionNotFound.*no revision 'none'"),
        (f"{TOP}@{'0' * 40}/{WEIGHTS}", CheckpointNotFoundError, "RevisionNotFound.*no revision '0000"),
        (f"{TOP}/none.safetensors", CheckpointNotFoundError, r"no such file at revision 'main' \(commit"),
        (f"hf://org/gated/{WEIGHTS}", AccessDeniedError, "GatedRepo.*is gated; ask for access"),
    ):
        with pytest.raises(kind, match=message):
            content(source, location)


def test_the_hub_is_left_alone_for_as_long_as_it_asks(hub: HubServer) -> None:
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT})

    def throttle(call: Call) -> bool:
        call.answer(
            429, b"", {"RateLimit": '"api";r=0;t=60', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
        )
        return True

    hub.hooks.append(throttle)
    settings = ObjectSettings(retries=1, timeout_seconds=20.0, connections=1)
    api = HubApi(HubSettings.of({"HF_ENDPOINT": hub.url}), settings, lambda reason: None)
    for _ in range(3):
        with pytest.raises(Transient) as throttled:
            api._ask_commit(parse(TOP))
        assert throttled.value.reason == "throttled"
        assert 30 < throttled.value.retry_after_seconds <= 60
    assert len(hub.asked) == 1
    api.stop()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"ratelimit": '"resolvers";r=0;t=55'}, 55),
        ({"ratelimit": '"resolvers";r=0;t=99999'}, 300),
        ({"retry-after": "17"}, 17),
        ({"retry-after": "99999"}, 300),
        ({"ratelimit": "nonsense"}, 0),
        ({}, 0),
    ],
)
def test_what_an_answer_asks_for_is_waited_within_bounds(headers: dict[str, str], seconds: float) -> None:
    assert wait_seconds(Answer(429, headers, b"")) == seconds


# ---- a Hub that lies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        b"[" * 100_000,
        b'[{"type": "file", "path": "a", "size": 1}]',
        b'[{"type": "file", "path": "a", "size": -1, "oid": "' + b"0" * 40 + b'"}]',
        b'[{"type": "file", "path": "a", "size": "x", "oid": "' + b"0" * 40 + b'"}]',
        b'[{"type": "file", "path": "a"},' * 30_000,
        b" " * (17 << 20),
    ],
)
def test_a_list_that_is_none_costs_an_error(hub: HubServer, source: HubSource, body: bytes) -> None:
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT})

    def lie(call: Call) -> bool:
        if "/tree/" in call.path:
            call.answer(200, body)
        return "/tree/" in call.path

    hub.hooks.append(lie)
    with pytest.raises(SourceUnavailableError, match="failed 3 times in a row"):
        source.list(TOP, root())


def test_a_repository_of_very_many_files_is_refused(
    hub: HubServer, source: HubSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(REPOSITORY, {f"{number}": b"" for number in range(60)})
    monkeypatch.setattr(tree, "MAX_FILES", 60)
    assert len(source.list(TOP, root()) or ()) == 60
    hub.commit(REPOSITORY, {"one more": b""})
    with pytest.raises(CheckpointInvalidError, match="more than 60 files"):
        source.list(TOP, root())
    monkeypatch.setattr(tree, "MAX_FILES", 100)
    monkeypatch.setattr(tree, "MAX_NAMES_BYTES", 100)
    with pytest.raises(CheckpointInvalidError, match="longer names"):
        source.list(TOP, root())


def test_a_list_does_not_lead_to_another_host(
    hub: HubServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.tokens.add("hf_SECRET")
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT})

    def lead(call: Call) -> bool:
        if "/tree/" in call.path:
            call.answer(200, b"[]", {"Link": f'<{hub.storage_url}/next>; rel="next"'})
        return "/tree/" in call.path

    hub.hooks.append(lead)
    with pytest.raises(SourceUnavailableError, match="goes on where the Hub is not"):
        sources().list(TOP, root())
    assert hub.stored == []


def test_users_are_led_to_public_hosts_or_those_that_a_prefix_names(
    hub: HubServer, source: HubSource
) -> None:
    """The storage of this Hub is on a loopback address, by plain http."""
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT})
    with (
        contextlib.closing(source.open(f"{TOP}/{WEIGHTS}", user("hf://org"))) as file,
        pytest.raises(AccessDeniedError, match=r"leads to 127\.0\.0\.2:\d+ by plain http"),
    ):
        read(file)
    assert hub.stored == []
    allowed = user("hf://org", f"{hub.storage_url}/blobs")
    assert content(source, f"{TOP}/{WEIGHTS}", allowed) == CONTENT
    with pytest.raises(AccessDeniedError, match="by plain http"):
        content(source, f"{TOP}/{WEIGHTS}", user("hf://org", f"{hub.storage_url}/other"))
