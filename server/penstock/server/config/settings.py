"""One frozen Config, validated once, from flags and environment."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..system.limits import OVERHEAD_BYTES, MemoryBound
from ..system.linux import HUGE_PAGE_BYTES
from .options import DEFAULT_BLOCK_BYTES, StoreFlags, read_options
from .units import show_size
from .values import MINIMAL, UNLIMITED, HttpAddress

SLABS_PER_LIMIT = 64
MIN_SLAB_BYTES = HUGE_PAGE_BYTES
MAX_SLAB_BYTES = 1 << 30
UNLIMITED_SLAB_BYTES = 64 << 20
UNIX_PATH_BYTES = 107
"""Longer socket paths fail in the kernel."""


@dataclass(frozen=True, slots=True)
class Config:
    """The daemon's configuration. Sizes in bytes, times in seconds."""

    socket_dir: Path
    memory_limit: int
    """As asked for: -1 unlimited, 0 minimal, else bytes."""
    capacity_bytes: int
    """The staging buffer never exceeds this: the limit, or without one the memory that the machine has."""
    slab_bytes: int
    concurrency: int
    block_bytes: int
    window_bytes: int
    allow: tuple[str, ...]
    prefetch: tuple[str, ...]
    ready_after_prefetch: bool
    warm_set: Path | None
    warm_set_interval_seconds: float
    node_features: Path | None
    trim_after_seconds: float
    queue_timeout_seconds: float
    group_timeout_seconds: float
    grace_seconds: float
    stall_timeout_seconds: float
    max_loads: int
    populate: bool
    http_address: HttpAddress | None
    """None: no HTTP."""
    log_format: str
    log_level: str
    exit_with_stdin: bool
    verify: str
    """off, auto or require."""
    object_concurrency: int
    object_block_bytes: int
    object_retries: int
    object_timeout_seconds: float
    tier_dir: Path | None
    """None: nothing is kept on a disk."""
    tier_limit_bytes: int
    tier_files: tuple[str, ...]
    """Paths below which local files are kept too."""
    tier_stale_seconds: float
    """0: a store that cannot be asked fails the load."""
    store_options: Mapping[str, Any]
    """Flags of one kind of storage alone: by the flag's name, without dashes."""

    @property
    def max_slabs(self) -> int:
        return self.capacity_bytes // self.slab_bytes

    @property
    def keeps_warm(self) -> bool:
        return self.memory_limit != MINIMAL

    @property
    def trims(self) -> bool:
        """Memory that nobody uses goes back to the system after a while."""
        return self.memory_limit <= 0

    @property
    def warm_for(self) -> str:
        """How long a checkpoint that nobody uses stays in memory, in words."""
        if not self.keeps_warm:
            return "not at all; set --memory-limit to keep checkpoints"
        if self.trims:
            return (
                f"{self.trim_after_seconds:g} s after its last use, or until the machine or the container "
                "runs short of memory; raise --trim-after, or set --memory-limit"
            )
        return "until others need the memory"


def load_config(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    bound: Callable[[], MemoryBound],
    stores: Sequence[StoreFlags],
) -> Config:
    """`stores` are the kinds of storage that there are. Raises ConfigError with one line that names the flag
    or variable; exits on `--help` and usage."""
    values = read_options(arguments, environment, stores)
    limit: int = values["memory_limit"]
    _check_together(values)
    for store in stores:
        store.check(values)
    capacity = _capacity(limit, bound())
    return Config(
        socket_dir=_checked_socket_dir(values["socket_dir"]),
        memory_limit=limit,
        capacity_bytes=capacity,
        slab_bytes=slab_bytes(limit),
        concurrency=values["concurrency"],
        block_bytes=values["block_size"],
        window_bytes=values["window_size"],
        allow=values["allow"],
        prefetch=values["prefetch"],
        ready_after_prefetch=values["ready_after_prefetch"],
        warm_set=values["warm_set"],
        warm_set_interval_seconds=values["warm_set_interval"],
        node_features=values["node_features"],
        trim_after_seconds=values["trim_after"],
        queue_timeout_seconds=values["queue_timeout"],
        group_timeout_seconds=values["group_timeout"],
        grace_seconds=values["grace"],
        stall_timeout_seconds=values["stall_timeout"],
        max_loads=values["max_loads"],
        populate=limit > 0 and not values["no_populate"],
        http_address=values["http_address"],
        log_format=values["log_format"],
        log_level=values["log_level"],
        exit_with_stdin=values["exit_with_stdin"],
        verify=values["verify"],
        object_concurrency=values["object_concurrency"],
        object_block_bytes=values["object_block_size"],
        object_retries=values["object_retries"],
        object_timeout_seconds=values["object_timeout"],
        tier_dir=values["tier_dir"],
        tier_limit_bytes=values["tier_limit"],
        tier_files=values["tier_files"],
        tier_stale_seconds=values["tier_stale"],
        store_options={option.field: values[option.field] for store in stores for option in store.options},
    )


