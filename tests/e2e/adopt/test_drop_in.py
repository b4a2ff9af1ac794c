"""penstock.client.SafetensorsStreamer next to the one whose place it takes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import penstock.client
from penstock.client import DaemonUnavailableError, S3Credentials, SafetensorsStreamer, errors
from penstock.client.adopt import ambient

from ..conftest import StartDaemon
from ..programs import digest
from ..support import DaemonProcess, Nursery, expected, random_tensors, running_daemon, write_checkpoint

runai = pytest.importorskip("runai_model_streamer")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool, torch.uint8]
# What came out: (name, digest), or what was raised.
Outcome = list[tuple[str, str]] | Exception


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", "8MiB") as daemon:
        yield daemon


@pytest.fixture
def through_daemon(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", str(daemon.socket_dir))


@pytest.fixture(autouse=True)
def reads_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """runai_model_streamer yields whatever was read first, which is in order if it reads one at a time."""
    monkeypatch.setenv("RUNAI_STREAMER_CONCURRENCY", "1")
    monkeypatch.setenv("RUNAI_STREAMER_RING_BUFFERS", "1")


@pytest.fixture
def no_private_daemon_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("PENSTOCK_SOCKET_DIR", raising=False)
    monkeypatch.setattr(ambient, "DEFAULT_SOCKET_DIR", "/nonexistent")
    monkeypatch.setattr(ambient, "_private", {})
    monkeypatch.setattr(ambient, "_told", set())
    yield
    for client in ambient._private.values():
        client.close()


def outcome(streamer: Any, paths: Any, **options: Any) -> Outcome:
    found = []
    try:
        with streamer() as opened:
            opened.stream_files(paths, **options)
            for name, tensor in opened.get_tensors():
                found.append((name, digest(tensor)))
    except Exception as error:
        return error
    return found


def both(paths: Any, **options: Any) -> tuple[Outcome, Outcome]:
    return outcome(SafetensorsStreamer, paths, **options), outcome(
        runai.SafetensorsStreamer, paths, **options
    )


def assert_alike(mine: Outcome, theirs: Outcome) -> None:
    if isinstance(theirs, Exception) or isinstance(mine, Exception):
        assert isinstance(theirs, Exception), mine
        assert isinstance(mine, Exception), theirs
        assert isinstance(mine, ValueError) or not isinstance(theirs, ValueError), mine
    else:
        assert sorted(mine) == sorted(theirs)


def generated(seed: int) -> dict[str, torch.Tensor]:
    """Names of one seed are not those of another: a tensor in two files is refused here."""
    source = random.Random(seed)
    tensors = {}
    for number in range(source.randint(0, 12)):
        shape = [source.choice([0, 1, 2, 3, 5, 17, 40]) for _ in range(source.randint(0, 3))]
        bytes_ = torch.tensor(list(source.randbytes(max(1, torch.Size(shape).numel()))), dtype=torch.uint8)
        values = bytes_[: torch.Size(shape).numel()].reshape(shape)
        tensors[f"{seed}.t{number}.{source.choice('abc')}"] = values.to(source.choice(DTYPES))
    return tensors


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.usefixtures("through_daemon")
def test_both_yield_the_same_tensors(seed: int, tmp_path: Path) -> None:
    source = random.Random(seed)
    checkpoints = [generated(100 * seed + number) for number in range(source.randint(1, 4))]
    paths = [
        str(write_checkpoint(tmp_path / f"{number}.safetensors", tensors))
        for number, tensors in enumerate(checkpoints)
    ]
    names = sorted({name for tensors in checkpoints for name in tensors})
    for options in (
        {},
        {"owned": False},
        {"device": None, "is_distributed": True},
        {"tensor_names": set(source.sample(names, min(len(names), 3)))},
        {"tensor_names": [*names[:1], "absent"]},
    ):
        mine, theirs = both(paths, **options)
        assert_alike(mine, theirs)
    mine, theirs = both(paths)
    assert len(mine) == sum(map(len, checkpoints))  # type: ignore[arg-type]


@pytest.mark.usefixtures("through_daemon")
def test_the_order_is_that_of_the_file(tmp_path: Path) -> None:
    tensors = random_tensors(40, 25_000)
    path = str(write_checkpoint(tmp_path / "m.safetensors", tensors))
    mine, theirs = both([path])
    assert mine == theirs
    assert len(mine) == 40  # type: ignore[arg-type]
    last = write_checkpoint(tmp_path / "a.safetensors", {"last": torch.ones(1)})
    mine = outcome(SafetensorsStreamer, [path, str(last)])
    assert not isinstance(mine, Exception)
    assert mine[-1][0] == "last"


def mutated(raw: bytes, source: random.Random) -> bytes:
    """A file with one thing wrong, or none that matters."""
    header_bytes = struct.unpack("<Q", raw[:8])[0]
    kind = source.randrange(8)
    if kind == 0:
        return raw[: source.randrange(len(raw))]
    if kind == 1:
        return raw + source.randbytes(source.randint(1, 9))
    if kind == 2:
        at = source.randrange(8 + header_bytes)
        return raw[:at] + source.randbytes(1) + raw[at + 1 :]
    if kind == 3:
        return struct.pack("<Q", source.choice([0, 1, header_bytes - 1, header_bytes + 1, 1 << 40])) + raw[8:]
    header = json.loads(raw[8 : 8 + header_bytes])
    entry = header[source.choice([name for name in header if name != "__metadata__"])]
    if kind == 4:
        entry["dtype"] = source.choice(["F32", "I8", "BF16", "X1", "", 5])
    elif kind == 5:
        entry["shape"] = source.choice([[], [1], [-1], [1.0], "1", [*entry["shape"], 1], [1 << 63, 4]])
    elif kind == 6:
        entry["data_offsets"] = [source.randrange(64), source.randrange(64)]
    else:
        entry.pop(source.choice(list(entry)))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + raw[8 + header_bytes :]


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.usefixtures("through_daemon")
def test_both_refuse_a_damaged_file_except_what_the_format_settles(seed: int, tmp_path: Path) -> None:
    """Where they do not agree, the library that defines the format does so with this one."""
    source = random.Random(seed)
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(6), "b": torch.ones(3, 2), "c": torch.zeros(5).to(torch.int8)}, path)
    path.write_bytes(mutated(path.read_bytes(), source))
    mine, theirs = both([str(path)])
    if isinstance(mine, Exception) == isinstance(theirs, Exception):
        assert_alike(mine, theirs)
        return
    try:
        truth: Outcome = [(name, digest(tensor)) for name, tensor in load_file(path).items()]
    except (SafetensorError, OSError, ValueError) as error:
        truth = error
    assert isinstance(mine, Exception) == isinstance(truth, Exception), (mine, theirs, truth)


@pytest.mark.parametrize(
    "make",
    [
        lambda top: [],
        lambda top: (str(top / "b.safetensors"),),
        lambda top: [str(top / "b.safetensors")] * 2,
        lambda top: [str(top / "noext")],
        lambda top: [str(top / "link.safetensors")],
        lambda top: [os.path.relpath(top / "b.safetensors")],
        lambda top: [str(top / "absent.safetensors")],
        lambda top: [str(top)],
        lambda top: [str(top / "b.safetensors") + "/"],
        lambda top: [str(top / "model.safetensors.index.json")],
        lambda top: str(top / "b.safetensors"),
        lambda top: [top / "b.safetensors"],
        lambda top: (path for path in [str(top / "b.safetensors")]),
        lambda top: [f"file://{top}/b.safetensors"],
        lambda top: ["az://bucket/key", str(top / "b.safetensors")],
        lambda top: [""],
        lambda top: [None],
        lambda top: None,
        lambda top: ["a\0b"],
    ],
)
@pytest.mark.usefixtures("through_daemon")
def test_both_take_and_refuse_the_same_paths(make: Callable[[Path], Any], tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "b.safetensors", {"b": torch.ones(3), "c": torch.zeros(2)})
    os.link(path, tmp_path / "noext")
    (tmp_path / "link.safetensors").symlink_to(path)
    index = {"weight_map": {"b": "b.safetensors", "c": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_alike(
        outcome(SafetensorsStreamer, make(tmp_path)), outcome(runai.SafetensorsStreamer, make(tmp_path))
    )


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_names": []},
        {"tensor_names": "b"},
        {"tensor_names": b"b"},
        {"tensor_names": ["b", "b"]},
        {"tensor_names": {"b": 1}},
        {"tensor_names": ["twice"]},
        {"tensor_names": [1]},
        {"tensor_names": [["b"]]},
        {"tensor_names": 5},
        {"tensor_names": iter(["b"])},
        {"device": torch.device("cpu")},
        {"device": "meta"},
        {"device": "no such"},
        {"s3_credentials": S3Credentials("id", "secret")},
        {"s3_credentials": "not looked at for files"},
    ],
)
@pytest.mark.usefixtures("through_daemon")
def test_both_take_and_refuse_the_same_options(options: dict[str, Any], tmp_path: Path) -> None:
    paths = [
        str(write_checkpoint(tmp_path / f"{name}.safetensors", {name: torch.ones(3), other: torch.ones(2)}))
        for name, other in (("a", "twice"), ("b", "z"))
    ]
    if options.get("device") == "meta":  # there are no bytes to compare
        for streamer in (SafetensorsStreamer, runai.SafetensorsStreamer):
            with streamer() as opened:
                opened.stream_files(paths, **options)
                found = [(name, tensor.device.type, tensor.shape) for name, tensor in opened.get_tensors()]
            assert sorted(found) == [
                (n, "meta", torch.Size([s]))
                for n, s in zip(("a", "b", "twice", "z"), (3, 3, 2, 2), strict=True)
            ]
        return
    mine, theirs = both(paths, **options)
    assert_alike(mine, theirs)


@pytest.mark.usefixtures("through_daemon")
def test_a_tensor_in_two_files_is_refused_where_the_other_yields_both_without_saying_which(
    tmp_path: Path,
) -> None:
    paths = [
        str(write_checkpoint(tmp_path / f"{number}.safetensors", {"a": torch.tensor([number])}))
        for number in (1, 2)
    ]
    mine, theirs = both(paths)
    assert isinstance(mine, ValueError)
    assert "both hold tensor 'a'" in str(mine)
    assert isinstance(theirs, list)
    assert [name for name, _ in theirs] == ["a", "a"]


@pytest.mark.parametrize("streamer", [SafetensorsStreamer, runai.SafetensorsStreamer])
@pytest.mark.usefixtures("through_daemon")
def test_a_streamer_s_life_is_the_same(streamer: Any, tmp_path: Path) -> None:
    one = str(write_checkpoint(tmp_path / "a.safetensors", random_tensors(3, 10)))
    names = [f"layer.{number}.weight" for number in range(3)]
    opened = streamer()
    with pytest.raises(ValueError):
        list(opened.get_tensors())
    with pytest.raises(ValueError):
        opened.stream_file(one)
    for _ in range(2):
        with opened:
            assert list(opened.get_tensors()) == []
            opened.stream_file(one)
            assert sum(len(entry) for entry in opened.files_to_tensors_metadata.values()) == 3
            assert opened.total_size == 120
            assert [name for name, _ in opened.get_tensors()] == names
            assert list(opened.get_tensors()) == []
            opened.stream_files([one, one], device="cpu")
            tensors = opened.get_tensors()
            next(tensors)
            with pytest.raises(ValueError):
                opened.stream_file(one)
            tensors.close()
            opened.stream_file(one)
            assert len(list(opened.get_tensors())) == 3
    with pytest.raises(ValueError):
        list(opened.get_tensors())


@pytest.mark.usefixtures("through_daemon")
def test_leaving_with_tensors_not_taken_gives_everything_back(daemon: DaemonProcess, tmp_path: Path) -> None:
    path = str(write_checkpoint(tmp_path / "a.safetensors", random_tensors(16, 1 << 20)))
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(path)
        next(streamer.get_tensors())
    daemon.wait_idle()


@pytest.mark.usefixtures("through_daemon")
def test_list_safetensors_lists_the_same(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", "c.bin", "sub/d.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for path in (f"{tmp_path}", f"{tmp_path}/", f"{tmp_path}/sub", f"{tmp_path}/none", f"{tmp_path}/c.bin"):
        assert penstock.client.list_safetensors(path) == sorted(runai.list_safetensors(path))


def test_without_a_daemon_one_is_started_and_shared_by_the_process(
    no_private_daemon_left: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = random_tensors(4, 1000)
    path = str(write_checkpoint(tmp_path / "a.safetensors", tensors))
    with caplog.at_level(logging.INFO, "penstock.client"):
        for _ in range(2):
            assert outcome(SafetensorsStreamer, [path]) == [tuple(pair) for pair in expected(tensors)]
    assert len(ambient._private) == 1
    assert [record.message for record in caplog.records if "private" in record.message] == [
        "PENSTOCK_SOCKET_DIR is not set and no daemon answers in /nonexistent: this process has started a "
        "private penstock daemon, which shares nothing with other processes"
    ]


def test_a_named_daemon_that_is_absent_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", str(tmp_path))
    with (
        SafetensorsStreamer() as streamer,
        pytest.raises(DaemonUnavailableError, match="PENSTOCK_SOCKET_DIR"),
    ):
        streamer.stream_file("/model.safetensors")


@pytest.mark.usefixtures("through_daemon")
def test_a_scheme_in_upper_case_is_refused_and_not_taken_for_a_path() -> None:
    with SafetensorsStreamer() as streamer, pytest.raises(ValueError, match="write s3:// in lower case"):
        streamer.stream_file("S3://bucket/one.safetensors")
    with pytest.raises(ValueError, match="write s3:// in lower case"):
        penstock.client.list_safetensors("S3://bucket/models/")
    with penstock.client.StreamerClient() as client, pytest.raises(errors.InvalidRequestError, match="lower"):
        client.load_state_dict("S3://bucket/one.safetensors")


@pytest.mark.usefixtures("through_daemon")
def test_credentials_are_not_for_a_daemon_that_others_use(daemon: DaemonProcess) -> None:
    credentials = S3Credentials(access_key_id="id", secret_access_key="hidden")
    with SafetensorsStreamer() as streamer, pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID") as raised:
        streamer.stream_file("s3://bucket/key", s3_credentials=credentials)
    assert "hidden" not in str(raised.value) + repr(credentials)
    with pytest.raises(ValueError, match="where penstockd runs"):
        penstock.client.list_safetensors("s3://bucket/", credentials)
    with SafetensorsStreamer() as streamer, pytest.raises(ValueError, match="s3://"):
        streamer.stream_file(
            "az://bucket/s3://", s3_credentials=S3Credentials()
        )  # nothing given: not refused


def test_credentials_reach_a_private_daemon_by_its_environment_only(
    no_private_daemon_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of another identity")
    monkeypatch.setenv("PENSTOCK_OBJECT_RETRIES", "1")
    given = S3Credentials("id", "secret", region_name="eu-north-1", endpoint="http://127.0.0.1:1")
    with contextlib.suppress(ValueError):  # nobody serves the bucket
        penstock.client.list_safetensors("s3://bucket/none/", given)
    client = ambient.ambient_client(given)
    status = client.status()
    environment = Path(f"/proc/{status['pid']}/environ").read_bytes().decode().split("\0")
    assert {"AWS_ACCESS_KEY_ID=id", "AWS_SECRET_ACCESS_KEY=secret", "AWS_DEFAULT_REGION=eu-north-1"} <= {
        *environment
    }
    assert "AWS_ENDPOINT_URL=http://127.0.0.1:1" in environment
    assert not any(line.startswith("AWS_SESSION_TOKEN=") for line in environment)
    assert b"secret" not in Path(f"/proc/{status['pid']}/cmdline").read_bytes()
    assert ambient.ambient_client() is not client
    assert ambient.ambient_client(given) is client


@pytest.mark.parametrize("limit", ["4MiB", "64MiB"])
def test_ranks_of_torch_distributed_share_one_pass(
    limit: str, start_daemon: StartDaemon, nursery: Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(64, 1 << 17)
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    daemon = start_daemon("--memory-limit", limit)
    ranks = nursery.stream_as_ranks(daemon, [str(path)], tmp_path / "store", *[{}] * 3)
    for rank in ranks:
        assert rank.hear("streamed")["tensors"] == expected(tensors)
    for rank in ranks:
        assert rank.wait() == 0, rank.errors()
    assert daemon.wait_idle()["totals"]["read_bytes"] == 32 << 20


def test_ranks_that_want_different_tensors_do_not_wait_for_each_other(
    start_daemon: StartDaemon, nursery: Nursery, tmp_path: Path
) -> None:
    tensors = random_tensors(8, 1 << 18)
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    daemon = start_daemon("--memory-limit", "4MiB", "--group-timeout", "600")
    wanted = ["layer.1.weight", "layer.1.weight", "layer.3.weight"]
    ranks = nursery.stream_as_ranks(
        daemon, [str(path)], tmp_path / "store", *({"tensor_names": [name]} for name in wanted)
    )
    for rank, name in zip(ranks, wanted, strict=True):
        assert rank.hear("streamed")["tensors"] == expected({name: tensors[name]})
        assert rank.wait() == 0, rank.errors()
