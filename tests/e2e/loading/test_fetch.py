"""Files beside the weights through a daemon: every byte, kept by versions, complete or not there."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from penstock.client import StreamerClient, errors
from penstock.client.cli import commands as cli
from penstock.client.ring.rpc import Session
from penstock.client.system import trees
from penstock.v1 import streamer_pb2 as pb

from .. import programs
from ..conftest import StartDaemon
from ..support import DaemonProcess, Nursery, open_fds, running_daemon, wait_until

FILES = {
    "config.json": b'{"model_type": "x"}',
    "tokenizer.json": bytes(range(256)) * 8000,
    "code/modeling.py": b"x = 1\n",
    "empty": b"",
    "\u00e9\u6f22 a+b%41": b"named",
}
ANNE = 54321


@pytest.fixture(scope="module")
def module_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    models = tmp_path_factory.getbasetemp()
    with running_daemon("--memory-limit", "16MiB", "--allow", str(models)) as daemon:
        yield daemon


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    for name, content in FILES.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_bytes(content)
    (model / "model.safetensors").write_bytes(b"weights")
    return model


@pytest.fixture
def for_anyone() -> Iterator[Path]:
    """A directory that every user may write to. Not tmp_path, above which only one may look."""
    with tempfile.TemporaryDirectory(prefix="pst-") as directory:
        os.chmod(directory, 0o777)
        yield Path(directory)


@pytest.fixture
def client(daemon: DaemonProcess, cache: Path) -> StreamerClient:
    return daemon.client()


def contents(directory: Path) -> dict[str, bytes]:
    """Without the record."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != trees.RECORD]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def fetched_bytes(daemon: DaemonProcess) -> int:
    """By all fetches that are over."""
    daemon.wait_idle()
    return sum(map(int, re.findall(r" fetch result=.* bytes=(\d+) ", daemon.log())))


def in_cache(cache: Path) -> list[Path]:
    return sorted(cache.glob("files/*/*"))


# ---- what is fetched --------------------------------------------------------------------------------


def test_a_directory_holds_every_file_that_is_no_weight(
    client: StreamerClient, model: Path, cache: Path
) -> None:
    directory = client.fetch(model)
    assert contents(directory) == FILES
    assert directory.is_relative_to(cache)
    assert in_cache(cache) == [directory]


def test_patterns_say_what_to_take_and_to_leave(client: StreamerClient, model: Path) -> None:
    assert set(contents(client.fetch(model, allow="*.json"))) == {"config.json", "tokenizer.json"}
    assert set(contents(client.fetch(model, allow=["*.py", "*.safe*"]))) == {
        "code/modeling.py",
        "model.safetensors",
    }
    assert set(contents(client.fetch(model, ignore=["*.json", "code/"]))) == set(FILES) - {
        "config.json",
        "tokenizer.json",
        "code/modeling.py",
    }
    assert client.list_files(model, ignore="*.json")["model.safetensors"] == 7


def test_a_second_fetch_asks_for_versions_alone(
    client: StreamerClient, daemon: DaemonProcess, model: Path, cache: Path
) -> None:
    first = client.fetch(model)
    before = fetched_bytes(daemon)
    assert client.fetch(f"{model}/") == first
    assert client.fetch(f"file://{model}") != first, "another source, for all that the client knows"
    assert fetched_bytes(daemon) - before == sum(map(len, FILES.values()))


def test_a_changed_file_makes_another_directory_and_costs_its_own_bytes(
    client: StreamerClient, daemon: DaemonProcess, model: Path
) -> None:
    first = client.fetch(model)
    before = fetched_bytes(daemon)
    (model / "config.json").write_bytes(b"changed")
    second = client.fetch(model)
    assert contents(first) == FILES
    assert contents(second) == {**FILES, "config.json": b"changed"}
    assert fetched_bytes(daemon) - before == len("changed")


