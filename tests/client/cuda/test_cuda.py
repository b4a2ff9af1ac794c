"""Loads to CUDA: through the fake device from end to end, and on a real GPU where there is one."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from penstock.client import CheckpointChangedError, LoadClosedError, StreamerClient, UnsupportedDtypeError
from penstock.client.cuda import device as cuda
from penstock.client.system.sizes import pinned_bytes

from ..conftest import StartDaemon
from ..fake_daemon import FakeTensor, random_tensors
from ..fake_device import FakeDevice
from ..samples import FULL_AND_WINDOW, TENSORS, TOTAL_BYTES, WINDOW

MIB = 1 << 20
LAZINESS = pytest.mark.parametrize("laziness", ["lazy", "random", "eager"])
OWNED = pytest.mark.parametrize("owned", [True, False])
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

ODD = [
    FakeTensor("odd", "U8", (3,), b"abc"),  # what follows is aligned to nothing
    FakeTensor("scalar", "F64", (), b"12345678"),
    FakeTensor("empty", "F32", (0, 3), b""),
    FakeTensor("bf16", "BF16", (2, 2), b"abcdefgh"),
    FakeTensor("large", "I32", (400_000,), bytes(range(250)) * 6400),
    FakeTensor("half", "F16", (1,), b"xy"),
    FakeTensor("bool", "BOOL", (3,), b"\0\1\1"),
    FakeTensor("f8", "F8_E4M3", (5,), b"01234"),
    FakeTensor("complex", "C64", (1, 1), b"abcdefgh"),
]


@pytest.fixture
def use_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeDevice]]:
    """Puts a fake in the place of the one file that touches torch.cuda; nothing may be left on it."""
    devices: list[FakeDevice] = []

    def use(device: FakeDevice, pinned: str = "1MiB") -> FakeDevice:
        monkeypatch.setattr(cuda, "open_device", lambda wanted: device)
        monkeypatch.setenv("PENSTOCK_PINNED_BYTES", pinned)
        devices.append(device)
        return device

    yield use
    gc.collect()
    for device in devices:
        assert device.pinned_bytes == 0
        assert device.violations == []
        assert device.allocated_bytes == 0


@LAZINESS
@OWNED
@FULL_AND_WINDOW
def test_every_tensor_arrives(
    laziness: str,
    owned: bool,
    window_slabs: int,
    start_daemon: StartDaemon,
    use_device: Callable[..., FakeDevice],
) -> None:
    device = use_device(FakeDevice(laziness=laziness))
    daemon = start_daemon(TENSORS, window_slabs=window_slabs)
    kept = {}
    with StreamerClient(daemon.socket_dir).load("/x", device="cuda:0", owned=owned) as load:
        for name, tensor in load:
            kept[name] = tensor
    assert list(kept) == [tensor.name for tensor in TENSORS]
    for expected in TENSORS:
        assert device.read(kept[expected.name]) == expected.data, expected.name
        assert kept[expected.name].shape == expected.shape
    assert daemon.ended.get(timeout=60) == "ok"
    # In order. Of the last the daemon is told in vain: the call may have ended before they were copied.
    assert daemon.releases == list(range(1, len(daemon.releases) + 1))
    assert len(daemon.releases) >= 10 if window_slabs else not daemon.releases
    assert (load.stats.tensors, load.stats.bytes, load.stats.read_bytes) == (40, TOTAL_BYTES, TOTAL_BYTES)
    assert device.peak_pinned_bytes <= MIB
    daemon.await_leases_closed()


@FULL_AND_WINDOW
def test_work_that_is_queued_on_dropped_tensors_reads_them_right(
    window_slabs: int, start_daemon: StartDaemon, use_device: Callable[..., FakeDevice]
) -> None:
    device = use_device(FakeDevice())
    daemon = start_daemon(TENSORS, window_slabs=window_slabs)
    reads = [
        device.read_later(tensor)
        for _, tensor in StreamerClient(daemon.socket_dir).load("/x", device="cuda:0")
    ]
    device.run_caller()
    assert [read.data for read in reads] == [tensor.data for tensor in TENSORS]


@FULL_AND_WINDOW
def test_unaligned_empty_and_large_tensors_of_all_kinds_arrive(
    window_slabs: int, start_daemon: StartDaemon, use_device: Callable[..., FakeDevice]
) -> None:
    device = use_device(FakeDevice())
    daemon = start_daemon(ODD, window_slabs=window_slabs)
    state = StreamerClient(daemon.socket_dir).load_state_dict("/x", device="cuda:0")
    assert list(state) == [tensor.name for tensor in ODD]
    for expected in ODD:
        tensor = state[expected.name]
        assert tensor.shape == expected.shape
        assert device.read(tensor) == expected.data, expected.name
        assert tensor.data_ptr() % 512 == 0
    assert state["bf16"].dtype == torch.bfloat16
    assert state["complex"].dtype == torch.complex64


def test_a_window_goes_on_while_the_caller_holds_a_tensor(
    start_daemon: StartDaemon, use_device: Callable[..., FakeDevice]
) -> None:
    """What is copied is released, whether or not it was asked for."""
    device = use_device(FakeDevice(), pinned="64MiB")
    daemon = start_daemon(TENSORS, window_slabs=WINDOW)
    with StreamerClient(daemon.socket_dir).load("/x", device="cuda:0") as load:
        iterator = iter(load)
        _, first = next(iterator)
        for _ in range(3 * 4):
            next(iterator)
        # Of four segments that were delivered; the window alone holds four.
        assert device.read(first) == TENSORS[0].data
    del first


def leave_by_break(client: StreamerClient) -> None:
    for _ in client.load("/x", device="cuda:0"):
        break


def leave_by_exception(client: StreamerClient) -> None:
    def fail() -> None:
        for _ in client.load("/x", device="cuda:0"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def leave_by_dropping_the_iterator(client: StreamerClient) -> None:
    next(iter(client.load("/x", device="cuda:0")))


def leave_by_dropping_it_untouched(client: StreamerClient) -> None:
    client.load("/x", device="cuda:0")


def leave_by_closing_the_client(client: StreamerClient) -> None:
    iterator = iter(client.load("/x", device="cuda:0"))
    next(iterator)
    client.close()
    with pytest.raises(LoadClosedError):
        list(iterator)


@FULL_AND_WINDOW
@pytest.mark.parametrize(
    "leave",
    [
        leave_by_break,
        leave_by_exception,
        leave_by_dropping_the_iterator,
        leave_by_dropping_it_untouched,
        leave_by_closing_the_client,
    ],
)
def test_leaving_early_gives_everything_back(
    leave: Callable[[StreamerClient], None],
    window_slabs: int,
    start_daemon: StartDaemon,
    use_device: Callable[..., FakeDevice],
) -> None:
    use_device(FakeDevice())
    daemon = start_daemon(TENSORS, window_slabs=window_slabs, stall_before_segment=3)
    leave(StreamerClient(daemon.socket_dir))
    gc.collect()
    daemon.await_leases_closed()
    assert daemon.ended.get(timeout=60)
    assert not any(thread.name.startswith("penstock-copy") for thread in threading.enumerate())


def test_closing_from_another_thread_ends_a_waiting_loop(
    start_daemon: StartDaemon, use_device: Callable[..., FakeDevice]
) -> None:
    use_device(FakeDevice())
    daemon = start_daemon(TENSORS, stall_before_segment=3)
    load = StreamerClient(daemon.socket_dir).load("/x", device="cuda:0")
    with daemon.when_stalled(load.close), pytest.raises(LoadClosedError):
        list(load)
    gc.collect()  # the error's traceback has the tensors
    daemon.await_leases_closed()


def test_what_was_copied_out_of_a_window_that_was_given_up_is_not_handed_out(
    start_daemon: StartDaemon, use_device: Callable[..., FakeDevice]
) -> None:
    daemon = start_daemon(TENSORS, window_slabs=WINDOW)
    first = threading.Lock()

    def close() -> None:
        load.close()

    def wait_until_given_up() -> None:
        """Before a copy thread reads the window."""
        if first.acquire(blocking=False):
            closer.start()
        daemon.await_leases_closed()

    use_device(FakeDevice(on_pin=wait_until_given_up))
    closer = threading.Thread(target=close)
    load = StreamerClient(daemon.socket_dir).load("/x", device="cuda:0")
    found: list[str] = []
    with pytest.raises(LoadClosedError):
        found.extend(name for name, _ in load)
    closer.join()
    assert found == []


@pytest.mark.parametrize("die_after", [[0], [1], [5], [1, 2, 3], [14]])
@FULL_AND_WINDOW
def test_a_daemon_that_dies_is_followed_by_the_next(
    die_after: list[int],
    window_slabs: int,
    start_daemon: StartDaemon,
    use_device: Callable[..., FakeDevice],
) -> None:
    device = use_device(FakeDevice())
    daemon = start_daemon(TENSORS, window_slabs=window_slabs, die_after=list(die_after))
    state = StreamerClient(daemon.socket_dir).load_state_dict("/x", device="cuda:0")
    assert list(state) == [tensor.name for tensor in TENSORS]
    for expected in TENSORS:
        assert device.read(state[expected.name]) == expected.data
    # Everything that had come was delivered before the next daemon was told what is left.
    done, skipped = 0, [0]
    for segments in die_after:
        done = min(done + 3 * segments, 40)
        skipped.append(done)
    assert [request.skip_tensors for request in daemon.opens] == [count for count in skipped if count < 40]
    state.clear()


def test_another_version_after_a_restart_is_refused(
    start_daemon: StartDaemon, use_device: Callable[..., FakeDevice]
) -> None:
    use_device(FakeDevice())
    daemon = start_daemon(TENSORS, die_after=[2])
    found: list[str] = []

    def change(name: str) -> str:
        daemon.behaviour.version = "v2"
        return name

    load = StreamerClient(daemon.socket_dir).load("/x", device="cuda:0")
    with pytest.raises(CheckpointChangedError):
        found.extend(change(name) for name, _ in load)
    assert found == [tensor.name for tensor in TENSORS[:6]]


def test_what_is_wrong_further_on_is_raised_when_all_before_it_was_yielded(
    start_daemon: StartDaemon, use_device: Callable[..., FakeDevice]
) -> None:
    use_device(FakeDevice())
    daemon = start_daemon([*TENSORS[:6], FakeTensor("strange", "F5", (1,), b"1234")])
    found: list[str] = []
    with pytest.raises(UnsupportedDtypeError, match="strange"):
        found.extend(name for name, _ in StreamerClient(daemon.socket_dir).load("/x", device="cuda:0"))
    assert found == [tensor.name for tensor in TENSORS[:6]]
    gc.collect()
    daemon.await_leases_closed()


def test_a_device_without_memory_leaves_nothing_behind(
    start_daemon: StartDaemon, use_device: Callable[..., FakeDevice]
) -> None:
    use_device(FakeDevice(memory_bytes=5 * MIB))
    daemon = start_daemon(TENSORS, window_slabs=WINDOW)
    with pytest.raises(torch.OutOfMemoryError):
        StreamerClient(daemon.socket_dir).load_state_dict("/x", device="cuda:0")
    gc.collect()
    daemon.await_leases_closed()


def test_memory_for_one_segment_is_enough_for_a_caller_that_keeps_none(
    start_daemon: StartDaemon, use_device: Callable[..., FakeDevice]
) -> None:
    device = use_device(FakeDevice(memory_bytes=2 * MIB), pinned="64MiB")
    daemon = start_daemon(random_tensors(12, 500_000), tensors_per_segment=1)
    for (_, tensor), expected in zip(
        StreamerClient(daemon.socket_dir).load("/x", device="cuda:0"), daemon.tensors, strict=True
    ):
        assert device.read(tensor) == expected.data
        del tensor


def test_a_device_that_cannot_pin_leaves_nothing_behind(
    start_daemon: StartDaemon, use_device: Callable[..., FakeDevice]
) -> None:
    def refuse() -> None:
        raise RuntimeError("no pinned memory")

    use_device(FakeDevice(on_pin=refuse))
    daemon = start_daemon(TENSORS)
    with pytest.raises(RuntimeError, match="no pinned memory"):
        StreamerClient(daemon.socket_dir).load_state_dict("/x", device="cuda:0")
    gc.collect()
    daemon.await_leases_closed()


def test_a_device_that_fails_for_good_does_not_keep_the_lease(
    start_daemon: StartDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    device = FakeDevice()
    monkeypatch.setattr(cuda, "open_device", lambda wanted: device)
    daemon = start_daemon(TENSORS)
    load = StreamerClient(daemon.socket_dir).load("/x", device="cuda:0")
    tensors = iter(load)
    next(tensors)
    monkeypatch.setattr(device, "settle", fault)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        load.close()
    assert daemon.ended.get(timeout=60)  # "ok" if the load had run ahead to its end by then
    del load, tensors
    gc.collect()
    daemon.await_leases_closed()


def test_several_loads_at_once_share_a_device(
    start_daemon: StartDaemon, use_device: Callable[..., FakeDevice]
) -> None:
    device = use_device(FakeDevice())
    daemon = start_daemon(TENSORS, window_slabs=WINDOW)
    client = StreamerClient(daemon.socket_dir)
    states: list[dict[str, torch.Tensor]] = []
    threads = [
        threading.Thread(target=lambda: states.append(client.load_state_dict("/x", device="cuda")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(states) == 3
    for state in states:
        for expected in TENSORS:
            assert device.read(state[expected.name]) == expected.data
    states.clear()
    del state


def test_other_devices_get_copies_of_torch(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS, window_slabs=WINDOW)
    state = StreamerClient(daemon.socket_dir).load_state_dict("/x", device="meta")
    assert {tensor.device.type for tensor in state.values()} == {"meta"}
    assert [tensor.shape for tensor in state.values()] == [tensor.shape for tensor in TENSORS]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_said_before_the_daemon_is_asked(start_daemon: StartDaemon) -> None:
    daemon = start_daemon(TENSORS)
    with pytest.raises(ValueError, match=r"finds no CUDA device.*device='cpu'"):
        StreamerClient(daemon.socket_dir).load("/x", device="cuda:1")
    assert daemon.opens == []


@pytest.mark.parametrize(("text", "size_bytes"), [("", 512 * MIB), ("1MiB", MIB), ("2000000", 2_000_000)])
def test_what_may_be_pinned(text: str, size_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_PINNED_BYTES", text)
    assert pinned_bytes() == size_bytes


@pytest.mark.parametrize("text", ["0", "-1", "1000", "much", "1 parsec", "9" * 30, "1048575"])
def test_what_may_not_be_pinned_is_refused_by_name(
    text: str, monkeypatch: pytest.MonkeyPatch, start_daemon: StartDaemon
) -> None:
    monkeypatch.setenv("PENSTOCK_PINNED_BYTES", text)
    monkeypatch.setattr(cuda, "open_device", lambda wanted: FakeDevice())
    daemon = start_daemon(TENSORS)
    with pytest.raises(ValueError, match=f"PENSTOCK_PINNED_BYTES='{text}'"):
        StreamerClient(daemon.socket_dir).load("/x", device="cuda:0")
    assert daemon.opens == []


# ---- on a GPU ----


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """100 MB: large tensors, many small ones, empty and unaligned ones."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"large.{i}": torch.rand(3_000_000, generator=generator) for i in range(6)}
    tensors |= {f"small.{i}": torch.rand(i % 700, 3, generator=generator).half() for i in range(3000)}
    tensors |= {"odd": torch.arange(3, dtype=torch.uint8), "scalar": torch.tensor(1.5)}
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    return path, tensors


