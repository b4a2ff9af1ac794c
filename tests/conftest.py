"""What all tests share: an environment of their own, and what a skipped test means in CI."""

import functools
import gc
import importlib.util
import os
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from .e2e import forked

# What is made until all tests are collected stays: to search it for garbage takes a second of each process.
gc.disable()

# Before another conftest imports torch, which reads it once. Tests run side by side, and threads of OpenMP
# spin while they wait for each other, on cores that other tests need.
os.environ["OMP_NUM_THREADS"] = "1"

_Report = TypeVar("_Report", pytest.TestReport, pytest.CollectReport)

TEMPORARY_DIRECTORY = Path("/tmp")
"""Short, as the path of a Unix socket has at most 107 bytes: not what TMPDIR of the caller says."""

_SETTINGS = (
    *("PENSTOCK_", "RUNAI_", "AWS_", "HF_", "AZURE_", "GOOGLE_", "GCE_METADATA_", "CLOUDSDK_"),
    *("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT"),
)
"""How the variables begin that daemons and clients read, or their libraries."""

LONGEST_FIRST = (
    "tests/attacks/test_soak.py",
    "tests/test_shell.py",
    "tests/e2e/failures/test_leaks.py",
    "tests/e2e/adopt/test_patched_",
    "tests/e2e/deployment/test_pods.py",
    "tests/attacks/",
    "tests/s3/test_network.py",
    "tests/s3/test_faults.py",
    "tests/s3/test_tier.py",
    "tests/server/tier/test_crashes.py",
    "tests/server/staging/test_buffer_machine.py",
    "tests/stress/",
)
"""How the files begin whose tests run before all others: they take longest."""

WAITING = ("tests/e2e/", "tests/engines/", "tests/s3/", "tests/stores/")
"""Directories whose tests start processes and wait for them. Those of others mostly compute."""

TOGETHER = (
    "tests/e2e/adopt/test_patched_",
    "tests/e2e/adopt/test_transformers.py",
    "tests/e2e/adopt/test_from_pretrained.py",
)
"""How the files begin that one process runs, as they import the same libraries, which takes seconds."""

MAY_SKIP_IN_CI = (
    # CI machines have no GPU. `pytest -m gpu` on one that has shows them all.
    r"there is no CUDA device",
    # Kernels before 6.5 have no cachestat, and the sum of what is read is tested elsewhere.
    r"this kernel does not say what is cached",
    # ext4 has no reflinks. The other ways of changing a file in place are tested beside.
    r"this file system shares no blocks",
    # Nor can every file system take a page out of the middle of a file, or have leases.
    r"this file system has no leases",
    r"this file system moves no blocks",
    # What a cgroup of the container may not do is up to who runs it.
    r"no overlay can be mounted here",
)
"""Patterns of reasons for which a test may be skipped in CI, where every other skipped test is a failure."""


def _judge_examples_by_outcome() -> None:
    """Hypothesis gives the same examples each time, and takes no slow machine for a fault. (Tests of engines
    run where it is not installed.)"""
    if importlib.util.find_spec("hypothesis") is None:
        return
    from hypothesis import HealthCheck, settings

    settings.register_profile(
        "penstock",
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    settings.load_profile("penstock")


def pytest_configure(config: pytest.Config) -> None:
    """Tests, and every process that they start, get nothing by chance from the shell that runs them: whether
    it ignores signals (as for a job in the background), its umask, its descriptors, its locale, TMPDIR."""
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python has it; what it starts gets the default
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)
    _judge_examples_by_outcome()
    _keep_descriptors_from_children()
    os.environ.update(LC_ALL="C.UTF-8", TZ="UTC")
    for name in ("LANG", "LANGUAGE", "PYTHONWARNINGS", "PYTHONPATH", "TMP", "TEMP"):
        os.environ.pop(name, None)
    for name in [name for name in os.environ if name.startswith(_SETTINGS)]:
        del os.environ[name]
    # Daemons of tests run side by side: each takes a port of its own.
    os.environ["PENSTOCK_HTTP_ADDRESS"] = "127.0.0.1:0"
    # For what is left behind; pytest's own directories outlive the run, for who looks into a failure.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(TEMPORARY_DIRECTORY))
    tempfile.tempdir = tempfile.mkdtemp(prefix="pst-", dir=TEMPORARY_DIRECTORY)
    os.environ["TMPDIR"] = tempfile.tempdir
    os.chmod(tempfile.tempdir, 0o1777)  # for tests that become other users
    config.add_cleanup(functools.partial(shutil.rmtree, tempfile.tempdir, ignore_errors=True))
    forked.ENVIRONMENT.update(os.environ)


def _keep_descriptors_from_children() -> None:
    for entry in os.listdir("/proc/self/fd"):
        try:
            if int(entry) > 2:
                os.set_inheritable(int(entry), False)
        except OSError:
            continue  # the one that listed the directory


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests run in one process: the files that take longest are begun first, so that no process is
    left with one of them at the end. After them, files of `WAITING` and others take turns, so that seldom all
    processes wait, or all compute; those with the most tests come first."""
    tests = Counter(item.nodeid.partition("::")[0] for item in items)
    by_size = sorted(tests, key=lambda name: (-tests[name], name))
    places: dict[str, tuple[int, float]] = {}
    for waits in (True, False):
        alike = [name for name in by_size if name.startswith(WAITING) == waits]
        places.update((name, (1, number / len(alike))) for number, name in enumerate(alike))
    for name in tests:
        ranks = [rank for rank, begin in enumerate(LONGEST_FIRST) if name.startswith(begin)]
        if ranks:
            places[name] = 0, ranks[0]

    def place(item: pytest.Item) -> tuple[tuple[int, float], str]:
        name = item.nodeid.partition("::")[0]
        return places[name], name

    items.sort(key=place)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `--dist loadfile`: a file's tests run in one process, and so do those of `TOGETHER`."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    scheduling = LoadFileScheduling(config, log)
    file_of = scheduling._split_scope
    scheduling._split_scope = lambda test: TOGETHER[0] if test.startswith(TOGETHER) else file_of(test)
    return scheduling


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """What is imported by now stays. `gc.collect`, which tests and libraries call often, need not go through
    torch each time. (This hook is called in xdist's own process too, which collects no tests.)"""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """So does what a file's tests imported: half a second of each `gc.collect` after some of them."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def pytest_sessionfinish() -> None:
    """For Hypothesis, which is imported for its summary and asks who refers to an object."""
    gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a test that could not run did not pass."""
    return _fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that could not be imported."""
    return _fail_if_skipped((yield))


def _fail_if_skipped(report: _Report) -> _Report:
    if report.skipped and os.environ.get("CI") and not hasattr(report, "wasxfail"):
        assert isinstance(report.longrepr, tuple)
        reason = str(report.longrepr[2])
        if not any(re.search(pattern, reason) for pattern in MAY_SKIP_IN_CI):
            report.outcome = "failed"
            report.longrepr = (
                f"{reason}: in CI a test may be skipped only for a reason that conftest.py lists"
            )
    return report


@pytest.fixture(scope="session")
def require_tool() -> Callable[[str], str]:
    """A function that returns the path of a system program that a test needs, or skips the test."""

    def require(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            pytest.skip(f"the program {name!r} is not installed: its package belongs into .ci/run")
        return path

    return require