def test_what_somebody_changed_in_the_cache_is_fetched_again(client: StreamerClient, model: Path) -> None:
    directory = client.fetch(model)
    (directory / "config.json").write_bytes(b"x")
    (directory / "code" / "modeling.py").unlink()
    assert client.fetch(model) == directory
    assert contents(directory) == FILES
    (directory / trees.RECORD).write_text("{")
    assert client.fetch(model) == directory
    assert contents(directory) == FILES


def test_a_place_of_its_own_is_replaced_at_once_when_a_file_changed(
    client: StreamerClient, model: Path, tmp_path: Path
) -> None:
    place = tmp_path / "out" / "model"
    assert client.fetch(model, place) == place
    inode = place.stat().st_ino
    client.fetch(model, place)
    assert place.stat().st_ino == inode, "nothing changed"
    (model / "config.json").unlink()
    client.fetch(model, place)
    assert contents(place) == {name: content for name, content in FILES.items() if name != "config.json"}
    assert place.stat().st_ino != inode
    assert os.listdir(place.parent) == ["model"]


def test_an_empty_directory_is_filled_and_any_other_is_left_alone(
    client: StreamerClient, model: Path, tmp_path: Path
) -> None:
    empty, full, file = tmp_path / "empty", tmp_path / "full", tmp_path / "file"
    empty.mkdir()
    assert contents(client.fetch(model, empty)) == FILES
    full.mkdir()
    (full / "mine").write_bytes(b"mine")
    file.write_bytes(b"mine")
    for place, error in ((full, FileExistsError), (file, NotADirectoryError)):
        with pytest.raises(error, match="name a"):
            client.fetch(model, place)
    with pytest.raises(OSError, match="mount point"):
        client.fetch(model, "/proc")
    assert contents(full) == {"mine": b"mine"}


def test_links_are_fetched_as_what_they_lead_to(client: StreamerClient, model: Path) -> None:
    """As the Hugging Face cache has them."""
    snapshot = model.parent / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").symlink_to("../model/config.json")
    directory = client.fetch(snapshot)
    assert contents(directory) == {"config.json": FILES["config.json"]}
    assert not (directory / "config.json").is_symlink()


def test_what_was_fetched_can_be_fetched_from_there(
    client: StreamerClient, model: Path, tmp_path: Path
) -> None:
    first = client.fetch(model, tmp_path / "first")
    for allow in (None, "*"):
        assert contents(client.fetch(first, tmp_path / "second", allow=allow)) == FILES
        shutil.rmtree(tmp_path / "second")


# ---- what is refused --------------------------------------------------------------------------------


def test_a_tokenizer_of_3_gb_is_refused_with_the_limit_and_how_to_raise_it(
    client: StreamerClient, model: Path, cache: Path
) -> None:
    with (model / "huge.json").open("wb") as file:
        file.truncate(3_000_000_000)
    with pytest.raises(
        errors.CheckpointInvalidError, match=r"1\.1 GB .'huge.json' alone has 3\.0 GB.*`max_bytes`"
    ):
        client.fetch(model)
    assert not in_cache(cache)
    (model / "huge.json").write_bytes(b"x" * 100)
    with pytest.raises(errors.CheckpointInvalidError, match="`max_bytes`"):
        client.fetch(model, max_bytes="2MB")
    client.fetch(model, max_bytes="2.1MB")


def test_more_files_than_a_fetch_takes_are_refused_unless_more_are_asked_for(
    client: StreamerClient, tmp_path: Path, cache: Path
) -> None:
    many = tmp_path / "many"
    many.mkdir()
    (many / "00000").write_bytes(b"x")
    for number in range(1, 10_001):
        os.link(many / "00000", many / f"{number:05}")
    with pytest.raises(errors.CheckpointInvalidError, match=r"holds more than 10000 files .*`max_files`"):
        client.fetch(many)
    with pytest.raises(errors.CheckpointInvalidError, match=r"holds more than 99 files "):
        client.fetch(many, allow="000*", max_files=99)
    assert not in_cache(cache)
    assert len(contents(client.fetch(many, allow="000*", max_files=100))) == 100
    assert len(client.list_files(many, ignore="00000")) == 10_000