@pytest.mark.gpu
@GPU
@OWNED
@pytest.mark.parametrize("limit", ["16MiB", "512MiB"])
@pytest.mark.parametrize("pinned", ["1MiB", "512MiB"])
def test_a_gpu_gets_every_byte(
    owned: bool,
    limit: str,
    pinned: str,
    checkpoint: tuple[Path, dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, tensors = checkpoint
    monkeypatch.setenv("PENSTOCK_PINNED_BYTES", pinned)
    with StreamerClient.embedded(memory_limit=limit) as client:
        for _ in range(2):
            seen = set()
            stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            # On a stream of the caller's own.
            with torch.cuda.stream(stream), client.load(path, device="cuda", owned=owned) as load:
                for name, tensor in load:
                    assert tensor.data_ptr() % 512 == 0
                    assert torch.equal(tensor.cpu(), tensors[name]), name
                    seen.add(name)
            assert seen == set(tensors)


@pytest.mark.gpu
@GPU
def test_a_gpu_keeps_the_memory_of_tensors_that_queued_work_reads(
    checkpoint: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    path, tensors = checkpoint
    results = {}
    with StreamerClient.embedded(memory_limit="64MiB") as client:
        for name, tensor in client.load(path, device="cuda:0"):
            # Keeps the stream behind the host.
            torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
            results[name] = tensor.clone()
            del tensor
    torch.cuda.synchronize()
    for name, tensor in results.items():
        assert torch.equal(tensor.cpu(), tensors[name]), name


@pytest.mark.gpu
@GPU
def test_a_gpu_load_works_in_inference_mode(checkpoint: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, tensors = checkpoint
    with torch.inference_mode(), StreamerClient.embedded(memory_limit="64MiB") as client:
        for name, tensor in client.load(path, device="cuda:0"):
            assert torch.equal(tensor.cpu(), tensors[name]), name


@pytest.mark.gpu
@GPU
def test_a_gpu_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="'cuda:99'"):
        cuda.open_device(torch.device("cuda:99"))


@pytest.mark.gpu
@GPU
def test_a_gpu_pins_and_unpins() -> None:
    device = cuda.open_device(torch.device("cuda"))
    buffer = device.pin(MIB)
    assert buffer.is_pinned()
    device.unpin(buffer)
