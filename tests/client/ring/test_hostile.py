from __future__ import annotations

import gc
from typing import Any

import pytest

from penstock.client import ProtocolError, StreamerClient, UnsupportedDtypeError
from penstock.v1 import streamer_pb2 as pb

from ..conftest import StartDaemon
from ..fake_daemon import FakeTensor
from ..samples import TENSORS


def shift_index(segment: pb.SegmentReady) -> None:
    segment.index += 1


def beyond_ring(segment: pb.SegmentReady) -> None:
    segment.ring_offset = 1 << 40


def offset_near_the_end_of_integers(segment: pb.SegmentReady) -> None:
    segment.ring_offset = 2**64 - 1


def longer_than_ring(segment: pb.SegmentReady) -> None:
    segment.size_bytes = 1 << 40


def beyond_a_full_ring(segment: pb.SegmentReady) -> None:
    segment.ring_offset = 6 * 2 * 1024 * 1024 - 8


def tensor_beyond_segment(segment: pb.SegmentReady) -> None:
    segment.tensors[-1].offset += 8


def wrong_size(segment: pb.SegmentReady) -> None:
    segment.tensors[0].shape[0] += 1


@pytest.mark.parametrize(
    "tamper",
    [
        shift_index,
        beyond_ring,
        offset_near_the_end_of_integers,
        longer_than_ring,
        beyond_a_full_ring,
        tensor_beyond_segment,
        wrong_size,
    ],
)
def test_segments_that_lie_outside_are_refused(tamper: Any, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, tamper_segment=tamper)
    with pytest.raises(ProtocolError) as caught:
        StreamerClient(daemon.socket_dir).load_state_dict("/x")
    assert caught.value.load_id == "load-1"
    del caught
    gc.collect()
    daemon.await_leases_closed()


def more_slabs(manifest: pb.Manifest) -> None:
    manifest.slab_count -= 1


def other_slab_size(manifest: pb.Manifest) -> None:
    manifest.slab_bytes *= 2


def odd_slab_size(manifest: pb.Manifest) -> None:
    manifest.slab_bytes -= 1


def fewer_segments(manifest: pb.Manifest) -> None:
    manifest.segment_count -= 1


def more_segments(manifest: pb.Manifest) -> None:
    manifest.segment_count += 1


def more_tensors(manifest: pb.Manifest) -> None:
    manifest.tensor_count += 1


def no_slabs(manifest: pb.Manifest) -> None:
    manifest.slab_count = 0


@pytest.mark.parametrize(
    "tamper",
    [
        more_slabs,
        other_slab_size,
        odd_slab_size,
        fewer_segments,
        more_segments,
        more_tensors,
        no_slabs,
    ],
)
def test_manifests_that_lie_are_refused(tamper: Any, start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, tamper_manifest=tamper)
    with pytest.raises(ProtocolError):
        StreamerClient(daemon.socket_dir).load_state_dict("/x")
    gc.collect()
    daemon.await_leases_closed()


def test_a_call_that_ends_without_its_last_message_raises(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, finish=False)
    with pytest.raises(ProtocolError, match="before its last message"):
        StreamerClient(daemon.socket_dir).load_state_dict("/x")


def test_a_dtype_that_torch_lacks_names_the_load(start_daemon: StartDaemon) -> None:
    daemon = start_daemon([FakeTensor("t", "F99", (4,), b"abcd")])
    with pytest.raises(UnsupportedDtypeError) as caught:
        StreamerClient(daemon.socket_dir).load_state_dict("/x")
    assert caught.value.load_id == "load-1"