@pytest.mark.parametrize("name", [b"a\nb", b"\xff"])
def test_names_that_cannot_be_made_are_refused_unless_they_are_left_out(
    client: StreamerClient, model: Path, name: bytes, cache: Path
) -> None:
    os.close(os.open(os.fsencode(model) + b"/" + name, os.O_CREAT, 0o644))
    with pytest.raises(errors.CheckpointInvalidError, match="cannot be made"):
        client.fetch(model)
    assert not in_cache(cache)
    assert contents(client.fetch(model, ignore="*[!a-z0-9. %+\u00e9\u6f22/]*")) == FILES


def test_what_does_not_exist_or_is_a_file_is_refused(
    client: StreamerClient, model: Path, cache: Path
) -> None:
    with pytest.raises(errors.CheckpointNotFoundError, match="nothing does not exist"):
        client.fetch(model / "nothing")
    with pytest.raises(errors.CheckpointInvalidError, match="is a file"):
        client.fetch(model / "config.json")
    assert not in_cache(cache)


def test_a_user_fetches_what_its_own_uid_and_groups_may_read(
    root: None, daemon: DaemonProcess, model: Path, nursery: Nursery, for_anyone: Path
) -> None:
    for directory in (model.parent, model, model / "code"):
        directory.chmod(0o755)
    place = for_anyone

    def fetch(**options: Any) -> dict[str, Any]:
        said = nursery.start(
            programs.fetch,
            uid=ANNE,
            socket_dir=daemon.socket_dir,
            source=model,
            directory=place / "x",
            **options,
        )
        return said.hear("fetched")

    assert fetch()["error"] == ""
    assert contents(place / "x") == FILES
    (model / "secret").write_bytes(b"key")
    (model / "secret").chmod(0o600)
    refused = fetch()
    assert refused["error"] == "AccessDeniedError"
    assert f"uid {ANNE} may not read {model}/secret: its mode 0600" in refused["message"]
    assert fetch(ignore=["secret"])["error"] == ""
    os.chown(model / "secret", 0, ANNE)
    (model / "secret").chmod(0o640)
    assert fetch()["error"] == "", "it is of that group"
    assert contents(place / "x")["secret"] == b"key"


def test_another_user_fetches_nothing_where_nothing_is_allowed(
    root: None, start_daemon: StartDaemon, model: Path, nursery: Nursery, for_anyone: Path
) -> None:
    daemon = start_daemon("--allow", "/nowhere")
    said = nursery.start(
        programs.fetch, uid=ANNE, socket_dir=daemon.socket_dir, source=model, cache=for_anyone
    ).hear("fetched")
    assert said["error"] == "AccessDeniedError"


# ---- what goes wrong --------------------------------------------------------------------------------


def test_two_processes_that_fetch_at_once_get_the_same_and_read_it_once(
    daemon: DaemonProcess, model: Path, nursery: Nursery, cache: Path
) -> None:
    before = fetched_bytes(daemon)
    processes = [
        nursery.start(programs.fetch, socket_dir=daemon.socket_dir, source=model, cache=cache)
        for _ in range(4)
    ]
    said = [process.hear("fetched") for process in processes]
    assert {one["error"] for one in said} == {""}
    (directory,) = {Path(one["directory"]) for one in said}
    assert contents(directory) == FILES
    assert in_cache(cache) == [directory]
    assert fetched_bytes(daemon) - before == sum(map(len, FILES.values()))


def test_threads_that_fetch_to_one_place_leave_it_whole(
    client: StreamerClient, model: Path, tmp_path: Path
) -> None:
    place = tmp_path / "out" / "model"
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: client.fetch(model, place), range(8)))
    assert set(found) == {place}
    assert contents(place) == FILES
    assert os.listdir(place.parent) == ["model"]


