"""The drop-in next to the streamer whose place it takes, both reading from the same server of objects."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from penstock.client import SafetensorsStreamer
from penstock.client.adopt import ambient

from ..e2e.loading.test_examples import run
from ..e2e.programs import digests
from ..e2e.support import DaemonProcess, Nursery, expected, same, write_checkpoint
from .metadata import Keys
from .moto import ACCESS_KEY, REGION, SECRET_KEY, MotoServer
from .proxy import FaultProxy
from .signatures import Gatekeeper
from .streams import PENSTOCK, Outcome, RunaiProcess
from .support import MIB, ODD_KEYS, Bucket, Tensors, assert_no_secret, environment

pytest.importorskip("runai_model_streamer_s3")

KEY = "models/one.safetensors"
GIVEN = Keys("AKIAGIVENINTHECALL00", "secret-given-in-the-call/+", "")
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
SHAPES: tuple[tuple[int, ...], ...] = ((), (0, 3), (17,), (3, 5, 7), (300, 100))
"""The last is more than a block of the daemon's in every dtype of 4 bytes."""


@pytest.fixture(scope="module")
def runai_process(session_proxy: FaultProxy) -> Iterator[RunaiProcess]:
    process = RunaiProcess(
        {**environment(session_proxy.endpoint), "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"}
    )
    yield process
    process.close()


@pytest.fixture
def runai(runai_process: RunaiProcess, proxy: FaultProxy) -> RunaiProcess:
    """It reads through the proxy, as the daemon does."""
    return runai_process


