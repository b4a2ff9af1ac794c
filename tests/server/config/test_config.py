"""Flags and variables, sizes, and what the machine and the container allow."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.server.config.options import known_variables
from penstock.server.config.settings import (
    MAX_SLAB_BYTES,
    MIN_SLAB_BYTES,
    UNLIMITED_SLAB_BYTES,
    Config,
    load_config,
    slab_bytes,
)
from penstock.server.config.units import parse_size, show_size
from penstock.server.config.values import HttpAddress
from penstock.server.config.variables import unknown
from penstock.server.errors import ConfigError
from penstock.server.sources.stores import FLAGS
from penstock.server.system.limits import (
    OVERHEAD_BYTES,
    MemoryBound,
    is_privileged,
    memory_bound,
    shmem_huge_pages,
    user_share,
)

from ..support import MIB, make_config

GIB = 1 << 30
EXAMPLES = settings(derandomize=True, database=None, deadline=None)


def load(*flags: str, bound_bytes: int = 64 * GIB, variables: Mapping[str, str] | None = None) -> Config:
    return load_config(
        flags, variables or {}, lambda: MemoryBound(bound_bytes, "the machine's memory"), FLAGS
    )


def field_of(config: Config, field: str) -> object:
    return config.store_options[field] if field in config.store_options else getattr(config, field)


# flag; variables in order of precedence; the field; three texts and what they mean
OPTIONS = [
    (
        "--socket-dir",
        ["PENSTOCK_SOCKET_DIR"],
        "socket_dir",
        {"/a": Path("/a"), "/b/../c/": Path("/c"), "d": Path("d").absolute()},
    ),
    (
        "--memory-limit",
        ["PENSTOCK_MEMORY_LIMIT", "RUNAI_STREAMER_MEMORY_LIMIT"],
        "memory_limit",
        {"-1": -1, "0": 0, "4GiB": 4 * GIB, "1000000000": 10**9},
    ),
    (
        "--concurrency",
        ["PENSTOCK_CONCURRENCY", "RUNAI_STREAMER_CONCURRENCY"],
        "concurrency",
        {"3": 3, "5": 5, "7": 7},
    ),
    (
        "--block-size",
        ["PENSTOCK_BLOCK_SIZE", "RUNAI_STREAMER_CHUNK_BYTESIZE"],
        "block_bytes",
        {"2MiB": 2 * MIB, "65536": 65536, "1GiB": GIB},
    ),
    ("--window-size", ["PENSTOCK_WINDOW_SIZE"], "window_bytes", {"1GB": 10**9, "2Gi": 2 * GIB, "5": 5}),
    (
        "--allow",
        ["PENSTOCK_ALLOW"],
        "allow",
        {"/a": ("/a",), "/b\n/c d\n": ("/b", "/c d"), "s3://x/": ("s3://x/",)},
    ),
    ("--prefetch", ["PENSTOCK_PREFETCH"], "prefetch", {"/a": ("/a",), "/b\n/c": ("/b", "/c")}),
    ("--trim-after", ["PENSTOCK_TRIM_AFTER"], "trim_after_seconds", {"0": 0.0, "1.5": 1.5, "9": 9.0}),
    ("--queue-timeout", ["PENSTOCK_QUEUE_TIMEOUT"], "queue_timeout_seconds", {"0": 0.0, "1": 1.0, "2": 2.0}),
    ("--group-timeout", ["PENSTOCK_GROUP_TIMEOUT"], "group_timeout_seconds", {"0": 0.0, "1": 1.0, "2": 2.0}),
    ("--grace", ["PENSTOCK_GRACE"], "grace_seconds", {"0": 0.0, "1": 1.0, "2": 2.0}),
    ("--max-loads", ["PENSTOCK_MAX_LOADS"], "max_loads", {"1": 1, "2": 2, "3": 3}),
    (
        "--stall-timeout",
        ["PENSTOCK_STALL_TIMEOUT"],
        "stall_timeout_seconds",
        {"1": 1.0, "0.1": 0.1, "9": 9.0},
    ),
    (
        "--http-address",
        ["PENSTOCK_HTTP_ADDRESS"],
        "http_address",
        {
            "none": None,
            "0.0.0.0:80": HttpAddress("0.0.0.0", 80),
            "[::1]:9464": HttpAddress("::1", 9464),
            "localhost:0": HttpAddress("localhost", 0),
        },
    ),
    ("--log-format", ["PENSTOCK_LOG_FORMAT"], "log_format", {"json": "json", "text": "text"}),
    ("--log-level", ["PENSTOCK_LOG_LEVEL"], "log_level", {"debug": "debug", "error": "error"}),
]
CASES = [pytest.param(*option, id=option[0]) for option in OPTIONS]


@pytest.mark.parametrize(("flag", "variables", "field", "values"), CASES)
def test_a_flag_and_each_of_its_variables_set_the_field(
    flag: str, variables: list[str], field: str, values: Mapping[str, object]
) -> None:
    for text, value in values.items():
        assert field_of(load(f"{flag}={text}"), field) == value
        for variable in variables:
            assert field_of(load(variables={variable: text}), field) == value


@pytest.mark.parametrize(("flag", "variables", "field", "values"), CASES)
def test_a_flag_wins_over_its_variables_and_the_first_variable_over_the_second(
    flag: str, variables: list[str], field: str, values: Mapping[str, object]
) -> None:
    wanted, *others = list(values)
    for winner in range(len(variables) + 1):
        environment = dict.fromkeys(variables[winner:], others[0])
        if winner == 0:
            config = load(f"{flag}={wanted}", variables=environment)
        else:
            config = load(variables={**environment, variables[winner - 1]: wanted})
        assert field_of(config, field) == values[wanted]


@pytest.mark.parametrize(("flag", "variables", "field", "values"), CASES)
def test_an_empty_variable_is_as_good_as_none(
    flag: str, variables: list[str], field: str, values: Mapping[str, object]
) -> None:
    assert field_of(load(variables=dict.fromkeys(variables, "")), field) == field_of(load(), field)


def test_the_defaults() -> None:
    config = load()
    assert config.memory_limit == -1
    assert (config.concurrency, config.block_bytes, config.max_loads) == (16, 8 * MIB, 256)
    assert (config.trim_after_seconds, config.group_timeout_seconds, config.grace_seconds) == (60, 60, 30)
    assert (config.allow, config.prefetch) == ((), ())
    assert config.socket_dir == Path("/run/penstock")
    assert not config.populate
    assert not config.exit_with_stdin


@pytest.mark.parametrize(
    ("flag", "bad"),
    [
        ("--memory-limit", ["-2", "4XB", "lots", "", "1e9", "--", "9" * 5000, "4G\nB", "1MiB", "99TB"]),
        ("--concurrency", ["1025", "0", "-1", "1.5", "many", "9" * 5000]),
        ("--block-size", ["0", "4095", "2GiB", "x"]),
        ("--window-size", ["-1", "x"]),
        ("--allow", ["models", "./x", "ftp://x", "http://", "https://u@h/", "hf://-", "/a\nb"]),
        ("--prefetch", ["models"]),
        ("--trim-after", ["-1", "x", "nan", "inf", "1e10"]),
        ("--queue-timeout", ["-1", "x"]),
        ("--group-timeout", ["-1", "x"]),
        ("--grace", ["-1", "x"]),
        ("--max-loads", ["0", "x"]),
        ("--stall-timeout", ["0", "0.09", "x"]),
        (
            "--http-address",
            ["9464", ":9464", "localhost", "localhost:", "h:65536", "h:1e3", "h:-1", "h:²"],
        ),
        ("--log-format", ["xml", "JSON"]),
        ("--log-level", ["loud"]),
        ("--socket-dir", ["/" + "x" * 100, "", " "]),
    ],
)
def test_a_bad_value_is_refused_in_one_line_that_names_its_origin(flag: str, bad: list[str]) -> None:
    variables = next(option[1] for option in OPTIONS if option[0] == flag)
    for text in bad:
        with pytest.raises(ConfigError) as caught:
            load(f"{flag}={text}")
        assert str(caught.value).startswith(f"{flag}: ")
        assert len(str(caught.value).splitlines()) == 1
        for variable in variables:
            if text and flag not in ("--socket-dir",) and text not in ("1MiB", "99TB"):
                with pytest.raises(ConfigError, match=f"^{variable}: "):
                    load(variables={variable: text})


def test_flags_that_may_be_repeated_add_up() -> None:
    config = load("--allow", "/a", "--allow=/b", "--prefetch", "/c", "--prefetch", "/d")
    assert (config.allow, config.prefetch) == (("/a", "/b"), ("/c", "/d"))


def test_an_allowed_uri_of_a_file_is_its_path() -> None:
    config = load("--allow", "file:///models%20a", "--allow", "s3://b/with%20literal")
    assert config.allow == ("/models a", "s3://b/with%20literal")


def test_help_lists_every_flag_and_every_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    text = "".join(capsys.readouterr().out.split())
    for flag, variables, _, _ in OPTIONS:
        for name in (flag, *variables):
            assert name in text
    for flag in ("--no-populate", "--exit-with-stdin", "--version", "--ready-after-prefetch"):
        assert flag in text


@pytest.mark.parametrize("flags", [["--bogus"], ["--memory"], ["positional"], ["--concurrency"]])
def test_wrong_usage_ends_with_status_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(*flags)
    assert caught.value.code == 2
    assert "usage: penstockd" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--prefetch=/a", "--memory-limit=0"], ["--prefetch", "--memory-limit"]),
        (["--prefetch=/a", "--prefetch=/b", "--max-loads=2"], ["--prefetch", "--max-loads"]),
        (["--block-size=64MiB", "--memory-limit=32MiB"], ["--block-size", "--memory-limit"]),
        (["--s3-unsigned=1", "--s3-requester-pays=1"], ["--s3-unsigned", "--s3-requester-pays"]),
    ],
)
def test_flags_that_contradict_each_other_are_refused_and_both_are_named(
    flags: list[str], named: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*flags)
    assert len(str(caught.value).splitlines()) == 1
    for name in named:
        assert name in str(caught.value)
    for one in range(len(flags)):
        load(*flags[:one], *flags[one + 1 :])


@pytest.mark.parametrize(
    ("variable", "field", "on"),
    [("READY_AFTER_PREFETCH", "ready_after_prefetch", True), ("NO_POPULATE", "populate", False)],
)
def test_a_switch_has_a_variable_too(variable: str, field: str, on: bool) -> None:
    name = f"PENSTOCK_{variable}"
    for text, value in {"1": on, "true": on, "0": not on, "False": not on, "": not on}.items():
        assert getattr(load("--memory-limit=1GiB", variables={name: text}), field) == value
    with pytest.raises(ConfigError, match=f"^{name}: "):
        load(variables={name: "yes please"})


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("PENSTOCK_MEMORY_LIMTI", "PENSTOCK_MEMORY_LIMIT"),
        ("PENSTOCK_HTTP_ADDR", "PENSTOCK_HTTP_ADDRESS"),
        ("PENSTOCK_ALOW", "PENSTOCK_ALLOW"),
        ("PENSTOCK_REPLACE_RUN_AI", "PENSTOCK_REPLACE_RUNAI"),
        ("PENSTOCK_XYZZY_QUUX", ""),
        # Like others only for the prefix.
        ("PENSTOCK_MODEL", ""),
        ("PENSTOCK_TOKEN", ""),
        ("PENSTOCK_DEBUG", ""),
    ],
)
def test_a_variable_that_means_nothing_is_found_with_the_nearest_that_does(name: str, nearest: str) -> None:
    assert unknown([name, *known_variables(FLAGS)], known_variables(FLAGS)) == [(name, nearest)]


def test_variables_of_others_are_nobodys_business() -> None:
    """Those that Kubernetes sets for a Service named penstock, those of clients, those of other programs."""
    names = [
        *("PENSTOCK_SERVICE_HOST", "PENSTOCK_SERVICE_PORT", "PENSTOCK_SERVICE_PORT_HTTP", "PENSTOCK_PORT"),
        *("PENSTOCK_PORT_9464_TCP", "PENSTOCK_PORT_9464_TCP_ADDR", "PENSTOCK_PORT_9464_TCP_PROTO"),
        *("PENSTOCK_METRICS_SERVICE_HOST", "PENSTOCK_METRICS_PORT_80_TCP_PORT"),
        *("PENSTOCK_SOCKET_DIR", "PENSTOCK_PINNED_BYTES", "RUNAI_STREAMER_CONCURRENCY", "HOME"),
    ]
    assert unknown(names, known_variables(FLAGS)) == []


def test_every_variable_that_the_client_s_code_names_is_known() -> None:
    client = Path(__file__).parents[3] / "client"
    text = "".join(path.read_text() for path in client.rglob("*.py"))
    names = set(re.findall(r"PENSTOCK_[A-Z0-9_]+", text))
    assert {"PENSTOCK_PINNED_BYTES", "PENSTOCK_REPLACE_RUNAI"} <= names
    assert unknown(names, known_variables(FLAGS)) == []


# ---- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "slab"),
    [
        (-1, UNLIMITED_SLAB_BYTES),
        (0, MIN_SLAB_BYTES),
        (MIN_SLAB_BYTES, MIN_SLAB_BYTES),
        (64 * 10**6, 2 * MIB),
        (255 * MIB, 2 * MIB),
        (256 * MIB, 4 * MIB),
        (10**9, 14 * MIB),
        (GIB, 16 * MIB),
        (4 * GIB, 64 * MIB),
        (64 * GIB, GIB),
        (640 * GIB, GIB),
    ],
)
def test_a_slab_is_a_64th_of_the_limit(limit: int, slab: int) -> None:
    assert slab_bytes(limit) == slab


@given(st.integers(MIN_SLAB_BYTES, 1 << 42))
@EXAMPLES
def test_slabs_are_whole_huge_pages_and_waste_little(limit: int) -> None:
    slab = slab_bytes(limit)
    assert slab % (2 * MIB) == 0
    assert MIN_SLAB_BYTES <= slab <= MAX_SLAB_BYTES
    used = limit // slab * slab
    assert used > 0
    assert limit - used < max(slab, limit * 0.02)


def test_a_limit_is_the_capacity_and_may_be_as_large_as_what_bounds_it() -> None:
    config = load("--memory-limit=8GiB", bound_bytes=8 * GIB)
    assert config.capacity_bytes == config.memory_limit == 8 * GIB
    assert config.max_slabs == 64
    assert config.populate
    assert config.keeps_warm
    assert not config.trims
    assert not load("--memory-limit=8GiB", "--no-populate").populate


def test_a_limit_above_what_bounds_it_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=rf"{8 * GIB + 1} .* the machine's memory of {8 * GIB} "):
        load(f"--memory-limit={8 * GIB + 1}", bound_bytes=8 * GIB)


@pytest.mark.parametrize("limit", ["-1", "0"])
def test_without_a_number_the_capacity_is_what_the_machine_bears(limit: str) -> None:
    config = load("--memory-limit", limit, bound_bytes=2 * GIB)
    assert config.capacity_bytes == 2 * GIB - OVERHEAD_BYTES
    assert config.max_slabs * config.slab_bytes <= config.capacity_bytes
    assert config.trims
    assert not config.populate
    with pytest.raises(ConfigError, match="the machine's memory of 268435456 bytes leaves no room"):
        load("--memory-limit", limit, bound_bytes=OVERHEAD_BYTES)


def test_only_the_minimal_limit_keeps_nothing_warm() -> None:
    assert [load("--memory-limit", text).keeps_warm for text in ("-1", "0", "1GB")] == [True, False, True]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4000000000", 4 * 10**9),
        ("4GB", 4 * 10**9),
        ("4gb", 4 * 10**9),
        ("4G", 4 * 10**9),
        ("4GiB", 4 * GIB),
        ("4Gi", 4 * GIB),
        (" 4 GiB ", 4 * GIB),
        ("1.5KiB", 1536),
        ("0.1GB", 10**8),
        ("1.1TB", 1_100_000_000_000),
        ("7b", 7),
        ("2MiB", 2 * MIB),
        ("3k", 3000),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(0, 1 << 70), st.sampled_from([("", 1), ("kB", 10**3), ("MiB", MIB), ("Ti", 1 << 40)]))
@EXAMPLES
def test_whole_numbers_of_any_size_are_exact(number: int, unit: tuple[str, int]) -> None:
    assert parse_size(f"{number}{unit[0]}") == number * unit[1]


@given(st.text())
@example("9" * 400 + ".5GB")
@example("1.")
@example(".5")
@example("٣")
@example("-1")
@EXAMPLES
def test_any_text_is_a_size_or_a_value_error(text: str) -> None:
    with suppress(ValueError):
        assert parse_size(text) >= 0


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_500_000, "1.5 MB"),
        (4 * 10**9, "4.0 GB"),
        (10**13, "10.0 TB"),
    ],
)
def test_sizes_are_shown_in_decimal_units(size: int, text: str) -> None:
    assert show_size(size) == text


# ---- the machine --------------------------------------------------------------------------------


def machine(root: Path, cgroup: str, files: Mapping[str, str | int], *, memory_kib: int = 16 << 20) -> Path:
    """A tree with /proc and /sys as the kernel shows them. `cgroup` is /proc/self/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/meminfo").write_text(f"MemFree:  1 kB\nMemTotal:       {memory_kib} kB\nSwapTotal: 5 kB\n")
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


