"""Transfers to the fake device, of tensors that lie in the host's memory."""

from __future__ import annotations

import gc
import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from penstock.client.cuda.pinned import RingClosedError
from penstock.client.cuda.transfer import Releases, Tensors, Transfer, run_ahead
from penstock.client.errors import DaemonUnavailableError

from ..fake_device import FakeDevice

MIB = 1 << 20
PINNED = MIB
LAZINESS = pytest.mark.parametrize("laziness", ["lazy", "random", "eager"])


def nothing() -> None:
    pass


def fail(fails: bool) -> None:
    if fails:
        raise RuntimeError("no more")


def host_tensors(count: int, elements: int = 70_000, *, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return [
        (f"t{seed}.{number}", torch.randint(-(2**31), 2**31, (elements + number,), generator=generator))
        for number in range(count)
    ]


def data(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


@pytest.fixture
def transfers() -> Iterator[Callable[..., Transfer]]:
    made: list[tuple[Transfer, FakeDevice]] = []

    def make(device: FakeDevice, *, pinned_bytes: int = PINNED, threads: int = 3) -> Transfer:
        made.append((Transfer(device, pinned_bytes=pinned_bytes, threads=threads), device))
        return made[-1][0]

    yield make
    for transfer, device in made:
        transfer.close()
        transfer.join()
        assert device.pinned_bytes == 0
        assert device.violations == []


def all_of(batches: list[Tensors]) -> Callable[[bool], tuple[Tensors, Callable[[], None]] | None]:
    left = list(batches)
    return lambda ahead: (left.pop(0), nothing) if left else None


@LAZINESS
@pytest.mark.parametrize("threads", [1, 4])
def test_tensors_that_are_kept_are_right_at_the_end(
    laziness: str, threads: int, transfers: Callable[..., Transfer]
) -> None:
    device = FakeDevice(laziness=laziness)
    transfer = transfers(device, threads=threads)
    batches = [host_tensors(5, seed=seed) for seed in range(6)]
    state = dict(run_ahead(transfer, all_of(batches)))
    expected = {name: tensor for batch in batches for name, tensor in batch}
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert device.read(tensor) == data(expected[name])
        assert tensor.shape == expected[name].shape
        assert tensor.dtype == torch.int64
    assert device.peak_pinned_bytes <= PINNED


@LAZINESS
def test_work_that_the_caller_has_queued_reads_a_tensor_that_was_dropped_since(
    laziness: str, transfers: Callable[..., Transfer]
) -> None:
    device = FakeDevice(laziness=laziness)
    batches = [host_tensors(5, seed=seed) for seed in range(12)]
    reads = [
        (device.read_later(tensor), name)
        for name, tensor in run_ahead(transfers(device), all_of(batches))  # the tensor dies here
    ]
    device.run_caller()
    expected = {name: data(tensor) for batch in batches for name, tensor in batch}
    for read, name in reads:
        assert read.data == expected[name], name


@LAZINESS
def test_memory_of_tensors_that_are_dropped_is_used_again(
    laziness: str, transfers: Callable[..., Transfer]
) -> None:
    # A batch is 2.8 MiB, so of 40 no more than a fifth fit; up to a MiB and two batches are under way.
    device = FakeDevice(laziness=laziness, memory_bytes=24 * MIB)
    batches = [host_tensors(5, seed=seed) for seed in range(40)]
    expected = {name: data(tensor) for batch in batches for name, tensor in batch}
    for name, tensor in run_ahead(transfers(device), all_of(batches)):
        assert device.read(tensor) == expected.pop(name)
    assert expected == {}


def test_no_more_is_under_way_than_may_be_pinned(transfers: Callable[..., Transfer]) -> None:
    transfer = transfers(FakeDevice(), pinned_bytes=4 * MIB)
    taken = 0

    def take(ahead: bool) -> tuple[Tensors, Callable[[], None]]:
        nonlocal taken
        taken += 1
        return [("t", torch.zeros(MIB, dtype=torch.uint8))], nothing

    delivered = run_ahead(transfer, take)
    for number in range(1, 20):
        next(delivered)
        # Two more each time, until four of a MiB each are under way, with the one in hand.
        assert taken == min(2 * number, number + 3), number


def test_the_source_is_read_when_it_is_said_to_be(transfers: Callable[..., Transfer]) -> None:
    device = FakeDevice()
    transfer = transfers(device)
    tensors = host_tensors(4)
    expected = [data(tensor) for _, tensor in tensors]
    read = threading.Event()

    def departed() -> None:
        for _, tensor in tensors:
            tensor.fill_(-1)  # as the daemon does with what was released
        read.set()

    transfer.submit(tensors, departed)
    assert read.wait(60)
    assert [device.read(tensor) for _, tensor in transfer.deliver()] == expected


def test_the_source_is_let_go_of_when_it_is_read(transfers: Callable[..., Transfer]) -> None:
    departed, looked = threading.Event(), threading.Event()

    def wait() -> None:
        assert looked.wait(60)

    device = FakeDevice(on_copy=wait)
    transfer = transfers(device)
    tensors = host_tensors(1, 10_000)
    alive = weakref.ref(tensors[0][1])
    transfer.submit(tensors, departed.set)
    assert departed.wait(60)
    del tensors
    gc.collect()
    found = alive()
    looked.set()
    assert found is None
    assert len(list(transfer.deliver())) == 1


def test_every_start_is_aligned_and_small_tensors_share_copies(transfers: Callable[..., Transfer]) -> None:
    device = FakeDevice()
    transfer = transfers(device, pinned_bytes=8 * MIB)
    small = [(f"t{number}", torch.full((number % 7,), number)) for number in range(1000)]
    transfer.submit(small, nothing)
    state = dict(transfer.deliver())
    for name, tensor in small:
        assert device.read(state[name]) == data(tensor) if tensor.numel() else True
        assert state[name].data_ptr() % 512 == 0
    assert device.copies == 1


def test_every_dtype_and_shape_survives(transfers: Callable[..., Transfer]) -> None:
    dtypes = [torch.bool, torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.float64, torch.complex64]
    if hasattr(torch, "float4_e2m1fn_x2"):
        dtypes.append(torch.float4_e2m1fn_x2)
    shaped = []
    for dtype in dtypes:
        for shape in ((), (3, 1), (0, 5), (2, 3)):
            size_bytes = math.prod(shape) * dtype.itemsize
            raw = torch.arange(1, 1 + size_bytes, dtype=torch.uint8)
            shaped.append((f"{dtype} {shape}", raw.view(dtype).view(shape)))
    device = FakeDevice()
    transfer = transfers(device)
    transfer.submit(shaped, nothing)
    for (name, tensor), (expected_name, expected) in zip(transfer.deliver(), shaped, strict=True):
        assert (name, tensor.dtype, tensor.shape) == (expected_name, expected.dtype, expected.shape)
        if expected.numel():
            assert device.read(tensor) == data(expected.reshape(-1).view(torch.uint8))


def test_nothing_but_empty_tensors_departs_at_once(transfers: Callable[..., Transfer]) -> None:
    transfer = transfers(FakeDevice())
    departed = threading.Event()
    transfer.submit([("a", torch.empty(0, 3)), ("b", torch.empty(0))], departed.set)
    assert departed.is_set()
    assert [(name, tensor.shape) for name, tensor in transfer.deliver()] == [("a", (0, 3)), ("b", (0,))]


@pytest.mark.parametrize("what", ["on_pin", "on_copy"])
def test_what_the_device_fails_with_is_raised_after_what_came_before(
    what: str, transfers: Callable[..., Transfer]
) -> None:
    device = FakeDevice()
    transfer = transfers(device, threads=1)
    calls = itertools.count(1)
    setattr(device, what, lambda: fail(next(calls) >= 2))
    batches = [[("a", torch.full((1000,), 1))], [("b", torch.full((1000,), 2))], [("c", torch.zeros(9))]]
    found: list[str] = []
    with pytest.raises(RuntimeError, match="no more"):
        found.extend(name for name, _ in run_ahead(transfer, all_of(batches)))
    assert found == ["a"]


def test_a_copy_that_cannot_be_started_frees_its_buffer_only_behind_those_that_were(
    transfers: Callable[..., Transfer],
) -> None:
    device = FakeDevice()
    transfer = transfers(device, threads=1)
    calls = itertools.count(1)
    device.on_copy = lambda: fail(next(calls) == 2)
    two_in_one_piece = [("a", torch.full((9000,), 1)), ("b", torch.full((40_000,), 2))]
    other = [("c", torch.full((9000,), 3))]
    transfer.submit(two_in_one_piece, nothing)
    transfer.submit(other, nothing)
    with pytest.raises(RuntimeError, match="no more"):
        list(transfer.deliver())
    ((_, tensor),) = transfer.deliver()
    assert device.read(tensor) == data(other[0][1])


def test_memory_that_runs_out_for_what_is_ahead_is_tried_again_alone(
    transfers: Callable[..., Transfer],
) -> None:
    device = FakeDevice(memory_bytes=3 * MIB)
    batches = [[(f"t{number}", torch.full((2 * MIB,), number, dtype=torch.uint8))] for number in range(5)]
    found = []
    for name, tensor in run_ahead(transfers(device, pinned_bytes=8 * MIB), all_of(batches)):
        found.append((name, device.read(tensor)[:1]))
        del tensor
    assert found == [(f"t{number}", bytes([number])) for number in range(5)]


def test_memory_that_runs_out_for_good_is_raised(transfers: Callable[..., Transfer]) -> None:
    device = FakeDevice(memory_bytes=3 * MIB)
    batches = [[(f"t{number}", torch.zeros(2 * MIB, dtype=torch.uint8))] for number in range(5)]
    kept: list[torch.Tensor] = []
    with pytest.raises(torch.OutOfMemoryError):
        kept.extend(tensor for _, tensor in run_ahead(transfers(device), all_of(batches)))
    assert len(kept) == 0 or len(kept) == 1
    kept.clear()
    gc.collect()
    assert device.allocated_bytes == 0


def test_a_daemon_that_is_lost_ahead_is_asked_again_when_all_is_delivered(
    transfers: Callable[..., Transfer],
) -> None:
    transfer = transfers(FakeDevice())
    log: list[str] = []
    batches = [[("a", torch.zeros(1))], [("b", torch.zeros(1))]]

    def take(ahead: bool) -> tuple[Tensors, Callable[[], None]] | None:
        if len(batches) == 1 and "lost" not in log:
            assert ahead
            log.append("lost")
            raise DaemonUnavailableError("gone")
        if batches:
            log.append(f"take ahead={ahead}")
            return batches.pop(0), nothing
        return None

    for name, _ in run_ahead(transfer, take):
        log.append(name)
    assert log == ["take ahead=False", "lost", "a", "take ahead=False", "b"]


def test_what_fails_ahead_is_raised_when_all_before_it_is_delivered(
    transfers: Callable[..., Transfer],
) -> None:
    left = [[("a", torch.zeros(1))]]

    def take(ahead: bool) -> tuple[Tensors, Callable[[], None]]:
        if left:
            return left.pop(), nothing
        assert ahead
        raise KeyError("damaged")

    found: list[str] = []
    with pytest.raises(KeyError, match="damaged"):
        found.extend(name for name, _ in run_ahead(transfers(FakeDevice()), take))
    assert found == ["a"]


def test_closing_gives_everything_back_with_copies_in_every_state() -> None:
    device = FakeDevice()
    started, go_on = threading.Event(), threading.Event()

    def block() -> None:
        started.set()
        assert go_on.wait(60)

    device.on_copy = block
    transfer = Transfer(device, pinned_bytes=PINNED, threads=2)
    transfer.submit(host_tensors(20), nothing)
    assert started.wait(60)
    transfer.close()
    go_on.set()
    transfer.join()
    assert device.pinned_bytes == 0
    assert device.violations == []
    with pytest.raises(RingClosedError):
        list(transfer.deliver())
    with pytest.raises(RingClosedError):
        transfer.submit(host_tensors(1), nothing)
    gc.collect()
    assert device.allocated_bytes == 0


def test_segments_are_released_in_order() -> None:
    releases = Releases()
    log: list[int] = []
    read = [releases.expect(lambda number=number: log.append(number)) for number in range(4)]  # type: ignore[misc]
    read[2]()
    read[1]()
    assert log == []
    read[0]()
    assert log == [0, 1, 2]
    read[3]()
    assert log == [0, 1, 2, 3]
