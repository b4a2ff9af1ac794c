"""Which files of a directory are loaded: names in, a decision out. Pure.

A directory means the files that its index names, or else all its `*.safetensors`. These may come in several
variants, of which one is loaded, and in two layouts, of which the one of transformers is loaded. Spellings in
use:

    model.safetensors.index.json                an index         model.safetensors.index.fp16.json
    model.safetensors                           a single file    model.fp16.safetensors
    model-00001-of-00002.safetensors            a shard          model.fp16-00001-of-00002.safetensors
                                                                 model-00001-of-00002.fp16.safetensors

Hidden files are not part of a checkpoint: macOS, editors and downloads leave them behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..errors import CheckpointInvalidError, CheckpointNotFoundError
from ..sources import join
from .headers.recognise import what_is_there

WEIGHTS_SUFFIX = ".safetensors"
KNOWN_BASES = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_lora_weights", "consolidated")
"""The names that transformers, diffusers, peft and Mistral give their files."""
_OTHER_LAYOUT = "consolidated"
"""Mistral's own layout, in which tensors have other names."""
_KNOWN_VARIANTS = frozenset(
    {"fp32", "fp16", "bf16", "fp8", "fp4", "int8", "int4", "ema", "non_ema", "no_ema"}
)
MAX_PARTS = 50_000
"""Files of a directory between which it is decided, those of all its variants."""
_SHOWN = 8