def test_a_daemon_that_dies_in_mid_fetch_leaves_nothing_and_the_next_one_serves(
    start_daemon: StartDaemon, nursery: Nursery, model: Path, cache: Path
) -> None:
    (model / "large").write_bytes(os.urandom(64 << 20))
    daemon = start_daemon()
    process = nursery.start(
        programs.fetch, socket_dir=daemon.socket_dir, source=model, cache=cache, pause_at="large"
    )
    process.hear("paused")
    daemon.kill()
    process.go()
    again = start_daemon()
    assert process.hear("fetched")["error"] == ""
    (directory,) = in_cache(cache)
    assert contents(directory)["large"] == (model / "large").read_bytes()
    assert again.log().count(" info fetch result=ok") == 1


def test_a_daemon_that_dies_and_does_not_come_back_leaves_nothing(
    start_daemon: StartDaemon, nursery: Nursery, model: Path, cache: Path
) -> None:
    (model / "large").write_bytes(bytes(64 << 20))
    daemon = start_daemon()
    process = nursery.start(
        programs.fetch,
        socket_dir=daemon.socket_dir,
        source=model,
        cache=cache,
        pause_at="large",
        reconnect_timeout=0.0,
    )
    process.hear("paused")
    daemon.kill()
    process.go()
    assert process.hear("fetched")["error"] == "DaemonUnavailableError"
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_client_that_is_killed_leaves_what_the_next_one_removes(
    daemon: DaemonProcess, nursery: Nursery, model: Path, cache: Path
) -> None:
    (model / "large").write_bytes(bytes(64 << 20))
    process = nursery.start(
        programs.fetch, socket_dir=daemon.socket_dir, source=model, cache=cache, pause_at="large"
    )
    process.hear("paused")
    process.kill()
    wait_until(lambda: not daemon.status()["loads"], "the daemon to notice")
    wait_until(  # the threads that read close them
        lambda: not any(str(model) in name for name in open_fds(daemon.process.pid)), "its files to be closed"
    )
    assert len(list(cache.glob("files/*/.penstock-*"))) == 1
    os.environ["PENSTOCK_CACHE_DIR"] = str(cache)
    (model / "large").write_bytes(b"")
    directory = daemon.client().fetch(model)
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_file_that_changes_while_it_is_fetched_is_told_and_nothing_is_left(
    daemon: DaemonProcess, nursery: Nursery, model: Path, cache: Path
) -> None:
    (model / "large").write_bytes(bytes(64 << 20))
    process = nursery.start(
        programs.fetch, socket_dir=daemon.socket_dir, source=model, cache=cache, pause_at="large"
    )
    process.hear("paused")
    (model / "large").write_bytes(b"\1" * (64 << 20))
    process.go()
    assert process.hear("fetched")["error"] == "CheckpointChangedError"
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_full_disk_at_the_client_is_told_with_a_remedy_and_nothing_is_left(
    unshare: tuple[str, ...], daemon: DaemonProcess, model: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    code = (
        "import os, sys; from penstock.client import StreamerClient\n"
        f"try: StreamerClient({str(daemon.socket_dir)!r}).fetch({str(model)!r}, {str(disk / 'model')!r})\n"
        "except OSError as error: print(error.errno, error)\n"
        f"print(os.listdir({str(disk)!r}))"
    )
    (tmp_path / "run.py").write_text(code)
    mount = f"mount -t tmpfs -o size=1m none {disk} && exec {sys.executable} {tmp_path / 'run.py'}"
    found = subprocess.run(
        [*unshare, "sh", "-c", mount], capture_output=True, text=True, timeout=60, check=True
    )
    lines = found.stdout.splitlines()
    assert lines[0].startswith(f"{errno.ENOSPC} "), found
    assert "free space" in lines[0]
    assert lines[1] == "[]"


def test_a_cache_that_cannot_be_written_is_told_with_a_remedy(
    daemon: DaemonProcess, model: Path, nursery: Nursery, tmp_path: Path, root: None
) -> None:
    (tmp_path / "closed").mkdir(mode=0o755)
    said = nursery.start(
        programs.fetch, uid=ANNE, socket_dir=daemon.socket_dir, source=model, cache=tmp_path / "closed" / "x"
    ).hear("fetched")
    assert said["error"] == "PermissionError"
    assert "set PENSTOCK_CACHE_DIR" in said["message"]


# ---- how it is seen ---------------------------------------------------------------------------------


def test_a_fetch_is_counted_logged_and_shown_like_a_load(
    start_daemon: StartDaemon, nursery: Nursery, model: Path, cache: Path
) -> None:
    (model / "large").write_bytes(bytes(64 << 20))
    daemon = start_daemon()
    process = nursery.start(
        programs.fetch, socket_dir=daemon.socket_dir, source=model, cache=cache, pause_at="large"
    )
    process.hear("paused")
    (load,) = daemon.status()["loads"]
    assert (load["kind"], load["state"], load["sources"]) == ("fetch", "streaming", [str(model)])
    assert load["total_bytes"] == sum(map(len, FILES.values())) + (64 << 20)
    process.go()
    process.hear("fetched")
    wait_until(lambda: " info fetch result=ok " in daemon.log(), "the line")
    assert f"files={len(FILES) + 1} " in daemon.log()
    with pytest.raises(errors.CheckpointNotFoundError):
        daemon.client().fetch(model / "nothing")
    _, metrics = daemon.http("/metrics")
    assert b'penstock_fetches_total{result="ok",source="file"} 1' in metrics
    assert b'penstock_fetches_total{result="failed",source="file"} 1' in metrics
    (failure,) = daemon.status()["errors"]
    assert (failure["reason"], failure["sources"]) == ("CHECKPOINT_NOT_FOUND", [f"{model}/nothing"])


def test_the_command_prints_the_directory(
    daemon: DaemonProcess, model: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: str) -> int:
        return cli.main(["fetch", "--socket-dir", str(daemon.socket_dir), str(model), *arguments])

    assert run("--allow", "*.json", "--ignore", "tok*") == 0
    out, err = capsys.readouterr()
    assert contents(Path(out.strip())) == {"config.json": FILES["config.json"]}
    assert err == ""
    assert run(str(tmp_path / "there")) == 0
    assert contents(Path(capsys.readouterr().out.strip())) == FILES
    assert run("--max-files", "2") == 1
    out, err = capsys.readouterr()
    assert (out, err[:10]) == ("", "penstock: ")
    assert "`max_files`" in err


# ---- on the wire ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (pb.FetchRequest(source=""), "relative path"),
        (pb.FetchRequest(source="/x\0y"), "NUL"),
        (pb.FetchRequest(source="/" + "x" * 9000), "the path is too long"),
        (pb.FetchRequest(source="/x", allow=["x"] * 33), "33 patterns"),
        (pb.FetchRequest(source="/x", max_files=200_000), "200000 are more than"),
        (pb.FetchRequest(source="/x", more=True), "the call ended before it"),
        (pb.FetchRequest(source="ftp://x"), "knows no ftp"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_makes_no_sense_is_refused_with_the_reason(
    daemon: DaemonProcess, request_: pb.FetchRequest, said: str
) -> None:
    with Session(daemon.socket_dir) as session, pytest.raises(grpc.RpcError) as refused:
        list(session.service.Fetch(iter([request_]), metadata=session.metadata))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in str(refused.value.details())


def test_versions_that_the_client_has_come_in_several_messages(daemon: DaemonProcess, model: Path) -> None:
    with Session(daemon.socket_dir) as session:

        def fetch(*requests: pb.FetchRequest) -> list[pb.FetchResponse]:
            return list(session.service.Fetch(iter(requests), metadata=session.metadata))

        first = fetch(pb.FetchRequest(source=str(model)))
        have = [response.file for response in first if response.HasField("file")]
        parts = [pb.FetchRequest(have=have[number : number + 1], more=True) for number in range(len(have))]
        parts[0].source, parts[-1].more = str(model), False
        second = fetch(*parts)
        assert {one.file.name for one in second if one.file.unchanged} == set(FILES)
        assert not any(response.data for response in second)
        assert first[0].plan.total_bytes == second[0].plan.total_bytes == sum(map(len, FILES.values()))
        assert max(response.ByteSize() for response in first) <= 1 << 20
