"""What prefixes mean: stale and variant indexes, leavings, a tensor in two objects, objects that are
something else, prefixes that may not be listed, and what is no bucket."""

from __future__ import annotations

import json

import pytest
import torch

from penstock.client import errors

from ..e2e.support import DaemonProcess
from . import faults
from .proxy import FaultProxy, Match, asks
from .support import Bucket, Tensors, load_and_compare, refused

INDEX = "m/model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def put_index(bucket: Bucket, weight_map: dict[str, str], key: str = INDEX) -> None:
    bucket.put(key, json.dumps({"weight_map": weight_map}).encode())


def values(*numbers: float, prefix: str = "t") -> Tensors:
    return {f"{prefix}{i}": torch.tensor([number]) for i, number in enumerate(numbers)}


def test_where_shards_are_missing_the_single_object_is_loaded_with_a_warning(
    daemon: DaemonProcess, bucket: Bucket
) -> None:
    put_index(bucket, {"t0": ONE, "t1": TWO})
    bucket.put_tensors(f"m/{ONE}", values(9.0))
    bucket.put_tensors("m/model.safetensors", values(1.0, 2.0))
    with pytest.warns(errors.CheckpointWarning, match=rf"{bucket.uri(INDEX)} is stale: it names {TWO}"):
        load_and_compare(daemon, bucket.uri("m/"), values(1.0, 2.0))


def test_without_another_checkpoint_a_stale_index_is_an_error(daemon: DaemonProcess, bucket: Bucket) -> None:
    put_index(bucket, {"t0": ONE, "t1": TWO})
    bucket.put_tensors(f"m/{ONE}", values(9.0))
    refused(
        daemon,
        bucket.uri("m"),
        errors.CheckpointInvalidError,
        INDEX,
        TWO,
        "does not exist",
        "delete the index",
    )


def test_where_both_are_whole_the_index_is_followed_with_a_warning(
    daemon: DaemonProcess, bucket: Bucket
) -> None:
    put_index(bucket, {"t0": ONE})
    bucket.put_tensors(f"m/{ONE}", values(9.0))
    bucket.put_tensors("m/model.safetensors", values(1.0))
    with pytest.warns(errors.CheckpointWarning, match="holds a checkpoint twice"):
        load_and_compare(daemon, bucket.uri("m/"), values(9.0))


def test_the_index_decides_whose_copy_counts_and_without_one_the_load_is_refused(
    daemon: DaemonProcess, bucket: Bucket
) -> None:
    bucket.put_tensors("m/m-1.safetensors", {"a": torch.tensor([1.0]), "b": torch.tensor([2.0])})
    bucket.put_tensors("m/m-2.safetensors", {"b": torch.tensor([99.0]), "c": torch.tensor([3.0])})
    refused(
        daemon,
        bucket.uri("m/"),
        errors.CheckpointInvalidError,
        bucket.uri("m/m-1.safetensors"),
        bucket.uri("m/m-2.safetensors"),
        "both hold tensor 'b'",
    )
    put_index(bucket, {"a": "m-1.safetensors", "b": "m-1.safetensors", "c": "m-2.safetensors"})
    wanted = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0]), "c": torch.tensor([3.0])}
    load_and_compare(daemon, bucket.uri("m/"), wanted)


def test_what_is_hidden_is_no_shard_but_can_be_named(daemon: DaemonProcess, bucket: Bucket) -> None:
    bucket.put_tensors("m/model.safetensors", values(1.0))
    bucket.put("m/._model.safetensors", b"\x00\x05\x16\x07" + bytes(4092))
    bucket.put("m/._model.safetensors.index.json", b"\x00\x05\x16\x07" + bytes(4092))
    bucket.put("m/.cache/huggingface/download/model.safetensors", b"metadata")
    bucket.put_tensors("m/.kept.safetensors", values(2.0))
    load_and_compare(daemon, bucket.uri("m/"), values(1.0))
    load_and_compare(daemon, bucket.uri("m/.kept.safetensors"), values(2.0))


def test_of_several_variants_the_default_one_is_loaded_and_an_index_of_another_can_be_named(
    daemon: DaemonProcess, bucket: Bucket
) -> None:
    put_index(bucket, {"t0": ONE})
    put_index(bucket, {"t0": "model.fp16-00001-of-00001.safetensors"}, "m/model.safetensors.index.fp16.json")
    bucket.put_tensors(f"m/{ONE}", values(1.0))
    bucket.put_tensors("m/model.fp16-00001-of-00001.safetensors", values(2.0))
    load_and_compare(daemon, bucket.uri("m/"), values(1.0))
    load_and_compare(daemon, bucket.uri("m/model.safetensors.index.fp16.json"), values(2.0))


def test_of_two_layouts_that_of_transformers_is_loaded(daemon: DaemonProcess, bucket: Bucket) -> None:
    bucket.put_tensors("m/consolidated.safetensors", values(9.0))
    bucket.put_tensors(f"m/{ONE}", values(1.0))
    bucket.put_tensors(f"m/{TWO}", values(2.0, prefix="u"))
    load_and_compare(daemon, bucket.uri("m/"), {**values(1.0), **values(2.0, prefix="u")})