_VARIANT = r"[A-Za-z][A-Za-z0-9_-]*"
_INDEX = re.compile(rf"(?P<stem>.+)\.safetensors\.index(?:\.(?P<variant>{_VARIANT}))?\.json", re.DOTALL)
_SHARD = re.compile(
    rf"(?P<stem>.+)-(?P<number>[0-9]{{1,9}})-of-(?P<count>[0-9]{{1,9}})(?:\.(?P<variant>{_VARIANT}))?",
    re.DOTALL,
)
_DOTTED = re.compile(rf"(?P<base>.+)\.(?P<variant>{_VARIANT})", re.DOTALL)
_RANK = re.compile(r".*-rank-(?P<rank>\d+)-part-\d+\.safetensors", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Layout:
    """The files of a directory to load, by name."""

    index: str | None
    files: tuple[str, ...]
    """The files, if there is no index."""
    instead: tuple[str, ...] = ()
    """A complete checkpoint beside the index, if there is one. It is loaded if files that the index names are
    missing."""
    rival: str | None = None
    """A single file with the same checkpoint as the index, or an older or newer version of it."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Part:
    """The parts of a file name that belongs to a checkpoint."""

    name: str
    base: str
    variant: str
    is_index: bool = False
    number: int = 0
    """For a shard."""
    count: int = 0


def is_index(name: str) -> bool:
    """Whether a file of that name is an index, of any variant."""
    return _INDEX.fullmatch(name) is not None


def common_names(variant: str) -> list[str]:
    """The names to try, in order, for a checkpoint in a directory that cannot be listed."""
    names = []
    for base in KNOWN_BASES:
        index = f".index.{variant}.json" if variant else ".index.json"
        single = f"{base}.{variant}" if variant else base
        names += [base + WEIGHTS_SUFFIX + index, single + WEIGHTS_SUFFIX]
    return names


def decide(directory: str, names: Sequence[str], variant: str = "") -> Layout:
    """Which of the `names` in a directory to load, in that `variant`; without one, the default variant, or
    else the only one.

    Raises CheckpointNotFoundError if there is nothing to load, CheckpointInvalidError if the choice is
    ambiguous.
    """
    seen = [name for name in names if not name.startswith(".")]
    parts = [part for name in seen if (part := _take_apart(name, variant)) is not None]
    if len(parts) > MAX_PARTS:
        raise CheckpointInvalidError(
            f"{directory} holds {len(parts)} files of checkpoints, more than the {MAX_PARTS} between which "
            "penstockd chooses; name those to load, or their index",
            file=directory,
        )
    for part in parts:
        if not _is_text(part.name):
            raise CheckpointInvalidError(
                f"{directory} holds {part.name!a}, a name that is not UTF-8; rename the file, or name the "
                "others one by one",
                file=directory,
            )
    if not parts:
        raise CheckpointNotFoundError(
            f"{directory} holds no *{WEIGHTS_SUFFIX} file; {what_is_there(names)}", file=directory
        )
    chosen, warnings = _one_variant(directory, parts, variant)
    _refuse_ranks(directory, chosen)
    layout = _one_layout(chosen)
    indexes = [part for part in layout if part.is_index]
    if len(indexes) > 1:  # as transformers and vLLM, which look for this one alone
        indexes = [part for part in indexes if part.base == "model"] or indexes
    if len(indexes) > 1:
        raise CheckpointInvalidError(
            f"{directory} holds several index files ({_few(part.name for part in indexes)}); name the one "
            "to load",
            file=directory,
        )
    if indexes:
        return _with_index(indexes[0], chosen, warnings)
    return Layout(
        None, tuple(part.name for part in layout), warnings=(*warnings, *_missing_shards(directory, layout))
    )


def both(directory: str, layout: Layout) -> str:
    """The warning for a complete index beside a single file of the same name."""
    return (
        f"{directory} holds a checkpoint twice, in {layout.rival} and in the files that {layout.index} "
        "names; those of the index were loaded. Delete what is out of date"
    )


def stale(directory: str, layout: Layout, missing: str) -> str:
    """The warning for an index that names a missing file, when another checkpoint was loaded instead."""
    return (
        f"{join(directory, layout.index or '')} is stale: it names {missing[:200]}, which does not exist; "
        f"{_few(layout.instead)} was loaded instead. Delete the index"
    )


def _take_apart(name: str, variant: str) -> _Part | None:
    """None for a name of neither weights nor an index."""
    if match := _INDEX.fullmatch(name):
        base, dotted = _split(match["stem"], variant)
        return _Part(name, base, match["variant"] or dotted, is_index=True)
    if not name.endswith(WEIGHTS_SUFFIX) or name == WEIGHTS_SUFFIX:
        return None
    stem = name.removesuffix(WEIGHTS_SUFFIX)
    if match := _SHARD.fullmatch(stem):
        base, dotted = _split(match["stem"], variant)
        return _Part(
            name, base, match["variant"] or dotted, number=int(match["number"]), count=int(match["count"])
        )
    base, dotted = _split(stem, variant)
    return _Part(name, base, dotted)


def _split(stem: str, asked: str) -> tuple[str, str]:
    """Base and variant. A dot alone makes no variant, as names contain versions and sizes: `llama-3.1-8b`."""
    match = _DOTTED.fullmatch(stem)
    if match and (
        match["base"] in KNOWN_BASES or match["variant"] in _KNOWN_VARIANTS or match["variant"] == asked
    ):
        return match["base"], match["variant"]
    return stem, ""


def _one_variant(directory: str, parts: Sequence[_Part], variant: str) -> tuple[list[_Part], tuple[str, ...]]:
    there = sorted({part.variant for part in parts} - {""})
    chosen = [part for part in parts if part.variant == variant]
    if chosen:
        return chosen, ()
    if variant:
        has = ", ".join(there[:_SHOWN]) or "only the default one"
        raise CheckpointNotFoundError(
            f"{directory} holds no variant {variant[:100]!r}; choose one that it holds: {has}", file=directory
        )
    if len(there) > 1:
        raise CheckpointInvalidError(
            f"{directory} holds no default variant, but several others; choose one with variant=: "
            f"{', '.join(there[:_SHOWN])}",
            file=directory,
        )
    only = (
        f"{directory} holds the variant {there[0]!r} alone, and no default one; that was loaded. Choose "
        "it with variant="
    )
    return list(parts), (only,)


def _refuse_ranks(directory: str, parts: Sequence[_Part]) -> None:
    ranks = {match["rank"] for part in parts if (match := _RANK.fullmatch(part.name))}
    if ranks and all(_RANK.fullmatch(part.name) for part in parts):
        raise CheckpointInvalidError(
            f"{directory} holds what vLLM's sharded_state saves: of each of {len(ranks)} ranks its own "
            "part of every tensor, under the same names; load it with vLLM's load format sharded_state, or "
            "name the files of one rank",
            file=directory,
        )


def _one_layout(parts: Sequence[_Part]) -> Sequence[_Part]:
    if any(part.base == "model" for part in parts):
        return [part for part in parts if not part.base.startswith(_OTHER_LAYOUT)]
    return parts


def _with_index(index: _Part, parts: Sequence[_Part], warnings: tuple[str, ...]) -> Layout:
    whole = _whole(index.base, parts)
    rival = whole[0] if whole and not _is_shard(whole[0], parts) else None
    if not whole and index.base == "model":
        whole = _whole(_OTHER_LAYOUT, parts)
    return Layout(index.name, (), whole, rival, warnings)


def _whole(base: str, parts: Sequence[_Part]) -> tuple[str, ...]:
    """The single file of that base, or else a complete set of its shards."""
    files = [part for part in parts if part.base == base and not part.is_index]
    single = [part.name for part in files if not part.count]
    if single:
        return tuple(single[:1])
    complete = [shards for shards in _sets(files).values() if _complete(shards)]
    return tuple(part.name for part in complete[0]) if len(complete) == 1 else ()


def _sets(parts: Sequence[_Part]) -> dict[tuple[str, int], list[_Part]]:
    """Shards by base and by the number of shards that their names give."""
    sets: dict[tuple[str, int], list[_Part]] = {}
    for part in parts:
        if part.count:
            sets.setdefault((part.base, part.count), []).append(part)
    return sets


def _complete(shards: Sequence[_Part]) -> bool:
    numbers, count = {part.number for part in shards}, shards[0].count
    return len(numbers) == count and max(numbers) in (count, count - 1)  # counted from 1 or from 0


def _is_shard(name: str, parts: Sequence[_Part]) -> bool:
    return any(part.name == name and part.count for part in parts)


def _missing_shards(directory: str, parts: Sequence[_Part]) -> list[str]:
    """Warnings about missing shards: without an index nothing else shows that a download did not end."""
    warnings = [
        f"{directory} holds {len(shards)} of {count} shards of {base[:200]}, and no index; all that is there "
        "was loaded. Fetch the others"
        for (base, count), shards in _sets(parts).items()
        if not _complete(shards)
    ]
    return warnings[:_SHOWN]


def _few(names: Iterable[str]) -> str:
    every = list(names)
    more = f" and {len(every) - 4} more" if len(every) > 4 else ""
    return ", ".join(name[:100] for name in every[:4]) + more


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
