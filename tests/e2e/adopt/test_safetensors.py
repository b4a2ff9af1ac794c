"""`penstock.client.safetensors` against the safetensors library: the same values, or both raise."""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter, methodcaller
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors
import safetensors.torch as library
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.client import StreamerClient, errors
from penstock.client import safetensors as ours
from penstock.client.adopt import safe_file

from ...attacks.mutation import mutated
from ..conftest import StartDaemon
from ..loading.test_random import BITS, FILES, Spec, write_file
from ..support import MIB, DaemonProcess, random_tensors, running_daemon, same, wait_until, write_checkpoint

INDEXES: list[Any] = [
    ...,
    (),
    slice(None),
    0,
    -1,
    7,
    -9,
    None,
    True,
    [],
    1.0,
    "a",
    (0, 0),
    (0, ..., 0),
    (..., ...),
    (..., None),
    (None, 0),
    slice(1, None),
    slice(0, 1),
    slice(-2, None),
    slice(-99, 99),
    slice(2, 1),
    slice(1, 1),
    slice(None, None, 2),
    slice(1, 3, 2),
    slice(None, None, -1),
    slice(None, None, 0),
    slice(0.0, 1.0),
    numpy.int64(1),
    slice(numpy.int64(0), numpy.int64(1)),
    (slice(None), slice(0, 2)),
    (slice(0, 1), slice(1, None, 3)),
    (slice(None), [0, 1]),
    (slice(None), 1, slice(1, 2)),
    (0, 0, 0, 0),
]
_PARTS = st.one_of(
    st.integers(-6, 6),
    st.just(...),
    st.none(),
    st.builds(
        slice,
        st.one_of(st.none(), st.integers(-6, 6)),
        st.one_of(st.none(), st.integers(-6, 6)),
        st.one_of(st.none(), st.integers(-2, 4)),
    ),
)
EFFORT = settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def shared_daemon() -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", "64MiB") as daemon:
        yield daemon


@pytest.fixture
def client(shared_daemon: DaemonProcess) -> Iterator[StreamerClient]:
    """Nothing may be held after the test."""
    yield shared_daemon.client()
    shared_daemon.wait_idle()


def outcome(act: Callable[[], Any]) -> Any:
    """What it returns, or that it raised."""
    try:
        return act()
    except AssertionError:
        raise
    except Exception:
        return "raised"


