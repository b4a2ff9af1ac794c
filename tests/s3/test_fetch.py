"""Files from a bucket: for clients without credentials, and beside the peer's `pull_files`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import penstock.client
from penstock.client import errors
from penstock.client.adopt.run_ai_files import SENTINEL_NAME, _relative
from penstock.client.system import trees

from ..e2e.support import DaemonProcess, run_python
from .proxy import Exchange, FaultProxy, Request
from .support import Bucket, environment

FILES = {
    "config.json": b"{}",
    "tokenizer.json": bytes(range(256)) * 3000,
    "code/a b+%41\u00e9.py": b"x = 1\n",
    "empty": b"",
    "model.safetensors": b"weights",
}
PULL = """
import json, sys
from runai_model_streamer import ObjectStorageModel, pull_files
for uri, directory, allow, ignore in json.load(sys.stdin):
    pull_files(uri, directory, allow, ignore)
with ObjectStorageModel(model_path=uri, dst=directory + " of the model") as model:
    model.pull_files(allow_pattern=["*.json"])
    model.pull_files(ignore_pattern=["*.json"])
"""


def any_(request: Request) -> bool:
    return True


def contents(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != trees.RECORD]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.fixture
def model(bucket: Bucket) -> str:
    for name, content in FILES.items():
        bucket.put(f"models/m/{name}", content)
    bucket.put("models/m/", b"")
    bucket.put("models/m/code/", b"")
    bucket.put("models/m-other/config.json", b"other")
    return bucket.uri("models/m")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_prefix_is_fetched_without_credentials_and_asked_for_versions_alone_the_next_time(
    daemon: DaemonProcess, proxy: FaultProxy, model: str, bucket: Bucket, cache: Path
) -> None:
    client = daemon.client()
    directory = client.fetch(model)
    wanted = {name: content for name, content in FILES.items() if name != "model.safetensors"}
    assert contents(directory) == wanted
    before = len(proxy.requests(any_))
    assert client.fetch(model + "/") == directory
    assert [request.query.get("list-type") for request in proxy.requests(any_)[before:]] == ["2"]
    bucket.put("models/m/config.json", b"[]")
    other = client.fetch(model)
    assert contents(other) == {**wanted, "config.json": b"[]"}
    assert contents(directory) == wanted


def test_where_nothing_is_or_is_allowed_the_reason_is_told(
    daemon: DaemonProcess, bucket: Bucket, cache: Path
) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match="no object lies below it"):
        daemon.client().fetch(bucket.uri("nothing"))
    with pytest.raises(errors.CheckpointNotFoundError, match="the bucket does not exist"):
        daemon.client().fetch("s3://penstock-no-such-bucket/x")


def test_a_key_that_leads_out_of_the_directory_is_refused_unless_it_is_left_out(
    daemon: DaemonProcess, model: str, bucket: Bucket, cache: Path
) -> None:
    bucket.put("models/m/../evil", b"x")
    with pytest.raises(errors.CheckpointInvalidError, match=r"'\.\./evil' has a '\.', a '\.\.'"):
        daemon.client().fetch(model)
    assert "config.json" in contents(daemon.client().fetch(model, ignore="../*"))


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_prefix_that_changes_while_it_is_fetched_is_told_and_nothing_is_left(
    change: str, daemon: DaemonProcess, proxy: FaultProxy, model: str, bucket: Bucket, cache: Path
) -> None:
    """After it was listed, and before the file that changes is asked for."""

    def of_the_tokenizer(request: Request) -> bool:
        return request.key.endswith("/tokenizer.json")

    def first_change(exchange: Exchange) -> None:
        if change == "replaced":
            bucket.put("models/m/tokenizer.json", bytes(len(FILES["tokenizer.json"])))
        else:
            bucket.delete("models/m/tokenizer.json")
        exchange.pass_on()

    proxy.on(of_the_tokenizer, first_change)
    kinds = {"replaced": errors.CheckpointChangedError, "removed": errors.CheckpointNotFoundError}
    with pytest.raises(kinds[change], match=r"tokenizer\.json"):
        daemon.client().fetch(model)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    again = contents(daemon.client().fetch(model))
    assert again.get("tokenizer.json", b"") == (bytes(768_000) if change == "replaced" else b"")


# ---- the drop-in ------------------------------------------------------------------------------------

PATTERNS: list[tuple[list[str] | None, list[str] | None]] = [
    (None, None),
    (["*.json"], None),
    (None, ["*.safetensors", "*.bin"]),
    (["*.json", "*.py"], ["*token*"]),
    (["config.json"], None),
    (["models/m/config.json", "models/*/empty"], None),
    (["*m/c*"], ["*[!y]"]),
    (["models/m/[ct]*.json", "?odels/m/emp??"], None),
    (["*/"], None),
    ([], None),
]


def test_both_pull_the_same_files(
    daemon: DaemonProcess, proxy: FaultProxy, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("runai_model_streamer_s3")
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", str(daemon.socket_dir))
    theirs = [
        (model, str(tmp_path / f"theirs-{number}"), *patterns) for number, patterns in enumerate(PATTERNS)
    ]
    variables = {**environment(proxy.endpoint), "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"}
    run = run_python("-c", PULL, environment=variables, said=json.dumps(theirs))
    assert run.returncode == 0, run.stderr
    for number, (allow, ignore) in enumerate(PATTERNS):
        ours = tmp_path / f"ours-{number}"
        penstock.client.pull_files(model, str(ours), allow, ignore)
        assert contents(ours) == contents(tmp_path / f"theirs-{number}"), (allow, ignore)
    assert contents(tmp_path / "ours-0") == FILES
    their_model = f"{theirs[-1][1]} of the model"
    with penstock.client.ObjectStorageModel(model_path=model, dst=str(tmp_path / "our model")) as pulled:
        pulled.pull_files(allow_pattern=["*.json"])
        pulled.pull_files(ignore_pattern=["*.json"])
    assert contents(tmp_path / "our model") == contents(Path(their_model)) == {**FILES, SENTINEL_NAME: b""}
    before = len(proxy.requests(any_))
    with penstock.client.ObjectStorageModel(model_path=model, dst=their_model) as done:
        done.pull_files()
    assert len(proxy.requests(any_)) == before, "what the other library has completed is complete"


def test_pulled_files_take_their_place_beside_others_and_nothing_is_pulled_of_nothing(
    daemon: DaemonProcess, model: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", str(daemon.socket_dir))
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "config.json").write_bytes(b"old")
    penstock.client.pull_files(model, str(tmp_path), ["*config.json"])
    assert contents(tmp_path) == {"mine": b"mine", "config.json": b"{}"}
    penstock.client.pull_files(bucket.uri("nothing"), str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists() or not os.listdir(tmp_path / "nothing")
    with pytest.raises(ValueError, match="bucket does not exist"):
        penstock.client.pull_files("s3://penstock-no-such-bucket/x", str(tmp_path / "nothing"))


def test_a_model_is_pulled_once_and_anew_after_a_failure(
    daemon: DaemonProcess, proxy: FaultProxy, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", str(daemon.socket_dir))
    place = tmp_path / "model"

    def fail() -> None:
        with penstock.client.ObjectStorageModel(model_path=model, dst=f"{place}/") as failing:
            failing.pull_files(allow_pattern=["*.json"])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    (place / "left over").touch()
    with penstock.client.ObjectStorageModel(model, str(place)) as first:
        first.pull_files(allow_pattern=["*.safetensors"])
        first.pull_files(ignore_pattern=["*.safetensors"])
        assert first.dir == str(place)
    assert contents(place) == {**FILES, SENTINEL_NAME: b""}
    before = len(proxy.requests(any_))
    with penstock.client.ObjectStorageModel(model, str(place)) as second:
        second.pull_files()
    assert len(proxy.requests(any_)) == before


def test_patterns_of_keys_become_patterns_of_what_follows_the_prefix() -> None:
    assert list(_relative(["*.json"], "")) == ["*.json"]
    assert list(_relative(["*.json"], "m/")) == ["*.json"]
    assert list(_relative(["m/[]x]*"], "m/")) == ["[]x]*"]
    assert list(_relative(["n/*", "m", "m/"], "m/")) == []
