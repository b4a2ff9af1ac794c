"""What huggingface_hub has fetched to this machine is read from there."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from penstock.server.errors import AccessDeniedError, CheckpointNotFoundError, PenstockError
from penstock.server.sources.hub.cache import CachedFile
from penstock.server.sources.objects import ObjectFile

from ...hub_server import HubServer, Repository, huggingface_hub_online
from .conftest import Sources
from .test_questions import CONTENT, REPOSITORY, TOP, WEIGHTS, content, read, root, user

FILES = {WEIGHTS: CONTENT, "config.json": b"{}", "sub/b.safetensors": CONTENT[:1000]}


@pytest.fixture
def cache(hub: HubServer, tmp_path: Path) -> Path:
    """With the repository, as huggingface_hub leaves it."""
    sha = hub.commit(REPOSITORY, FILES)
    path = tmp_path / "home" / "hub"
    api = huggingface_hub.HfApi(endpoint=hub.url, token=False)
    with huggingface_hub_online():
        api.snapshot_download(REPOSITORY, cache_dir=path)
    assert (path / "models--org--repo" / "snapshots" / sha / WEIGHTS).is_symlink()
    hub.asked.clear()
    hub.stored.clear()
    return path


def folder(cache: Path) -> Path:
    return cache / "models--org--repo"


@pytest.mark.usefixtures("cache")
def test_a_repository_in_the_cache_is_read_from_there(hub: HubServer, sources: Sources) -> None:
    source = sources()
    assert source.list(TOP, root()) == ["config.json", WEIGHTS]
    for name, expected in FILES.items():
        with contextlib.closing(source.open(f"{TOP}/{name}", root())) as file:
            assert isinstance(file, CachedFile)
            assert file.uri == f"{TOP}/{name}"
            assert read(file) == expected
            file.check_unchanged()
    assert hub.stored == []
    assert hub.asks("/resolve/") == 0


@pytest.mark.usefixtures("cache")
def test_the_cache_says_the_same_of_a_file_as_the_hub(hub: HubServer, sources: Sources, cache: Path) -> None:
    source = sources()
    listed = {one.name: one.version for one in source.tree(TOP, root(), lambda name: True)}
    assert sorted(listed) == sorted(FILES)
    with contextlib.closing(source.open(f"{TOP}/{WEIGHTS}", root())) as cached:
        pass
    shutil.rmtree(cache)
    with contextlib.closing(source.open(f"{TOP}/{WEIGHTS}", root())) as remote:
        assert isinstance(remote, ObjectFile)
        assert cached.listed_version == remote.listed_version == listed[WEIGHTS]
        assert cached.checksums == remote.checksums != ()


def test_what_the_cache_lacks_or_has_of_another_commit_comes_from_the_hub(
    hub: HubServer, sources: Sources, cache: Path
) -> None:
    source = sources()
    snapshots = folder(cache) / "snapshots" / os.listdir(folder(cache) / "snapshots")[0]
    (snapshots / "sub" / "b.safetensors").unlink()
    assert content(source, f"{TOP}/sub/b.safetensors") == CONTENT[:1000]
    blob = snapshots / WEIGHTS
    Path(os.path.realpath(blob)).write_bytes(CONTENT[:5])  # a download that broke off
    assert content(source, f"{TOP}/{WEIGHTS}") == CONTENT
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT[::-1]})
    assert content(source, f"{TOP}/{WEIGHTS}") == CONTENT[::-1]


@pytest.mark.usefixtures("cache")
def test_offline_nothing_is_asked_and_the_cache_is_all_there_is(
    hub: HubServer, sources: Sources, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = sources()
    hub.commit(REPOSITORY, {WEIGHTS: CONTENT[::-1]})
    assert source.list(TOP, root()) == ["config.json", WEIGHTS]
    assert source.list(f"{TOP}/sub", root()) == ["b.safetensors"]
    assert source.list(f"{TOP}/config.json", root()) is None
    listed = {one.name: one.version for one in source.tree(TOP, root(), lambda name: True)}
    assert sorted(listed) == sorted(FILES)
    with contextlib.closing(source.open(f"{TOP}/{WEIGHTS}", root())) as file:
        assert read(file) == CONTENT
        assert file.listed_version == listed[WEIGHTS]
        assert [one.algorithm for one in file.checksums] == ["SHA-256"]
    for location in (f"{TOP}/none", "hf://org/none", f"{TOP}@v2/{WEIGHTS}", f"{TOP}@{'0' * 40}/x"):
        with pytest.raises(CheckpointNotFoundError, match=r"not in the Hub's cache.*HF_HUB_OFFLINE"):
            source.open(f"{location}/x" if location.count("/") == 3 else location, root())
    with pytest.raises(CheckpointNotFoundError, match=r"not in the Hub's cache"):
        source.list("hf://org/none", root())
    assert hub.asked == []


def test_another_place_of_the_cache_is_found_by_its_variable(
    sources: Sources, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    with contextlib.closing(sources().open(f"{TOP}/{WEIGHTS}", root())) as file:
        assert isinstance(file, CachedFile)


@pytest.mark.parametrize("offline", ["0", "1"])
def test_links_that_lead_out_of_the_cache_are_followed_for_nobody(
    hub: HubServer,
    sources: Sources,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    offline: str,
) -> None:
    """Somebody who can write to the cache must not read what else the daemon can."""
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT[::-1])
    (snapshot,) = (folder(cache) / "snapshots").iterdir()
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(f"../../../../../{secret.name}")
    source = sources()
    for access in (root(), user("hf://org", hub.storage_url)):
        if offline == "1":
            with pytest.raises(AccessDeniedError, match="leaves the allowed directory"):
                source.open(f"{TOP}/{WEIGHTS}", access)
        else:
            assert content(source, f"{TOP}/{WEIGHTS}", access) == CONTENT


@pytest.mark.usefixtures("cache")
def test_the_cache_is_for_those_who_may_load_the_repository(sources: Sources) -> None:
    source = sources()
    assert content(source, f"{TOP}/{WEIGHTS}", user("hf://org/repo")) == CONTENT
    for prefixes in ((), ("hf://org/other",), ("/",)):
        with pytest.raises(AccessDeniedError, match=r"uid 1000 may not load hf://org/repo"):
            source.open(f"{TOP}/{WEIGHTS}", user(*prefixes))


@pytest.mark.usefixtures("cache")
def test_a_repository_that_the_hub_no_longer_shows_is_not_shown_by_the_cache_either(
    hub: HubServer, sources: Sources
) -> None:
    hub.repositories[REPOSITORY] = Repository(private=True)
    with pytest.raises(PenstockError, match="RepoNotFound"):
        sources().open(f"{TOP}/{WEIGHTS}", root())