V1_UNLIMITED = 9223372036854771712


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        pytest.param("0::/\n", {}, None, id="v2, root"),
        pytest.param("0::/a/b\n", {"a/b/memory.max": 5 * GIB}, 5 * GIB, id="v2"),
        pytest.param("0::/a/b\n", {"a/b/memory.max": "max"}, None, id="v2, no limit"),
        pytest.param(
            "0::/a/b/c\n",
            {"a/b/c/memory.max": "max", "a/b/memory.max": 7 * GIB, "a/memory.max": 3 * GIB},
            3 * GIB,
            id="v2, an ancestor's limit is tighter",
        ),
        pytest.param(
            "0::/a/b\n",
            {"a/b/memory.max": 2 * GIB, "a/memory.max": 3 * GIB},
            2 * GIB,
            id="v2, own is tighter",
        ),
        pytest.param("0::/a\n", {"b/memory.max": GIB}, None, id="v2, another group's limit"),
        pytest.param(
            "0::/kubepods/pod1/container\n",
            {"memory.max": 4 * GIB},
            4 * GIB,
            id="v2, the path is not visible",
        ),
        pytest.param(
            "0::/../../other\n", {"memory.max": 4 * GIB}, 4 * GIB, id="v2, namespace seen from inside"
        ),
        pytest.param("0::/a:b\n", {"a:b/memory.max": 4 * GIB}, 4 * GIB, id="v2, a colon in the path"),
        pytest.param(
            "5:memory:/docker/x\n3:cpu,cpuacct:/docker/x\n",
            {"memory/docker/x/memory.limit_in_bytes": 6 * GIB, "cpu/docker/x/memory.max": 1},
            6 * GIB,
            id="v1",
        ),
        pytest.param(
            "5:memory:/docker/x\n",
            {"memory/memory.limit_in_bytes": 6 * GIB},
            6 * GIB,
            id="v1, path not visible",
        ),
        pytest.param(
            "5:memory:/x/y\n",
            {"memory/x/y/memory.limit_in_bytes": V1_UNLIMITED, "memory/x/memory.limit_in_bytes": 2 * GIB},
            2 * GIB,
            id="v1, an ancestor's",
        ),
        pytest.param(
            "5:memory:/x\n", {"memory/x/memory.limit_in_bytes": V1_UNLIMITED}, None, id="v1, no limit"
        ),
        pytest.param(
            "5:memory:/x\n0::/u\n",
            {"memory/x/memory.limit_in_bytes": 6 * GIB, "unified/u/memory.max": 5 * GIB},
            5 * GIB,
            id="both at once",
        ),
    ],
)
def test_the_tightest_limit_of_the_process_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str | int], expected: int | None
) -> None:
    bound = memory_bound(machine(tmp_path, cgroup, files))
    if expected is None:
        assert bound == MemoryBound(16 * GIB, "the machine's memory")
    else:
        assert bound.limit_bytes == expected
        assert "cgroup" in bound.origin