@pytest.fixture
def through_daemon(daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> DaemonProcess:
    monkeypatch.setenv("PENSTOCK_SOCKET_DIR", str(daemon.socket_dir))
    return daemon


@pytest.fixture
def private(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No daemon runs but those that this process starts, which know no credentials but those given."""
    monkeypatch.delenv("PENSTOCK_SOCKET_DIR", raising=False)
    monkeypatch.setenv("PENSTOCK_MEMORY_LIMIT", "64MiB")
    monkeypatch.setattr(ambient, "DEFAULT_SOCKET_DIR", "/nonexistent")
    monkeypatch.setattr(ambient, "_private", {})
    yield
    for client in ambient._private.values():
        client.close()


@pytest.fixture(scope="module")
def stocked(moto: MotoServer) -> Bucket:
    """With what is a checkpoint and what is none, in several places."""
    bucket = Bucket(moto, "penstock-stocked")
    small = {"layer.0.weight": torch.arange(5.0), "layer.1.weight": torch.ones(2, 3)}
    for directory in ("", "m/", "m/deep/", "m-2/", "dir.safetensors/", "with space+plus/"):
        for name in ("b.safetensors", "a.safetensors", "C.SAFETENSORS", "suffix"):
            # A tensor in two objects of a prefix would be refused.
            bucket.put_tensors(directory + name, {f"{name}.{key}": tensor for key, tensor in small.items()})
        bucket.put(f"{directory}config.json", b"{}")
    bucket.put("m/", b"")
    bucket.put("bad/text.safetensors", b"hello")
    bucket.put("bad/long.safetensors", b"# A model card, and no model\n" * 1000)
    bucket.put("bad/cut.safetensors", safetensors.torch.save(small)[:-1])
    bucket.put("bad/empty.safetensors", b"")
    bucket.put_tensors("indexed/a.safetensors", small)
    index = {"weight_map": dict.fromkeys(small, "a.safetensors")}
    bucket.put("indexed/model.safetensors.index.json", json.dumps(index).encode())
    return bucket


@pytest.fixture
def gatekeeper(proxy: FaultProxy) -> Gatekeeper:
    """Before the objects, for every request."""
    keeper = Gatekeeper(keys={GIVEN.access_key: (GIVEN.secret, None), ACCESS_KEY: (SECRET_KEY, None)})
    proxy.on(lambda request: True, keeper, times=None)
    return keeper


def shard(seed: int) -> Tensors:
    """Any bytes, in every dtype and shape."""
    source = random.Random(seed)
    tensors = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            count = torch.Size(shape).numel()
            raw = torch.frombuffer(
                bytearray(source.randbytes(max(1, count) * dtype.itemsize)), dtype=torch.uint8
            )
            values = (raw & 1 if dtype is torch.bool else raw).view(dtype)[:count].reshape(shape)
            kind = "some" if count else "empty"
            tensors[f"{seed}.{source.randrange(10**6)}.{kind}.{dtype}"] = values
    return tensors


def file_order(tensors: Tensors) -> list[str]:
    """Names of tensors that are not empty, as they lie in the file that safetensors writes."""
    raw = safetensors.torch.save(tensors)
    (header_bytes,) = struct.unpack_from("<Q", raw)
    header = json.loads(raw[8 : 8 + header_bytes])
    names = [name for name in header if ".some." in name]
    return sorted(names, key=lambda name: header[name]["data_offsets"])


def in_order(outcome: Outcome) -> list[str]:
    """Names of tensors that are not empty, as they came."""
    return [name for name, _ in outcome.found if ".some." in name]


def assert_alike(mine: Outcome, theirs: Outcome) -> None:
    """Both yield the same tensors or list the same, or both raise."""
    assert bool(mine.raised) == bool(theirs.raised), (mine, theirs)
    assert "ValueError" in mine.raised or "ValueError" not in theirs.raised, (mine, theirs)
    assert sorted(mine.found) == sorted(theirs.found)
    assert_no_secret(mine.message, secrets=[GIVEN.secret])


@pytest.mark.parametrize("memory_limit", ["-1", "0"])
@pytest.mark.usefixtures("through_daemon")
def test_both_yield_the_same_tensors_in_the_same_order(
    memory_limit: str, runai: RunaiProcess, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a whole, and through a window as narrow as it can be. Run:ai mixes files, and the parts of a file
    that it asks for one by one: its order is compared where a single file is read whole."""
    monkeypatch.setenv("PENSTOCK_MEMORY_LIMIT", memory_limit)
    shards = [shard(seed) for seed in range(3)]
    uris = [bucket.uri(f"m/{number}.safetensors") for number in range(3)]
    for number, tensors in enumerate(shards):
        bucket.put_tensors(f"m/{number}.safetensors", tensors)
    some = [next(iter(shards[0])), *list(shards[2])[3:20:4]]
    cases: list[tuple[list[int], dict[str, Any], int]] = [
        ([1, 0, 2], {}, 180),
        ([0, 1, 2], {"owned": False}, 180),
        ([0, 1], {"device": None, "is_distributed": True}, 120),
        ([2, 0, 1], {"tensor_names": some}, 6),
        ([2], {"tensor_names": some[1:], "owned": False}, 5),
        ([0, 1], {"tensor_names": some}, 0),
        ([0, 1], {"tensor_names": []}, 0),
        ([1, 1], {}, 120),
        ([0, 0], {"tensor_names": some[:1]}, 0),
    ]
    orders = [file_order(tensors) for tensors in shards]
    wanted = {entry for tensors in shards for entry in digests(tensors.items())}
    for numbers, options, count in cases:
        paths = [uris[number] for number in numbers]
        mine = PENSTOCK.stream(paths, **options)
        assert_alike(mine, runai.stream(paths, **options))
        assert (len(mine.found), bool(mine.raised)) == (count, count == 0)
        assert wanted.issuperset(mine.found)
        names = {name for name, _ in mine.found}
        order = [name for number in numbers for name in orders[number] if name in names]
        assert in_order(mine) == order or mine.raised
    mine = PENSTOCK.stream(uris[1])  # by stream_file()
    theirs = runai.stream(uris[1])
    assert_alike(mine, theirs)
    assert in_order(mine) == in_order(theirs) == orders[1]


@pytest.mark.usefixtures("through_daemon")
def test_a_stream_goes_where_it_is_asked_to_and_counts_its_bytes(bucket: Bucket) -> None:
    """Of ours alone, as tensors of the meta device have no bytes that could be sent to compare."""
    tensors = bucket.put_random(KEY)
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(bucket.uri(KEY), device="meta")
        assert (streamer.total_size, streamer.device_str) == (MIB, "meta")
        assert sum(map(len, streamer.files_to_tensors_metadata.values())) == 4
        found = {name: (tensor.device.type, tensor.shape) for name, tensor in streamer.get_tensors()}
    assert found == {name: ("meta", tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    "make",
    [
        lambda bucket: [],
        lambda bucket: [bucket.uri("m/none.safetensors")],
        lambda bucket: [bucket.uri("m/a.safetensors"), bucket.uri("m/none.safetensors")],
        lambda bucket: ["s3://no-such-bucket/m/a.safetensors"],
        lambda bucket: ["s3://Not_A.Bucket!/m/a.safetensors"],
        lambda bucket: [bucket.uri("m/suffix")],
        lambda bucket: [bucket.uri("bad/text.safetensors")],
        lambda bucket: [bucket.uri("bad/long.safetensors")],
        lambda bucket: [bucket.uri("bad/cut.safetensors")],
        lambda bucket: [bucket.uri("bad/empty.safetensors")],
        lambda bucket: [bucket.uri("m/a.safetensors"), bucket.uri("bad/cut.safetensors")],
        lambda bucket: [bucket.uri("indexed/model.safetensors.index.json")],
        lambda bucket: [bucket.uri("indexed/")],
        lambda bucket: [bucket.uri("m/a.safetensors") + "/"],
        lambda bucket: [bucket.uri("m/")],
        lambda bucket: [bucket.uri("m")],
        lambda bucket: [bucket.uri()],
        lambda bucket: [f"s3://{bucket.name}"],
        lambda bucket: ["s3://"],
        lambda bucket: ["s3:///m/a.safetensors"],
        lambda bucket: [bucket.uri("m/a.safetensors").replace("s3:", "S3:")],
        lambda bucket: [bucket.uri("m/a.safetensors"), "/local.safetensors"],
        lambda bucket: ["/local.safetensors", bucket.uri("m/a.safetensors")],
        lambda bucket: [bucket.uri("m/a.safetensors"), "gs://bucket/a.safetensors"],
        lambda bucket: [bucket.uri("m/a.safetensors"), None],
    ],
)
@pytest.mark.usefixtures("through_daemon")
def test_both_take_and_refuse_the_same_paths(
    make: Callable[[Bucket], Any], runai: RunaiProcess, stocked: Bucket, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "local.safetensors", {"local": torch.ones(3)})
    paths = [
        str(tmp_path / path[1:]) if path is not None and path.startswith("/") else path
        for path in make(stocked)
    ]
    assert_alike(PENSTOCK.stream(paths), runai.stream(paths))


@pytest.mark.parametrize("key", ODD_KEYS)
@pytest.mark.usefixtures("through_daemon")
def test_both_take_keys_as_they_are_written(key: str, runai: RunaiProcess, bucket: Bucket) -> None:
    tensors = {"weight": torch.arange(12.0), "bias": torch.ones(3, dtype=torch.bfloat16)}
    bucket.put_tensors(key, tensors)
    mine = PENSTOCK.stream(bucket.uri(key))
    assert_alike(mine, runai.stream(bucket.uri(key)))
    assert sorted(mine.found) == sorted(digests(tensors.items()))


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "/m", "/m/", "/m/a.safetensors", "/m/a.safetensors/", "/m/a", "/none", "/none/"),
        *("/m/deep", "/m/deep/", "/dir.safetensors", "/dir.safetensors/", "/with space+plus/"),
        *("/m/config.json", "/m/suffix", "/M/", "/bad", "/indexed/"),
    ],
)
@pytest.mark.usefixtures("through_daemon")
def test_both_list_the_same(path: str, runai: RunaiProcess, stocked: Bucket) -> None:
    uri = f"s3://{stocked.name}{path}"
    mine = PENSTOCK.listing(uri)
    assert not mine.raised, mine
    assert mine == runai.listing(uri)


