"""The file of a warm set: YAML, of which every fault is told with its line, its key and what to do.

    checkpoints:
      - {name: llama, source: "s3://models/llama/", pin: true, tensors: ["model.*"], variant: fp16}
      - {name: qwen, source: /nfs/qwen, tier: true}

The file is an operator's, but may be any text: its size, its depth and its entries are bounded, and no tag of
YAML makes an object. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import yaml

from ...config import values

MAX_FILE_BYTES = 128 << 10
"""Parsing it takes about a second: all entries, with names and sources of the usual length, have a tenth."""
MAX_ENTRIES = 64
MAX_SOURCES = 64
"""Of one entry."""
MAX_PATTERNS = 64
MAX_TEXT_CHARACTERS = 2048
"""Of one source or pattern."""
MAX_NAME_CHARACTERS = 58
"""With `warm-` before it, it is the name of a label of Kubernetes, which has at most 63."""
SHOWN_PROBLEMS = 20

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
_KEYS = ("name", "source", "pin", "tier", "tensors", "variant")
_TAG = "tag:yaml.org,2002:"
_TRUE = ("true", "yes", "on")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Wish:
    """One checkpoint that is to be warm."""

    name: str
    sources: tuple[str, ...]
    pin: bool = False
    tensors: tuple[str, ...] = ()
    """Patterns, of which a tensor's name has to match one; none: all tensors."""
    variant: str = ""
    tier: bool = False
    """Its local files are kept on the local disk too; and what is kept of it there goes last."""