def _check_together(values: Mapping[str, Any]) -> None:
    """Refuses flags that contradict each other."""
    limit = values["memory_limit"]
    if values["prefetch"] and limit == MINIMAL:
        raise ConfigError(
            "--prefetch: nothing can be kept staged with --memory-limit 0; give a limit that holds it, or -1"
        )
    if values["warm_set"] and limit == MINIMAL:
        raise ConfigError(
            "--warm-set: nothing can be kept warm with --memory-limit 0; give a limit that holds it, or -1"
        )
    if values["node_features"] and not values["warm_set"]:
        raise ConfigError(
            "--node-features: it tells what of --warm-set is warm, and there is none; give --warm-set too, "
            "or leave it out"
        )
    if len(values["prefetch"]) >= values["max_loads"]:
        raise ConfigError(
            f"--max-loads: {values['max_loads']} must be more than the number of --prefetch entries "
            f"({len(values['prefetch'])}), which are loads too; raise it"
        )
    if (values["tier_dir"] is None) != (values["tier_limit"] == 0):
        raise ConfigError(
            "--tier-dir and --tier-limit: one is given without the other; name the directory, and how much "
            "of its disk may be taken, such as 500GB"
        )
    for flag in ("tier_files", "tier_stale"):
        if values[flag] and values["tier_dir"] is None:
            raise ConfigError(
                f"--{flag.replace('_', '-')}: it is about what is kept on the local disk, and nothing is; "
                "give --tier-dir too, or leave it out"
            )
    if limit > 0 and values["block_size"] > max(limit, DEFAULT_BLOCK_BYTES):
        raise ConfigError(
            f"--block-size: a block of {values['block_size']} bytes is more than the whole --memory-limit of "
            f"{limit}; lower it"
        )


def slab_bytes(memory_limit: int) -> int:
    """A 64th of the limit in whole huge pages: rounding wastes little, and 64 descriptors are few.

    Without a limit 64 MiB; with the minimal limit as fine as it gets, because every load takes just what
    its largest tensor needs.
    """
    if memory_limit == UNLIMITED:
        return UNLIMITED_SLAB_BYTES
    share = memory_limit // SLABS_PER_LIMIT // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    return min(max(share, MIN_SLAB_BYTES), MAX_SLAB_BYTES)


def _capacity(limit: int, bound: MemoryBound) -> int:
    bearable = max(bound.limit_bytes - OVERHEAD_BYTES, 0)
    if limit <= 0:
        if bearable < UNLIMITED_SLAB_BYTES:
            raise ConfigError(
                f"{bound.origin} of {bound.limit_bytes} bytes leaves no room for a staging buffer beside the "
                f"{OVERHEAD_BYTES} bytes that penstockd itself may need; raise it"
            )
        return bearable
    if limit < MIN_SLAB_BYTES:
        raise ConfigError(
            f"--memory-limit: {limit} bytes are less than one slab of {MIN_SLAB_BYTES} bytes; raise it"
        )
    if limit > bound.limit_bytes:
        raise ConfigError(
            f"--memory-limit: {limit} bytes ({show_size(limit)}) are more than {bound.origin} of "
            f"{bound.limit_bytes} bytes ({show_size(bound.limit_bytes)}); lower the limit, or raise that"
        )
    return limit


def _checked_socket_dir(path: Path) -> Path:
    longest = len(os.fsencode(path / "penstock.sock"))
    if longest > UNIX_PATH_BYTES:
        raise ConfigError(
            f"--socket-dir: {path} is too long: a socket in it would have {longest} of at most "
            f"{UNIX_PATH_BYTES} bytes; choose a shorter one"
        )
    return path