@pytest.mark.usefixtures("through_daemon")
def test_what_is_listed_can_be_streamed(runai: RunaiProcess, bucket: Bucket) -> None:
    shards = [shard(seed) for seed in range(3)]
    for number, tensors in enumerate(shards):
        bucket.put_tensors(f"m/{number}.safetensors", tensors)
    listed = PENSTOCK.listing(bucket.uri("m"))
    assert listed == runai.listing(bucket.uri("m"))
    mine = PENSTOCK.stream(list(listed.found))
    assert_alike(mine, runai.stream(list(listed.found)))
    assert len(mine.found) == 180


@pytest.mark.usefixtures("through_daemon")
def test_both_refuse_to_list_what_is_no_bucket(runai: RunaiProcess) -> None:
    for path in ("s3://no-such-bucket", "s3://no-such-bucket/m/", "s3://Not_A.Bucket!/", "s3://"):
        mine = PENSTOCK.listing(path)
        assert mine.raised, path
        assert_alike(mine, runai.listing(path))


@pytest.mark.usefixtures("through_daemon")
def test_both_list_what_no_index_names_and_what_is_damaged(runai: RunaiProcess, bucket: Bucket) -> None:
    for name in ("a", "b", "consolidated"):
        bucket.put_tensors(f"m/{name}.safetensors", {f"{name}.weight": torch.ones(3)})
    index = {"weight_map": {"b.weight": "b.safetensors", "a.weight": "a.safetensors"}}
    bucket.put("m/model.safetensors.index.json", json.dumps(index).encode())
    bucket.put("m/damaged.safetensors", b"no such thing")
    bucket.put("m/empty.safetensors", b"")
    mine = PENSTOCK.listing(bucket.uri("m"))
    assert mine == runai.listing(bucket.uri("m"))
    names = ("a", "b", "consolidated", "damaged", "empty")
    assert mine.found == tuple(bucket.uri(f"m/{name}.safetensors") for name in names)