class WishesError(Exception):
    """The file is no warm set. `problems` has a line for each fault, which names the line and the remedy."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


def parse(raw: bytes, stores: Sequence[values.Locators]) -> tuple[Wish, ...]:
    """The entries, in the order of the file. `stores` are the kinds of storage that there are. Takes up to a
    second. Raises WishesError."""
    return _Parser(stores).parse(raw)


class _Fault(Exception):
    """A value cannot be used; the problem is noted already."""


class _Parser:
    def __init__(self, stores: Sequence[values.Locators]) -> None:
        self._stores = stores
        self._problems: list[str] = []

    def parse(self, raw: bytes) -> tuple[Wish, ...]:
        wishes = tuple(self._wishes(self._compose(raw)))
        if self._problems:
            more = len(self._problems) - SHOWN_PROBLEMS
            shown = self._problems[:SHOWN_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
            raise WishesError(shown)
        return wishes

    def _compose(self, raw: bytes) -> yaml.Node | None:
        """Nodes with their lines; nothing is constructed, and an alias is its node once more."""
        if len(raw) > MAX_FILE_BYTES:
            raise WishesError([f"it has more than the {MAX_FILE_BYTES} bytes that it may have; shorten it"])
        try:
            return yaml.compose(raw.decode(), Loader=yaml.SafeLoader)
        except UnicodeDecodeError as error:
            line = raw.count(b"\n", 0, error.start) + 1
            raise WishesError([f"line {line}: it is not UTF-8; save it as UTF-8"]) from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"line {mark.line + 1}: " if mark else ""
            raise WishesError([f"{where}it is not YAML ({error.problem}); correct it there"]) from None
        except yaml.YAMLError as error:
            why = " ".join(str(error).split())[:200]
            raise WishesError([f"it is not YAML ({why}); correct it"]) from None
        except (ValueError, OverflowError):  # of PyYAML, which has no error of its own for these
            why = "an escape in quotes stands for no character"
            raise WishesError([f"it is not YAML ({why}); correct it"]) from None
        except RecursionError:
            raise WishesError(["it is nested too deeply; write a list of checkpoints"]) from None

    def _wishes(self, root: yaml.Node | None) -> Iterator[Wish]:
        if root is None:
            self._problems.append("it is empty; write `checkpoints: []` if nothing is to be kept warm")
            return
        fields = self._fields(root, ("checkpoints",), "the file")
        listed = fields.get("checkpoints")
        if listed is None:
            if not self._problems:
                self._note(root, "checkpoints", "is missing; add it, with a list of checkpoints")
            return
        names: dict[str, int] = {}
        for item in self._list(listed, "checkpoints", MAX_ENTRIES):
            wish = self._wish(item)
            if wish is None:
                continue
            line = item.start_mark.line + 1
            if wish.name in names:
                self._note(item, "name", f"{wish.name!r} is that of line {names[wish.name]} too; rename one")
            names.setdefault(wish.name, line)
            yield wish

    def _wish(self, node: yaml.Node) -> Wish | None:
        fields = self._fields(node, _KEYS, "an entry of checkpoints")
        before = len(self._problems)
        for key in ("name", "source"):
            if isinstance(node, yaml.MappingNode) and key not in fields:
                self._note(node, key, "is missing; add it to this entry")
        name = self._read(fields, "name", self._name, "")
        none: tuple[str, ...] = ()
        sources = self._read(fields, "source", self._sources, none)
        pin = self._read(fields, "pin", self._bool, False)
        tensors = self._read(fields, "tensors", self._patterns, none)
        variant = self._read(fields, "variant", self._text, "")
        tier = self._read(fields, "tier", self._bool, False)
        if len(self._problems) > before or not fields:
            return None
        return Wish(name, sources, pin, tensors, variant, tier)

    # ---- values ---------------------------------------------------------------------------------

    def _name(self, key: str, node: yaml.Node) -> str:
        name = self._text(key, node)
        if len(name) > MAX_NAME_CHARACTERS or not _NAME.fullmatch(name):
            raise self._fault(
                node,
                key,
                f"{name[:80]!r} is no name of a label; use at most {MAX_NAME_CHARACTERS} letters, digits, "
                "'-', '_' and '.', with a letter or digit first and last",
            )
        return name

    def _sources(self, key: str, node: yaml.Node) -> tuple[str, ...]:
        return tuple(self._source(key, item) for item in self._one_or_more(node, key, MAX_SOURCES))

    def _source(self, key: str, node: yaml.Node) -> str:
        source = self._text(key, node)
        try:
            found = values.locations(source, self._stores)
        except ValueError as error:
            raise self._fault(node, key, str(error)) from None
        if found != (source,):
            raise self._fault(node, key, f"{source[:80]!r} is not one source; write one, or a list of them")
        return source

    def _patterns(self, key: str, node: yaml.Node) -> tuple[str, ...]:
        return tuple(self._text(key, item) for item in self._one_or_more(node, key, MAX_PATTERNS))

    def _text(self, key: str, node: yaml.Node) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag != f"{_TAG}str":
            raise self._fault(node, key, "is not text; write it in quotes")
        text: str = node.value
        if not text.strip():
            raise self._fault(node, key, "is empty; write something, or remove the key")
        if len(text) > MAX_TEXT_CHARACTERS:
            raise self._fault(node, key, f"has more than {MAX_TEXT_CHARACTERS} characters; shorten it")
        if not text.isprintable():
            raise self._fault(node, key, "has a control character or a line break in it; remove it")
        return text

    def _bool(self, key: str, node: yaml.Node) -> bool:
        if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}bool":
            return node.value.lower() in _TRUE
        raise self._fault(node, key, "is neither true nor false; choose one, without quotes")

    # ---- structure ------------------------------------------------------------------------------

    def _fields(self, node: yaml.Node, known: Sequence[str], what: str) -> dict[str, yaml.Node]:
        """The values of a mapping, by key."""
        if not isinstance(node, yaml.MappingNode):
            self._note(node, what, f"is not a mapping; write keys such as `{known[0]}:`")
            return {}
        fields: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = str(key_node.value)[:80] if isinstance(key_node, yaml.ScalarNode) else "a key"
            if key not in known:
                self._note(key_node, key, f"is no key of {what}; remove it, or use {', '.join(known)}")
            elif key in fields:
                self._note(key_node, key, "is there twice; remove one")
            else:
                fields[key] = value
        return fields

    def _list(self, node: yaml.Node, key: str, most: int) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            self._note(node, key, "is not a list; write its items after dashes, or [] for none")
            return []
        items: list[yaml.Node] = node.value
        if len(items) > most:
            self._note(node, key, f"has {len(items)} items, more than {most}; remove some")
        return items[:most]

    def _one_or_more(self, node: yaml.Node, key: str, most: int) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            return [node]
        before = len(self._problems)
        items = self._list(node, key, most)
        if len(self._problems) > before:
            raise _Fault
        if not items:
            raise self._fault(node, key, "is empty; write something, or remove the key")
        return items

    def _read(
        self, fields: dict[str, yaml.Node], key: str, read: Callable[[str, yaml.Node], _T], otherwise: _T
    ) -> _T:
        if key not in fields:
            return otherwise
        try:
            return read(key, fields[key])
        except _Fault:  # it is noted, and the other keys are looked at too
            return otherwise

    def _fault(self, node: yaml.Node, key: str, problem: str) -> _Fault:
        self._note(node, key, problem)
        return _Fault()

    def _note(self, node: yaml.Node, key: str, problem: str) -> None:
        self._problems.append(f"line {node.start_mark.line + 1}: {key}: {problem}")
