"""The output of `penstock status`: the daemon's status as tables for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..system.sizes import show_bytes

_STATES = ("free", "reading", "leased", "warm")
_NAME_CHARACTERS = 60
_ERRORS = 5


def show(status: dict[str, Any]) -> str:
    """Lines for a terminal. Text that clients chose is made printable."""
    parts = [
        _head(status),
        _warm_set(status),
        _stages(status),
        _holders(status),
        _loads(status),
        _errors(status),
    ]
    return "\n\n".join(part for part in parts if part)


def _head(status: dict[str, Any]) -> str:
    staging, readers, totals, health = (status[name] for name in ("staging", "readers", "totals", "health"))
    limit = staging["limit_bytes"]
    bound = "no limit" if limit is None else f"limit {show_bytes(limit)}"
    used = sum(staging[f"{state}_bytes"] for state in ("reading", "leased", "warm"))
    state = "ready" if health["ready"] else f"not ready: {_plain(health['reason'])}"
    stalled = f", {readers['stalled']} stalled" if readers["stalled"] else ""
    hung = [
        f"hangs     {_plain(mount['mount_point'])}: {mount['threads']} threads wait, for "
        f"{_duration(mount['seconds'])}"
        for mount in status.get("hung_mounts", [])  # a daemon of an earlier version sends none
    ]
    return "\n".join(
        [
            f"penstockd {status['version']}  pid {status['pid']}  on {_plain(status['host'])}  up "
            f"{_duration(status['uptime_seconds'])}  {state}",
            f"staging   {bound}, {show_bytes(used)} used: "
            + ", ".join(f"{show_bytes(staging[f'{name}_bytes'])} {name}" for name in _STATES)
            + f"; peak {show_bytes(staging['peak_bytes'])}"
            + ("; populating" if staging["populating"] else ""),
            f"readers   {readers['busy']} of {readers['threads']} busy{stalled}, "
            f"{show_bytes(readers['bytes_per_second'])}/s",
            f"so far    loads: {totals['loads_ok']} ok, {totals['loads_failed']} failed, "
            f"{totals['loads_cancelled']} cancelled; {show_bytes(totals['read_bytes'])} read, "
            f"{show_bytes(totals['delivered_bytes'])} delivered; {totals['stage_hits']} hits, "
            f"{totals['stage_misses']} misses, {totals['evictions']} evictions",
            *_tier(status),
            *hung,
        ]
    )


def _warm_set(status: dict[str, Any]) -> str:
    warm_set = status.get("warm_set")  # a daemon of an earlier version sends none
    if not warm_set or not warm_set["file"]:
        return ""
    rows = [
        (
            _plain(entry["name"]),
            entry["state"].replace("_", " ") + (", pinned" if entry["pin"] else ""),
            _share(entry["ready_bytes"], entry["total_bytes"]),
            _duration(entry["seconds"]),
            _plain(entry["reason"]) or "-",
            _sources(entry["sources"]),
        )
        for entry in warm_set["entries"]
    ]
    problems = [f"not in force: {_plain(warm_set['file'])}: {_plain(one)}" for one in warm_set["problems"]]
    table = _table(("WARM SET", "STATE", "READ", "SINCE", "WHY", "CHECKPOINT"), rows)
    return "\n".join([*problems, *([table] if table else [])])


def _tier(status: dict[str, Any]) -> list[str]:
    tier = status.get("tier")  # a daemon of an earlier version sends none
    if not tier or not tier["limit_bytes"]:
        return []
    off = f"; off: {_plain(tier['off_because'])}" if tier["off_because"] else ""
    return [
        f"tier      {show_bytes(tier['used_bytes'])} of {show_bytes(tier['limit_bytes'])}, "
        f"{tier['versions']} files; {show_bytes(tier['read_bytes'])} read, "
        f"{show_bytes(tier['written_bytes'])} written{off}"
    ]


def _stages(status: dict[str, Any]) -> str:
    rows = [
        (
            str(stage["id"]),
            stage["state"] + (", pinned" if stage["pinned"] else ""),
            show_bytes(stage["capacity_bytes"]) + ("" if stage["full"] else " window"),
            _share(stage["ready_bytes"], stage["total_bytes"]),
            show_bytes(stage["verified_bytes"]) if stage.get("verified_bytes") else "-",
            _users(stage),
            _sources(stage["sources"]),
        )
        for stage in status["stages"]
    ]
    return _table(("STAGE", "STATE", "MEMORY", "READ", "VERIFIED", "USED BY", "CHECKPOINT"), rows)


def _users(stage: dict[str, Any]) -> str:
    count = len(stage["holders"])
    if not count:
        return f"idle {_duration(stage['idle_seconds'])}"
    return "1 client" if count == 1 else f"{count} clients"


def _holders(status: dict[str, Any]) -> str:
    rows = [
        (
            f"uid {holder['uid']} pid {holder['pid']} {_plain(holder['client_name'])}".rstrip(),
            str(stage["id"]),
            _duration(holder["held_seconds"]),
        )
        for stage in status["stages"]
        for holder in stage["holders"]
    ]
    return _table(("HOLDER", "STAGE", "SINCE"), rows)


def _loads(status: dict[str, Any]) -> str:
    rows = [
        (
            load["load_id"],
            load["kind"],
            load["state"] + (f", place {load['queue_place']}" if load["queue_place"] else ""),
            _share(load["delivered_bytes"], load["total_bytes"]),
            f"{show_bytes(load['bytes_per_second'])}/s",
            _duration(load["running_seconds"]),
            load["waits_for"] or "-",
            _group(load.get("group")),
            f"uid {load['uid']} pid {load['pid']} {_plain(load['client_name'])}".rstrip(),
            _sources(load["sources"]),
        )
        for load in status["loads"]
    ]
    head = (
        "LOAD",
        "KIND",
        "STATE",
        "DELIVERED",
        "RATE",
        "SINCE",
        "WAITS FOR",
        "GROUP",
        "CLIENT",
        "CHECKPOINT",
    )
    return _table(head, rows)


def _group(group: dict[str, Any] | None) -> str:
    return f"{_plain(group['name'])} {group['joined']}/{group['size']}" if group else "-"


def _errors(status: dict[str, Any]) -> str:
    rows = [
        (
            f"{_duration(error['age_seconds'])} ago",
            error["load_id"] or "-",
            error["reason"],
            _plain(error["message"]),
        )
        for error in status["errors"][:_ERRORS]
    ]
    return _table(("FAILED", "LOAD", "REASON", "WHAT"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, *rows]
    if len(lines) == 1:
        return ""
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def aligned(line: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()

    return "\n".join(map(aligned, lines))


def _share(part: int, whole: int) -> str:
    return f"{show_bytes(part)} of {show_bytes(whole)}, {100 * part // whole} %" if whole else "-"


def _sources(sources: Sequence[str]) -> str:
    first = _plain(sources[0]) if sources else ""
    if len(first) > _NAME_CHARACTERS:
        first = "..." + first[3 - _NAME_CHARACTERS :]
    return first + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")


def _plain(text: str) -> str:
    """Control characters that a client chose must not reach the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if not minutes and not hours:
        return f"{rest} s"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