@pytest.mark.usefixtures("through_daemon")
def test_an_s3_uri_that_means_something_else_to_run_ai(runai: RunaiProcess, moto: MotoServer) -> None:
    """Where they differ, as docs/migrate.md says: `//`, a version, and a key that is a prefix as well."""
    bucket = Bucket(moto, "penstock-versioned", versioned=True)
    tensors = bucket.put_random("a//b.safetensors")
    version = bucket.put_tensors("old.safetensors", tensors)
    bucket.put_random("old.safetensors", seed=1)
    for uri in (bucket.uri("a//b.safetensors"), bucket.uri(f"old.safetensors?versionId={version}")):
        assert sorted(PENSTOCK.stream(uri).found) == sorted(digests(tensors.items()))
        assert runai.stream(uri).raised
    bucket.put_tensors("both", tensors)
    bucket.put_tensors("both/below.safetensors", tensors)
    assert "ValueError" in PENSTOCK.stream(bucket.uri("both")).raised
    assert sorted(runai.stream(bucket.uri("both")).found) == sorted(digests(tensors.items()))


@pytest.mark.usefixtures("private")
def test_credentials_of_a_call_are_those_that_sign(
    runai: RunaiProcess, gatekeeper: Gatekeeper, proxy: FaultProxy, bucket: Bucket
) -> None:
    """Run:ai lists with those of the environment all the same, as docs/migrate.md says."""
    bucket.put_random(KEY)
    given = {
        "access_key_id": GIVEN.access_key,
        "secret_access_key": GIVEN.secret,
        "region_name": REGION,
        "endpoint": proxy.endpoint,
    }
    for streamers, passed in ((PENSTOCK, GIVEN.access_key), (runai, ACCESS_KEY)):
        gatekeeper.passed.clear()
        assert streamers.listing(bucket.uri("models"), s3_credentials=given).found == (bucket.uri(KEY),)
        assert set(gatekeeper.passed) == {passed}
    gatekeeper.passed.clear()
    mine = PENSTOCK.stream(bucket.uri(KEY), s3_credentials=given)
    assert_alike(mine, runai.stream(bucket.uri(KEY), s3_credentials=given))
    assert len(mine.found) == 4
    assert set(gatekeeper.passed) == {GIVEN.access_key}
    wrong = {**given, "secret_access_key": "another-secret"}
    assert_alike(
        PENSTOCK.stream(bucket.uri(KEY), s3_credentials=wrong),
        runai.stream(bucket.uri(KEY), s3_credentials=wrong),
    )


@pytest.mark.usefixtures("through_daemon")
def test_an_object_that_goes_in_the_middle_of_a_stream_is_a_value_error(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ours alone: when Run:ai reads what, nothing says."""
    monkeypatch.setenv("PENSTOCK_MEMORY_LIMIT", "0")
    bucket.put_random(KEY, mib=4)
    with SafetensorsStreamer() as streamer:
        streamer.stream_file(bucket.uri(KEY))
        tensors = streamer.get_tensors()
        next(tensors)
        bucket.delete(KEY)
        with pytest.raises(ValueError, match=KEY):
            list(tensors)
        bucket.put_random(KEY)
        streamer.stream_file(bucket.uri(KEY))
        assert len(list(streamer.get_tensors())) == 4


def test_ranks_of_torch_distributed_share_one_pass(
    daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket, nursery: Nursery, tmp_path: Path
) -> None:
    tensors = bucket.put_random(KEY, mib=4)
    ranks = nursery.stream_as_ranks(daemon, [bucket.uri(KEY)], tmp_path / "store", *[{}] * 2)
    for rank in ranks:
        assert rank.hear("streamed")["tensors"] == expected(tensors)
    for rank in ranks:
        assert rank.wait() == 0, rank.errors()
    assert proxy.sent_bytes(bucket.name, KEY) < 5 * MIB


def test_load_into_fills_a_module_from_objects(daemon: DaemonProcess, bucket: Bucket) -> None:
    source = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 7, bias=False))
    state = source.state_dict()
    bucket.put_tensors("m/0.safetensors", {name: state[name] for name in ("0.weight", "1.weight")})
    bucket.put_tensors("m/1.safetensors", {"0.bias": state["0.bias"]})
    with torch.device("meta"):
        module = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Linear(200, 7, bias=False))
    with daemon.client() as client:
        assert client.load_into(module, bucket.uri("m/")) == ([], [])
        same(iter(module.state_dict().items()), state)
        with pytest.raises(RuntimeError, match=r"1\.weight"):
            client.load_into(module, bucket.uri("m/1.safetensors"))


def test_the_example_of_the_drop_in_reads_objects(daemon: DaemonProcess, bucket: Bucket) -> None:
    bucket.put_random("m/a.safetensors")
    said = run(daemon, "drop_in.py", bucket.uri("m"))
    assert said == [f"layer.{number}.weight: torch.float32 (65536,)" for number in range(4)]