def alike(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, dict):
        return sorted(found) == sorted(wanted) and all(alike(found[name], wanted[name]) for name in wanted)
    if isinstance(wanted, torch.Tensor):
        return (
            isinstance(found, torch.Tensor)
            and (found.dtype, found.shape, found.device) == (wanted.dtype, wanted.shape, wanted.device)
            and raw(found) == raw(wanted)
        )
    if isinstance(wanted, numpy.ndarray):
        return (
            isinstance(found, numpy.ndarray)
            and (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            and found.tobytes() == wanted.tobytes()
            and found.flags.writeable
        )
    return bool(type(found) is type(wanted) and found == wanted)


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.clone(memory_format=torch.contiguous_format).reshape(-1)
    return bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def in_order(names: list[str], file: Any) -> tuple[list[str], list[str]]:
    """Those with bytes as they come, and the others sorted: the library has no order among equal offsets."""
    empty = {name for name in names if 0 in file.get_slice(name).get_shape()}
    return [name for name in names if name not in empty], sorted(empty)


def on_slice(name: str, ask: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda file: ask(file.get_slice(name))


def compare(client: StreamerClient, path: Path, framework: str, indexes: list[Any]) -> bool:
    """Asks both of everything; returns whether they opened the file."""
    wanted_file = outcome(lambda: safetensors.safe_open(path, framework))
    found_file = outcome(lambda: ours.safe_open(path, framework, client=client))
    if wanted_file == "raised" or found_file == "raised":
        assert wanted_file == found_file, path.read_bytes()
        return False
    wanted_file.__enter__(), found_file.__enter__()

    def both(act: Callable[[Any], Any], what: object) -> None:
        wanted, found = outcome(lambda: act(wanted_file)), outcome(lambda: act(found_file))
        assert alike(found, wanted), (what, found, wanted)

    both(lambda file: file.keys(), "keys")
    both(lambda file: in_order(file.offset_keys(), file), "offset_keys")
    both(lambda file: file.metadata() or None, "metadata")
    both(lambda file: file.get_tensor("no such"), "a missing tensor")
    for name in wanted_file.keys():  # noqa: SIM118
        both(on_slice(name, methodcaller("get_shape")), (name, "shape"))
        both(on_slice(name, methodcaller("get_dtype")), (name, "dtype"))
        both(methodcaller("get_tensor", name), name)
        for index in indexes:
            both(on_slice(name, itemgetter(index)), (name, index))
    both(lambda file: file.get_tensors(), "all")
    wanted_file.__exit__(None, None, None), found_file.__exit__(None, None, None)
    both(lambda file: file.keys(), "keys of a closed file")
    return True


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("framework", ["pt", "np"])
def test_every_dtype_shape_and_kind_of_index_is_as_the_library_has_it(
    client: StreamerClient, tmp_path: Path, framework: str
) -> None:
    shapes = [(), (0, 4), (2,), (4, 3, 2)]
    tensors = [Spec(dtype, shape) for dtype in sorted(BITS) for shape in shapes if dtype != "F4" or shape]
    path = tmp_path / "every.safetensors"
    write_file(path, "t", tensors, padding=3, seed=1)
    assert compare(client, path, framework, INDEXES)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@EFFORT
@given(data=st.data(), files=FILES, framework=st.sampled_from(["pt", "np"]))
def test_generated_files_and_slices_are_as_the_library_has_them(
    client: StreamerClient, data: st.DataObject, files: list[list[Spec]], framework: str
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "generated"
        write_file(path, "t", files[0], padding=data.draw(st.integers(0, 9)), seed=7)
        indexes = data.draw(
            st.lists(st.one_of(_PARTS, st.lists(_PARTS, max_size=4).map(tuple)), min_size=2, max_size=6)
        )
        assert compare(client, path, framework, indexes)


def test_damaged_files_raise_where_the_library_does(client: StreamerClient, tmp_path: Path) -> None:
    path = tmp_path / "damaged"
    verdicts = set()

    @EFFORT
    @given(data=st.data(), files=FILES, cut=st.integers(-9, 9))
    def check(data: st.DataObject, files: list[list[Spec]], cut: int) -> None:
        write_file(path, "t", [spec for spec in files[0] if spec.size_bytes < 2000], padding=0, seed=7)
        whole = path.read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        header = data.draw(st.one_of(st.just(whole[:start]), mutated([whole[:start]], [b'"', b"1", b"}"])))
        body = whole[start:]
        path.write_bytes(header + (body[: len(body) + cut] if cut < 0 else body + bytes(cut)))
        verdicts.add(compare(client, path, "pt", [...]))

    check()
    assert verdicts == {True, False}


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("missing", "pt"), {}),
        ((".", "pt"), {}),
        ((b"f.safetensors", "pt"), {}),
        (("f.safetensors", "torch"), {}),
        (("f.safetensors", "numpy"), {}),
        (("f.safetensors", "nonsense"), {}),
        (("f.safetensors", None), {}),
        (("f.safetensors", "pt", None), {}),
        (("f.safetensors", "pt", "nonsense"), {}),
        (("f.safetensors", "pt", torch.device("cpu")), {}),
        (("f.safetensors", "np", "cuda"), {}),
        (("f.safetensors", "pt"), {"backend": "pread"}),
        (("f.safetensors", "pt"), {"backend": "nonsense"}),
        (("f.safetensors",), {}),
    ],
    ids=str,
)
def test_arguments_are_judged_as_the_library_judges_them(
    client: StreamerClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[Any, ...],
    options: dict[str, str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(Path("f.safetensors"), random_tensors(2, 5))

    def verdict(make: Callable[..., Any], **more: Any) -> Any:
        try:
            with make(*arguments, **options, **more) as file:
                return file.get_tensors()
        except Exception as error:
            # Ours may be more special, and opens no directory that the library fails to map.
            return next(
                kind for kind in (TypeError, OSError, safetensors.SafetensorError) if isinstance(error, kind)
            )

    assert alike(verdict(ours.safe_open, client=client), verdict(safetensors.safe_open))


def test_names_that_are_no_names_and_names_that_are_not_there(client: StreamerClient, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "f.safetensors", random_tensors(1, 5))
    with ours.safe_open(path, "pt", client=client) as file:
        getters: tuple[Callable[[Any], Any], ...] = (file.get_tensor, file.get_slice)
        for get in getters:
            with pytest.raises(TypeError):
                get(3)
            with pytest.raises(safetensors.SafetensorError, match="does not contain tensor nope"):
                get("nope")


def test_damage_and_absence_have_the_classes_of_both_libraries(
    client: StreamerClient, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    damaged.write_bytes(b"no header at all")
    with pytest.raises(safetensors.SafetensorError) as invalid:
        ours.safe_open(damaged, "pt", client=client)
    assert isinstance(invalid.value, errors.CheckpointInvalidError)
    assert invalid.value.reason == "CHECKPOINT_INVALID"
    with pytest.raises(FileNotFoundError) as absent:
        ours.safe_open(tmp_path / "absent", "pt", client=client)
    assert isinstance(absent.value, errors.CheckpointNotFoundError)
    assert "does not exist where penstockd runs" in str(absent.value)


def test_load_file_and_load_model_do_what_the_librarys_do(client: StreamerClient, tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.first, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
            self.last.weight = self.first.weight

    path = tmp_path / "tied.safetensors"
    library.save_model(Tied(1), str(path))
    assert alike(ours.load_file(path, client=client), library.load_file(path))
    model, wanted = Tied(2), Tied(3)
    assert ours.load_model(model, path, client=client) == library.load_model(wanted, path)
    same(model.state_dict().items(), wanted.state_dict())
    assert model.last.weight is model.first.weight
    other = torch.nn.Linear(4, 4)
    assert ours.load_model(other, path, strict=False, client=client) == library.load_model(
        other, path, strict=False
    )
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_model(other, path, client=client)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few MiB are large."""
    monkeypatch.setattr(safe_file, "SMALL_FILE_BYTES", MIB)
    monkeypatch.setattr(safe_file, "BATCH_BYTES", 6 * MIB)


def loads(daemon: DaemonProcess) -> int:
    return int(daemon.status()["totals"]["loads_ok"])


def test_a_large_file_is_read_in_three_loads_however_many_threads_ask(
    small: None, client: StreamerClient, shared_daemon: DaemonProcess, tmp_path: Path
) -> None:
    """One that opens it, one for the first tensor, one for all."""
    tensors = random_tensors(40, MIB // 8)
    path = write_checkpoint(tmp_path / "f.safetensors", tensors)
    before, read = loads(shared_daemon), shared_daemon.read_bytes()
    with ours.safe_open(path, "pt", client=client) as file, ThreadPoolExecutor(4) as threads:
        slices = {name: file.get_slice(name) for name in reversed(file.keys())}
        found = dict(zip(slices, threads.map(lambda part: part[:], slices.values()), strict=True))
    same(found.items(), tensors)
    wait_until(lambda: loads(shared_daemon) - before == 3, "three loads to be counted")
    assert shared_daemon.read_bytes() - read <= path.stat().st_size + 2 * MIB
    del found, slices


def test_one_tensor_of_a_large_file_is_read_alone(
    small: None, client: StreamerClient, shared_daemon: DaemonProcess, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "f.safetensors", random_tensors(20, MIB // 4))
    read = shared_daemon.read_bytes()
    with ours.safe_open(path, "pt", client=client) as file:
        part = file.get_slice("layer.7.weight")
        rows = [part[start : start + 1000] for start in range(0, MIB // 4, 1000)]
    assert torch.equal(torch.cat(rows), library.load_file(path)["layer.7.weight"])
    assert shared_daemon.read_bytes() - read < 3 * MIB
    del rows, part


def test_a_file_that_does_not_fit_is_read_in_batches_that_hold_no_memory(
    small: None, start_daemon: StartDaemon, tmp_path: Path
) -> None:
    tensors = random_tensors(40, MIB // 4)
    path = write_checkpoint(tmp_path / "f.safetensors", tensors)
    daemon = start_daemon("--memory-limit", "16MiB")
    with ours.safe_open(path, "pt", client=daemon.client()) as file:
        early = [file.get_tensor(f"layer.{number}.weight") for number in (0, 1, 2)]
        del early[0]  # of its own load: it came alone
        daemon.wait_idle()  # with most of the file still to come
    with ours.safe_open(path, "pt", client=daemon.client()) as file, ThreadPoolExecutor(4) as threads:
        found = dict(zip(tensors, threads.map(file.get_tensor, tensors), strict=True))
        same(found.items(), tensors)
        # One that opens it, one tensor alone, seven batches; more where a thread that was ahead began one.
        assert loads(daemon) < 20
    assert alike(ours.load_file(path, client=daemon.client()), library.load_file(path))


def test_tensors_are_writable_stay_good_after_the_file_and_then_give_their_memory_back(
    client: StreamerClient, shared_daemon: DaemonProcess, tmp_path: Path
) -> None:
    tensors = random_tensors(3, MIB)
    path = write_checkpoint(tmp_path / "f.safetensors", tensors)
    with ours.safe_open(path, "pt", client=client) as file:
        kept, late = file.get_tensor("layer.0.weight"), file.get_slice("layer.1.weight")
    kept += 1
    assert torch.equal(kept, tensors["layer.0.weight"] + 1)
    assert torch.equal(late[5:9], tensors["layer.1.weight"][5:9])
    assert torch.equal(ours.load_file(path, client=client)["layer.0.weight"], tensors["layer.0.weight"])
    assert shared_daemon.leased_bytes() > 0
    del kept, late
    wait_until(lambda: shared_daemon.leased_bytes() == 0, "the lease to end")


def test_what_was_taken_and_dropped_is_given_back_while_the_file_is_open(
    client: StreamerClient, shared_daemon: DaemonProcess, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "f.safetensors", random_tensors(3, MIB))
    with ours.safe_open(path, "pt", client=client) as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118
        sums = [float(part[:].sum()) for part in slices]
        wait_until(lambda: shared_daemon.leased_bytes() == 0, "the lease to end")
        assert [float(file.get_tensor(name).sum()) for name in file.keys()] == sums  # noqa: SIM118


def test_all_tensors_are_of_the_version_that_was_opened(
    small: None, client: StreamerClient, tmp_path: Path
) -> None:
    path = write_checkpoint(tmp_path / "f.safetensors", random_tensors(8, MIB // 4))
    with ours.safe_open(path, "pt", client=client) as file:
        file.get_tensor("layer.0.weight")
        path.unlink()
        write_checkpoint(path, random_tensors(8, MIB // 4, seed=9))
        with pytest.raises(errors.CheckpointChangedError):
            file.get_tensor("layer.1.weight")


def test_threads_that_ask_for_the_same_tensor_all_get_it(client: StreamerClient, tmp_path: Path) -> None:
    tensors = random_tensors(4, 1000)
    path = write_checkpoint(tmp_path / "f.safetensors", tensors)
    start = threading.Barrier(8)

    def take(file: Any) -> torch.Tensor:
        start.wait()
        return file.get_tensor("layer.2.weight")  # type: ignore[no-any-return]

    with ours.safe_open(path, "pt", client=client) as file, ThreadPoolExecutor(8) as pool:
        for found in pool.map(take, [file] * 8):
            assert torch.equal(found, tensors["layer.2.weight"])
    del found


def test_open_files_and_slices_are_not_pickled(client: StreamerClient, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "f.safetensors", random_tensors(1, 5))
    with ours.safe_open(path, "pt", client=client) as file:
        for thing in (file, file.get_slice("layer.0.weight")):
            with pytest.raises(TypeError, match="cannot be pickled"):
                pickle.dumps(thing)


def test_a_forked_child_has_what_was_taken_and_is_told_of_the_rest(
    client: StreamerClient, tmp_path: Path
) -> None:
    tensors = random_tensors(3, 1000)
    path = write_checkpoint(tmp_path / "f.safetensors", tensors)
    with ours.safe_open(path, "pt", client=client) as file:
        taken = file.get_tensor("layer.0.weight")
        file.get_tensor("layer.0.weight")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                assert bool((file.get_tensor("layer.0.weight") == tensors["layer.0.weight"]).all())
                with pytest.raises(errors.ForkedProcessError):
                    file.get_tensors()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del taken
