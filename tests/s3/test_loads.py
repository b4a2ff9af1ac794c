"""Checkpoints in object storage through a real daemon: names, prefixes, versions, sharing, and how often what
is asked for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.client import errors
from penstock.client.cli import commands as cli

from ..e2e.support import DaemonProcess, Nursery, expected, random_tensors, wait_until, write_checkpoint
from . import faults
from .moto import MotoServer
from .proxy import FaultProxy, asks
from .support import BLOCK_BYTES, MIB, ODD_KEYS, Bucket, Tensors, load_and_compare, refused

KEY = "models/one.safetensors"


def test_an_object_s_bytes_arrive_and_only_once(
    daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY, mib=4)
    before = daemon.status()["totals"]["read_bytes"]
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    assert daemon.status()["totals"]["read_bytes"] == before + 4 * MIB
    asked = [request.range for request in proxy.requests(asks("GET", bucket=bucket.name))]
    assert max(Counter(asked).values()) == 1
    # The header's read is ahead of time and may hold what blocks read again.
    header_bytes = asked[0][1] + 1 if asked[0] else 0
    assert proxy.sent_bytes(bucket.name, KEY) <= 4 * MIB + header_bytes + BLOCK_BYTES


def test_every_read_names_the_version_that_the_load_began_with(
    daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    load_and_compare(daemon, bucket.uri(KEY), bucket.put_random(KEY))
    first, *rest = proxy.requests(asks("GET", bucket=bucket.name, key=KEY))
    assert first.headers["If-Match"] is None
    assert len(rest) >= MIB // BLOCK_BYTES
    assert len({request.headers["If-Match"] for request in rest}) == 1
    assert all(request.headers["If-Match"] for request in rest)


def test_connections_are_kept(daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket) -> None:
    tensors = bucket.put_random(KEY, mib=4)
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    requests = proxy.requests()
    assert len(requests) > 64
    assert len({request.connection for request in requests}) <= 33  # --object-concurrency, and one for lists


def test_a_prefix_is_all_its_checkpoints(daemon: DaemonProcess, bucket: Bucket) -> None:
    tensors: Tensors = {}
    for number in range(3):
        shard = {f"{number}.{name}": tensor for name, tensor in random_tensors(2, 1000, seed=number).items()}
        bucket.put_tensors(f"model/{number}.safetensors", shard)
        tensors |= shard
    bucket.put("model/config.json", b"{}")
    bucket.put_random("model/original/deeper.safetensors")
    bucket.put_random("model-2/other.safetensors")
    load_and_compare(daemon, bucket.uri("model/"), tensors)


def test_a_whole_bucket_is_a_prefix_too(daemon: DaemonProcess, bucket: Bucket) -> None:
    load_and_compare(daemon, bucket.uri(), bucket.put_random("one.safetensors"))


def test_an_index_says_which_objects_belong(daemon: DaemonProcess, bucket: Bucket) -> None:
    tensors = put_shards(bucket, "model/", 2)
    bucket.put_random("model/consolidated.safetensors")
    load_and_compare(daemon, bucket.uri("model/"), tensors)
    load_and_compare(daemon, bucket.uri("model/model.safetensors.index.json"), tensors)


def test_an_index_that_names_a_missing_object_is_invalid(daemon: DaemonProcess, bucket: Bucket) -> None:
    put_shards(bucket, "model/", 2)
    bucket.delete("model/model-1.safetensors")
    parts = ("model/model.safetensors.index.json", "model-1.safetensors")
    refused(daemon, bucket.uri("model/"), errors.CheckpointInvalidError, bucket.name, *parts)


def test_two_hundred_shards_cost_a_request_each_for_their_headers_and_one_for_their_checksums(
    daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = put_shards(bucket, "model/", 200)
    load_and_compare(daemon, bucket.uri("model/"), tensors)
    shards = proxy.requests(lambda request: request.key.endswith(".safetensors"))
    assert {request.method for request in shards} == {"GET", "HEAD"}
    sums = [request for request in shards if request.method == "HEAD"]
    assert len(sums) == 200
    assert all(request.headers["x-amz-checksum-mode"] == "ENABLED" for request in sums)
    headers = [request for request in shards if request.headers["If-Match"] is None]
    assert len(headers) == 200
    assert len({request.key for request in headers}) == 200
    assert len({request.connection for request in headers}) > 8, "they were read one after the other"


def test_a_prefix_of_more_objects_than_one_list_holds(
    daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    for number in range(9):
        bucket.put(f"model/{number}.txt", b"")
    tensors = bucket.put_random("model/z.safetensors")
    lists = proxy.on(asks("GET", bucket=bucket.name, key=""), faults.short_lists(2), times=None)
    load_and_compare(daemon, bucket.uri("model/"), tensors)
    assert len(lists.hits) == 5


def test_objects_and_files_load_together(daemon: DaemonProcess, bucket: Bucket, tmp_path: Path) -> None:
    stored = bucket.put_random(KEY)
    local = {f"local.{name}": tensor for name, tensor in random_tensors(2, 1000, seed=1).items()}
    path = write_checkpoint(tmp_path / "local.safetensors", local)
    load_and_compare(daemon, [bucket.uri(KEY), str(path)], stored | local)


@pytest.mark.parametrize(
    "key",
    [
        *ODD_KEYS,
        "semi;colon,comma'quote\"double.safetensors",
        "a//b.safetensors",
        "back\\slash|pipe~tilde.safetensors",
        "(paren)[bracket]{brace}<angle>.safetensors",
        "name?versionid=x.safetensors",
        "k" * 1000 + ".safetensors",
    ],
)
def test_keys_are_taken_as_they_are_written(key: str, daemon: DaemonProcess, bucket: Bucket) -> None:
    load_and_compare(daemon, bucket.uri(key), bucket.put_random(key))


@pytest.mark.parametrize("directory", ["with space+plus/", "100%/größe/", "a//", "q?x#y/"])
def test_prefixes_are_taken_as_they_are_written(
    directory: str, daemon: DaemonProcess, bucket: Bucket
) -> None:
    load_and_compare(daemon, bucket.uri(directory), bucket.put_random(f"{directory}one.safetensors"))


def test_a_version_that_is_named_is_the_one_that_is_read(
    daemon: DaemonProcess, proxy: FaultProxy, moto: MotoServer
) -> None:
    bucket = Bucket(moto, "penstock-versions", versioned=True)
    old, new = random_tensors(4, 1000), random_tensors(4, 1000, seed=1)
    first = bucket.put_tensors(KEY, old)
    second = bucket.put_tensors(KEY, new)
    for source, tensors in (
        (bucket.uri(KEY), new),
        (f"{bucket.uri(KEY)}?versionId={first}", old),
        (f"{bucket.uri(KEY)}?versionId={second}", new),
    ):
        load_and_compare(daemon, source, tensors)
    named = proxy.requests(lambda request: request.query.get("versionId") == first)
    assert named
    bucket.delete(KEY)
    load_and_compare(daemon, f"{bucket.uri(KEY)}?versionId={first}", old)
    refused(daemon, bucket.uri(KEY), errors.CheckpointNotFoundError, bucket.name, KEY)


def test_a_version_that_is_not_there_is_not_found(daemon: DaemonProcess, moto: MotoServer) -> None:
    bucket = Bucket(moto, "penstock-no-version", versioned=True)
    bucket.put_random(KEY)
    uri = f"{bucket.uri(KEY)}?versionId=0a1b2c3d-0000-0000-0000-000000000000"
    refused(daemon, uri, errors.CheckpointNotFoundError, bucket.name, KEY, "version")


@pytest.mark.parametrize("key", ["missing.safetensors", "missing/", "no-weights/"])
def test_what_is_not_there_is_not_found(key: str, daemon: DaemonProcess, bucket: Bucket) -> None:
    bucket.put("no-weights/config.json", b"{}")
    refused(daemon, bucket.uri(key), errors.CheckpointNotFoundError, bucket.name, key)


def test_a_bucket_that_is_not_there_is_not_found(daemon: DaemonProcess) -> None:
    for key in (KEY, "models/"):
        refused(daemon, f"s3://no-such-bucket/{key}", errors.CheckpointNotFoundError, "no-such-bucket", key)


@pytest.mark.parametrize("uri", ["s3://", "s3:///key.safetensors", "s3://UPPER_case!/key.safetensors"])
def test_a_uri_without_a_bucket_makes_no_sense(uri: str, daemon: DaemonProcess) -> None:
    refused(daemon, uri, errors.InvalidRequestError, uri)


@pytest.mark.parametrize(
    "body", [b"", b"short", b"\xff" * 100, (1 << 40).to_bytes(8, "little") + b"{}"], ids=len
)
def test_an_object_that_is_no_checkpoint_is_invalid(
    body: bytes, daemon: DaemonProcess, bucket: Bucket
) -> None:
    bucket.put(KEY, body)
    refused(daemon, bucket.uri(KEY), errors.CheckpointInvalidError, bucket.name, KEY)


def test_a_header_larger_than_the_first_read_is_read_whole(
    daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = random_tensors(6_000, 4)
    bucket.put_tensors(KEY, tensors)
    load_and_compare(daemon, bucket.uri(KEY), tensors)


def test_a_warm_checkpoint_costs_a_question_and_an_overwritten_one_is_read_anew(
    daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY)
    load_and_compare(daemon, bucket.uri(KEY), tensors)
    daemon.wait_idle()
    proxy.reset()
    with daemon.client() as client, client.load(bucket.uri(KEY)) as load:
        assert sum(1 for _ in load) == len(tensors)
    assert (load.stats.cache_hit, load.stats.read_bytes) == (True, 0)
    assert [request.method for request in proxy.requests()] == ["HEAD"]
    load_and_compare(daemon, bucket.uri(KEY), bucket.put_random(KEY, seed=1))


def test_four_clients_share_one_download(
    daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket, nursery_process: Nursery
) -> None:
    tensors = bucket.put_random(KEY, mib=8)
    clients = [
        nursery_process.start("load", socket_dir=daemon.socket_dir, source=bucket.uri(KEY), pause_after=0)
        for _ in range(4)
    ]
    for client in clients:
        client.hear("paused")
    for client in clients:
        client.go()
    for client in clients:
        assert client.hear("loaded")["found"] == expected(tensors)
    nursery_process.end_all()
    assert proxy.sent_bytes(bucket.name, KEY) < 8 * MIB * 3 // 2


def test_prefetch_status_and_evict_know_objects(
    daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY)
    with daemon.client() as client:
        client.prefetch(bucket.uri(KEY), pin=True)
        stages = [stage for stage in client.status()["stages"] if stage["sources"] == [bucket.uri(KEY)]]
        told = [(stage["state"], stage["pinned"], stage["ready_bytes"]) for stage in stages]
        assert told == [("warm", True, MIB)]
        load_and_compare(daemon, bucket.uri(KEY), tensors)
        daemon.wait_idle()
        assert client.evict(bucket.uri(KEY)).freed_bytes >= MIB
        assert bucket.uri(KEY) not in str(client.status()["stages"])


def test_metrics_count_what_is_done_for_objects_as_such(
    daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket
) -> None:
    tensors = bucket.put_random(KEY)
    before = counted(daemon)
    proxy.on(asks("GET", bucket=bucket.name, key=""), faults.error(503, "SlowDown"))
    proxy.on(asks("GET", bucket=bucket.name, beyond=BLOCK_BYTES), faults.error(500, "InternalError"), times=2)
    load_and_compare(daemon, bucket.uri("models/"), tensors)
    daemon.wait_idle()
    refused(daemon, bucket.uri("missing.safetensors"), errors.CheckpointNotFoundError)
    wanted = {
        'loads_total{result="ok",source="s3"}': 1,
        'loads_total{result="failed",source="s3"}': 1,
        'read_bytes_total{source="s3"}': MIB,
        'read_retries_total{reason="throttled",source="s3"}': 1,
        'read_retries_total{reason="server_error",source="s3"}': 2,
    }

    def come_to_say_so() -> bool:
        """Answers are kept for a moment."""
        after = counted(daemon)
        return wanted == {name: after[name] - before[name] for name in after if after[name] != before[name]}

    wait_until(come_to_say_so, "metrics to tell of them")


def counted(daemon: DaemonProcess) -> dict[str, float]:
    """Loads, read bytes and retries by what the samples of /metrics are called."""
    families = text_string_to_metric_families(daemon.http("/metrics", accept="text/plain")[1].decode())
    wanted = {f"penstock_{name}" for name in ("loads_total", "read_bytes_total", "read_retries_total")}
    found = {}
    for sample in (sample for family in families for sample in family.samples if sample.name in wanted):
        labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
        found[f"{sample.name.removeprefix('penstock_')}{{{labels}}}"] = sample.value
    return found


def test_the_command_line_loads_prefetches_and_evicts_objects(
    daemon: DaemonProcess, bucket: Bucket, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.put_random(KEY)
    directory = ["--socket-dir", str(daemon.socket_dir)]
    assert cli.main(["load", *directory, bucket.uri(KEY)]) == 0
    assert "4" in capsys.readouterr().out
    assert cli.main(["prefetch", *directory, bucket.uri(KEY)]) == 0
    assert cli.main(["evict", *directory, bucket.uri(KEY)]) == 0
    assert "freed" in capsys.readouterr().out
    assert cli.main(["load", *directory, bucket.uri("missing.safetensors")]) != 0
    assert bucket.uri("missing.safetensors") in capsys.readouterr().err


def test_some_tensors_cost_only_their_bytes(daemon: DaemonProcess, proxy: FaultProxy, bucket: Bucket) -> None:
    tensors = bucket.put_random(KEY, mib=16)
    name = sorted(tensors)[40]
    with daemon.client() as client:
        assert client.load_state_dict(bucket.uri(KEY), tensors=[name])[name].equal(tensors[name])
    assert proxy.sent_bytes(bucket.name, KEY) < 4 * MIB


def put_shards(bucket: Bucket, prefix: str, count: int) -> Tensors:
    """Tensors in as many objects, and the index that says where."""
    tensors: Tensors = {}
    weight_map: dict[str, str] = {}
    for number in range(count):
        name = f"model-{number}.safetensors"
        shard = {f"{number}.{key}": tensor for key, tensor in random_tensors(2, 1000, seed=number).items()}
        bucket.put_tensors(f"{prefix}{name}", shard)
        tensors |= shard
        weight_map |= dict.fromkeys(shard, name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    bucket.put(f"{prefix}model.safetensors.index.json", index.encode())
    return tensors