@pytest.mark.parametrize(
    ("key", "content", "said"),
    [
        ("lfs.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        ("page.safetensors", b"<!DOCTYPE html><html>Access denied</html>", "HTML page"),
        ("model.gguf", b"GGUF\3\0\0\0" + bytes(64), "GGUF"),
        ("pytorch_model.bin", b"PK\3\4" + bytes(64), "zip archive"),
        ("empty.safetensors", b"", "is empty"),
        ("model.safetensors.index.json", b"<html>", "HTML page"),
    ],
)
def test_an_object_that_is_something_else_is_called_what_it_is(
    key: str, content: bytes, said: str, daemon: DaemonProcess, bucket: Bucket
) -> None:
    bucket.put(f"m/{key}", content)
    refused(daemon, bucket.uri(f"m/{key}"), errors.CheckpointInvalidError, bucket.uri(f"m/{key}"), said)


def test_a_prefix_without_safetensors_says_what_it_has_instead(daemon: DaemonProcess, bucket: Bucket) -> None:
    bucket.put("m/pytorch_model.bin", b"PK\3\4" + bytes(64))
    refused(daemon, bucket.uri("m/"), errors.CheckpointNotFoundError, "pytorch_model.bin", "pickles")


# ---- prefixes that may not be listed ------------------------------------------------------------


def lists_of(bucket: Bucket) -> Match:
    return lambda request: asks(bucket=bucket.name)(request) and "list-type=2" in request.target


@pytest.fixture
def unlisted(bucket: Bucket, proxy: FaultProxy) -> Bucket:
    """As with credentials that have s3:GetObject alone, for which what is missing looks forbidden."""
    proxy.on(lists_of(bucket), faults.error(403, "AccessDenied"), times=None)
    return bucket


@pytest.mark.parametrize("source", ["m/", "m"])
def test_a_prefix_that_may_not_be_listed_loads_through_its_index(
    source: str, daemon: DaemonProcess, unlisted: Bucket
) -> None:
    put_index(unlisted, {"t0": "x.safetensors"})
    unlisted.put_tensors("m/x.safetensors", values(1.0))
    load_and_compare(daemon, unlisted.uri(source), values(1.0))


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_a_prefix_that_may_not_be_listed_loads_its_single_object(
    name: str, daemon: DaemonProcess, proxy: FaultProxy, unlisted: Bucket
) -> None:
    """Its index is not there, which looks forbidden."""
    unlisted.put_tensors(f"m/{name}", values(1.0))
    no_index = asks(bucket=unlisted.name, key=f"m/{name}.index.json")
    asked = proxy.on(no_index, faults.error(403, "AccessDenied"), times=None)
    load_and_compare(daemon, unlisted.uri("m/"), values(1.0))
    assert asked.hits


def test_a_key_that_may_not_be_listed_is_loaded_as_an_object(daemon: DaemonProcess, unlisted: Bucket) -> None:
    unlisted.put_tensors("m/weights", values(1.0))
    load_and_compare(daemon, unlisted.uri("m/weights"), values(1.0))


def test_a_prefix_that_may_not_be_listed_and_has_no_usual_name_says_what_is_missing(
    daemon: DaemonProcess, unlisted: Bucket
) -> None:
    unlisted.put_tensors("m/x.safetensors", values(1.0))
    refused(
        daemon,
        unlisted.uri("m/"),
        errors.AccessDeniedError,
        "AccessDenied",
        "s3:ListBucket",
        "name the files",
    )


def test_a_wrong_key_is_told_as_such_and_no_name_is_guessed(
    daemon: DaemonProcess, bucket: Bucket, proxy: FaultProxy
) -> None:
    bucket.put_tensors("m/model.safetensors", values(1.0))
    proxy.on(lists_of(bucket), faults.error(403, "InvalidAccessKeyId"), times=None)
    refused(daemon, bucket.uri("m/"), errors.AccessDeniedError, "InvalidAccessKeyId")
    assert len(proxy.requests(asks(bucket=bucket.name))) == 1


# ---- what is no bucket --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("s3://arn:aws:s3:eu-central-1:123456789012:accesspoint/mine/m/", "alias"),
        ("s3://arn:aws:s3::123456789012:accesspoint:mfzwi23gnjvgw.mrap/m/", "alias"),
        ("s3://arn:aws-cn:s3-outposts:cn-north-1:123456789012:outpost/o/accesspoint/a/m/", "alias"),
        ("s3://models--use1-az4--x-s3/m/", "directory bucket of S3 Express"),
        ("s3://mine--use1-az4--xa-s3/m/", "directory bucket of S3 Express"),
    ],
)
def test_access_points_by_arn_and_directory_buckets_are_refused_with_a_reason(
    source: str, said: str, daemon: DaemonProcess, proxy: FaultProxy
) -> None:
    refused(daemon, source, errors.InvalidRequestError, "sources:", said)
    assert proxy.requests() == []
