"""Bytes that change on their way from S3 are noticed by checksums of the whole object, and by no others."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from awscrt import checksums

from penstock.client import errors

from ..e2e.support import DaemonProcess, random_tensors, same, wait_until
from . import faults
from .proxy import FaultProxy, asks
from .support import MIB, Bucket, Tensors

KEY = "models/one.safetensors"
ALGORITHMS = ("CRC64NVME", "CRC32C")


class Stored:
    """An object whose HEAD says the checksum that S3 would."""

    def __init__(
        self, bucket: Bucket, proxy: FaultProxy, *, mib: int = 1, algorithm: str = "CRC64NVME"
    ) -> None:
        self.tensors: Tensors = random_tensors(4 * mib, MIB // 16)
        self.body = safetensors.torch.save(self.tensors)
        self.bucket, self.proxy, self.uri = bucket, proxy, bucket.uri(KEY)
        self.data_start = 8 + int.from_bytes(self.body[:8], "little")
        bucket.put(KEY, self.body, ChecksumAlgorithm="SHA1")  # moto keeps no other of a whole object rightly
        self.algorithm = algorithm
        self.value = checksum(algorithm, self.body)

    def says(self, value: str | None = None, kind: str = "FULL_OBJECT", *, times: int | None = None) -> None:
        self.proxy.on(
            asks("HEAD", key=KEY),
            faults.with_headers(
                (f"x-amz-checksum-{self.algorithm.lower()}", self.value if value is None else value),
                ("x-amz-checksum-type", kind),
            ),
            times=times,
        )

    def flips(self, at: int, *, times: int | None = None) -> None:
        self.proxy.on(
            lambda request: asks("GET", key=KEY)(request) and _holds(request.range, at),
            faults.flipped(at),
            times=times,
        )

    def is_intact(self) -> None:
        """From now on, checksum included."""
        self.proxy.reset()
        self.says()


def _holds(asked: tuple[int, int] | None, at: int) -> bool:
    return asked is not None and asked[0] <= at <= asked[1]


def checksum(algorithm: str, body: bytes) -> str:
    if algorithm == "CRC64NVME":
        return base64.b64encode(checksums.crc64nvme(body).to_bytes(8, "big")).decode()
    return base64.b64encode(checksums.crc32c(body).to_bytes(4, "big")).decode()


@pytest.fixture
def stored(bucket: Bucket, proxy: FaultProxy) -> Callable[..., Stored]:
    return lambda **options: Stored(bucket, proxy, **options)


def corrupt(
    daemon: DaemonProcess, uri: str, **options: Any
) -> tuple[errors.CheckpointCorruptError, list[str]]:
    """The error that a load ends with, and the names that it has yielded before."""
    names: list[str] = []
    with daemon.client() as client, pytest.raises(errors.CheckpointCorruptError) as caught:
        names.extend(name for name, _ in client.load(uri, **options))
    return caught.value, names


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_arrives_whole_is_verified(
    daemon: DaemonProcess, stored: Callable[..., Stored], algorithm: str
) -> None:
    one = stored(algorithm=algorithm)
    one.says()
    before = daemon.status()["totals"]["verified_bytes"]
    with daemon.client() as client:
        for _ in range(2):  # once read, once warm
            load = client.load(one.uri)
            same(load, one.tensors)
            assert load.stats.verified_bytes == load.stats.bytes == MIB
            assert [file.verified_by for file in load.files] == [algorithm]
    assert daemon.status()["totals"]["verified_bytes"] == before + len(one.body)
    assert one.uri in str(daemon.status()["stages"])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("where", ["first byte", "middle", "last byte"])
def test_one_flipped_bit_ends_the_load_before_a_tensor_of_that_segment_is_yielded(
    daemon: DaemonProcess, stored: Callable[..., Stored], algorithm: str, where: str
) -> None:
    one = stored(algorithm=algorithm)
    at = {"first byte": one.data_start, "middle": one.data_start + MIB // 2, "last byte": len(one.body) - 1}
    one.says()
    one.flips(at[where])
    error, names = corrupt(daemon, one.uri)
    assert names == []
    assert error.reason == "CHECKPOINT_CORRUPT"
    assert error.details["file"] == one.uri
    assert error.details["algorithm"] == algorithm
    assert base64.b64encode(bytes.fromhex(error.details["expected"])).decode() == one.value
    assert error.details["found"] != error.details["expected"]
    one.is_intact()
    with daemon.client() as client:
        load = client.load(one.uri)
        same(load, one.tensors)
        assert load.stats.verified_bytes == MIB


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_flipped_bit_in_a_window_is_found_before_the_file_s_last_segment(
    daemon: DaemonProcess, stored: Callable[..., Stored], algorithm: str
) -> None:
    one = stored(mib=8, algorithm=algorithm)
    one.says()
    one.flips(one.data_start + 5)
    _, names = corrupt(daemon, one.uri, memory_limit=0)
    one.is_intact()
    with daemon.client() as client:
        order = [name for name, _ in client.load(one.uri, memory_limit=0)]
    assert 0 < len(names) < len(order)
    assert names == order[: len(names)]


def test_a_flipped_bit_of_the_header_is_found_and_the_header_is_not_kept(
    daemon: DaemonProcess, stored: Callable[..., Stored]
) -> None:
    one = stored()
    one.says()
    one.flips(one.body.index(b"layer"), times=1)  # it stays a header, of a tensor with another name
    corrupt(daemon, one.uri)
    one.is_intact()
    with daemon.client() as client:
        same(client.load(one.uri), one.tensors)


@pytest.mark.parametrize("kind", ["COMPOSITE", ""])
@pytest.mark.parametrize("suffix", ["", "-3"])
def test_checksums_of_parts_are_not_mistaken_for_those_of_the_whole(
    daemon: DaemonProcess, stored: Callable[..., Stored], kind: str, suffix: str
) -> None:
    one = stored(algorithm="CRC32C")
    one.says(checksum("CRC32C", b"other bytes") + suffix, kind)
    with daemon.client() as client:
        load = client.load(one.uri)
        same(load, one.tensors)
        assert load.stats.verified_bytes == 0


def test_a_crc64nvme_counts_without_a_type_since_it_is_never_of_parts(
    daemon: DaemonProcess, stored: Callable[..., Stored]
) -> None:
    one = stored()
    one.says(kind="")
    one.flips(one.data_start)
    corrupt(daemon, one.uri)


@pytest.mark.parametrize("value", ["", "AAAA", "not base64!", "A" * 5000])
def test_a_value_that_is_none_is_no_checksum(
    daemon: DaemonProcess, stored: Callable[..., Stored], value: str
) -> None:
    one = stored()
    one.says(value)
    with daemon.client() as client:
        load = client.load(one.uri)
        same(load, one.tensors)
        assert load.stats.verified_bytes == 0
        with pytest.raises(errors.CheckpointInvalidError, match="cannot be verified"):
            client.load(one.uri, verify="require")


def test_an_object_is_loaded_where_the_question_for_its_checksum_is_refused(
    daemon: DaemonProcess, stored: Callable[..., Stored]
) -> None:
    one = stored()
    one.proxy.on(asks("HEAD", key=KEY), faults.error(403, "AccessDenied"), times=None)
    with daemon.client() as client:
        for _ in range(2):
            load = client.load(one.uri)
            same(load, one.tensors)
            assert load.stats.verified_bytes == 0


def test_blocks_that_come_in_pieces_are_verified(
    daemon: DaemonProcess, stored: Callable[..., Stored]
) -> None:
    one = stored()
    one.says()
    one.proxy.on(asks("GET", key=KEY, beyond=0), faults.cut(1000), times=5)
    with daemon.client() as client:
        load = client.load(one.uri)
        same(load, one.tensors)
        assert load.stats.verified_bytes == MIB


def test_without_verification_a_flipped_bit_is_delivered(
    daemon: DaemonProcess, stored: Callable[..., Stored]
) -> None:
    """It is the comparison that finds it, and nothing else."""
    one = stored()
    one.says()
    one.flips(len(one.body) - 1)
    with daemon.client() as client:
        state = client.load_state_dict(one.uri, verify="off")
    assert any(not torch.equal(tensor, one.tensors[name]) for name, tensor in state.items())


def test_a_file_of_which_a_part_is_read_is_not_verified_and_says_so(
    daemon: DaemonProcess, stored: Callable[..., Stored]
) -> None:
    one = stored()
    one.says()
    some = ["layer.1.weight"]
    with daemon.client() as client:
        load = client.load(one.uri, tensors=some)
        same(load, {name: one.tensors[name] for name in some})
        assert load.stats.verified_bytes == 0
        with pytest.raises(errors.InvalidRequestError, match="3 of its 4 tensors are not read"):
            client.load(one.uri, tensors=some, verify="require")


def test_every_member_of_a_shared_stage_is_told(daemon: DaemonProcess, stored: Callable[..., Stored]) -> None:
    one = stored(mib=8)
    one.says()
    one.flips(len(one.body) - 1)
    found: list[errors.CheckpointCorruptError] = []

    def member() -> None:
        with daemon.client() as client, contextlib.suppress(errors.CheckpointCorruptError):
            try:
                for _ in client.load(one.uri, memory_limit=0, group=("ranks", 2)):
                    pass
            except errors.CheckpointCorruptError as error:
                found.append(error)

    members = [threading.Thread(target=member) for _ in range(2)]
    for one_member in members:
        one_member.start()
    for one_member in members:
        one_member.join(60)
    assert len(found) == 2
    wait_until(lambda: one.uri not in str(daemon.status()["stages"]), "the stage to be given up")


def test_a_corrupt_checkpoint_is_neither_staged_nor_pinned(
    daemon: DaemonProcess, stored: Callable[..., Stored]
) -> None:
    one = stored()
    one.says()
    one.flips(len(one.body) - 1, times=1)
    with daemon.client() as client:
        with pytest.raises(errors.CheckpointCorruptError):
            client.prefetch(one.uri, pin=True)
        wait_until(lambda: one.uri not in str(daemon.status()["stages"]), "the stage to be given up")
        client.prefetch(one.uri, pin=True)
        load = client.load(one.uri, verify="require")
        same(load, one.tensors)
        assert load.stats.cache_hit
        assert load.stats.verified_bytes == MIB
        client.evict(one.uri)


def test_a_stage_that_was_not_verified_serves_no_load_that_requires_it(
    daemon: DaemonProcess, stored: Callable[..., Stored]
) -> None:
    one = stored()
    one.says()
    one.flips(len(one.body) - 1, times=1)
    with daemon.client() as client:
        client.prefetch(one.uri, verify="off")
        load = client.load(one.uri, verify="require")
        same(load, one.tensors)
        assert not load.stats.cache_hit
        assert load.stats.verified_bytes == MIB


@pytest.mark.parametrize("wrong", [False, True])
def test_a_digest_of_the_user_s_counts_where_the_store_has_none(
    daemon: DaemonProcess, stored: Callable[..., Stored], wrong: bool
) -> None:
    one = stored(mib=2)
    digests = {"one.safetensors": hashlib.sha256(one.body + b"!" * wrong).hexdigest()}
    if wrong:
        error, names = corrupt(daemon, one.uri, digests=digests)
        assert names == []
        assert error.details["algorithm"] == "SHA-256"
        return
    with daemon.client() as client:
        load = client.load(one.uri, digests=digests)
        same(load, one.tensors)
        assert load.stats.verified_bytes == 2 * MIB