def test_a_cgroup_that_allows_more_than_there_is_does_not_count(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/a\n", {"a/memory.max": 100 * GIB})
    assert memory_bound(root).limit_bytes == 16 * GIB


def test_a_kernel_without_control_groups_has_the_machines_memory(tmp_path: Path) -> None:
    root = machine(tmp_path, "", {})
    (root / "proc/self/cgroup").unlink()
    assert memory_bound(root).limit_bytes == 16 * GIB


def test_this_machine_has_some_memory_and_a_word_for_huge_pages() -> None:
    assert MIB < memory_bound().limit_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert shmem_huge_pages() in {"always", "within_size", "advise", "never", "deny", "force", "unknown"}


def test_root_and_the_daemons_own_user_are_privileged() -> None:
    assert is_privileged(0)
    assert is_privileged(os.geteuid())
    assert not is_privileged(os.geteuid() + 12_345)


@given(st.integers(2, 1 << 20))
@EXAMPLES
def test_a_users_share_leaves_something_for_another(count: int) -> None:
    assert 1 <= user_share(count) < count


def test_a_block_size_is_rounded_up_to_whole_pages() -> None:
    """Run:ai's variable takes any number of bytes."""
    assert load("--block-size", "65537").block_bytes == 69632


def test_a_daemon_says_for_how_long_what_nobody_uses_stays_warm() -> None:
    assert make_config(memory_limit=-1, trim_after_seconds=90.0).warm_for.startswith(
        "90 s after its last use"
    )
    assert make_config(memory_limit=0).warm_for.startswith("not at all")
    assert make_config(memory_limit=1 << 30).warm_for == "until others need the memory"
