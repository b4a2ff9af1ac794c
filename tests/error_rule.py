"""One rule for every error message: it names the thing, what is wrong with it, and what to do.

`message_sites` finds every message in the source: each construction of an exception whose text has words
of its own. A table of `Example`s provokes real errors and marks the three parts in each message. The tests
of a package (tests/client/test_error_messages.py for the client) check three things:

    check(example)                the message has all three parts
    without_example(…)            every message in the source has an example; a new one fails the test until
                                  it has one
    sites with no words           errors that only pass on text are listed with where that text comes from

Messages and sites are matched by the message's own words, so that moving code changes nothing here.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# With fewer letters of its own, an error only passes on what somebody else said.
_LEAST_LETTERS = 5
_ANYTHING = ".*"
# A remedy tells somebody to do something. Extend this with the imperative that a new message uses.
_IMPERATIVES = re.compile(
    r"correct|fetch|free|make|refresh|unpack|"
    r"\b("
    r"add|allow|ask|build|call|catch|check|choose|close|compare|convert|copy|create|delete|"
    r"download|drop|exhaust|fill|give|install|iterate|keep|leave|list|load|lower|make|mount|move|"
    r"name|open|pass|pin|pip|point|pull|put|raise|read|remove|rename|repeat|report|restart|"
    r"retry|run|save|see|send|set|shorten|start|stop|stream|take|try|turn|unset|update|upgrade|upload|use|"
    r"wait|write"
    r")\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Site:
    """One wording of one error in the source."""

    file: str
    line: int
    # What its messages look like: its own words, and anything where values stand. Empty for a site that has
    # no words of its own.
    pattern: str
    source: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.source}"

    def matches(self, message: str) -> bool:
        return bool(self.pattern) and re.fullmatch(self.pattern, message, re.DOTALL) is not None


@dataclass(frozen=True, slots=True)
class Example:
    """An error as a user gets it, and the three parts of its message."""

    # Names the example in the test's id.
    title: str
    # Raises the error, or returns one that was made but not raised.
    provoke: Callable[[], object]
    thing: str
    wrong: str
    remedy: str

    def error(self) -> BaseException:
        """The error. Raises AssertionError when there is none."""
        try:
            returned = self.provoke()
        except Exception as error:
            return error
        if not isinstance(returned, BaseException):
            raise AssertionError(f"{self.title}: no error, but {returned!r}")
        return returned


def message_of(error: BaseException) -> str:
    """The message alone, without a load's id or an error number around it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error.args[0]) if error.args else ""


def check(message: str, *, thing: str, wrong: str, remedy: str) -> None:
    """Raises AssertionError unless the three parts stand in the message, side by side, and the last one tells
    somebody to do something."""
    spans = []
    for part, text in (("thing", thing), ("wrong", wrong), ("remedy", remedy)):
        start = message.find(text)
        assert text.strip(), f"the {part} is not marked, of {message!r}"
        assert start >= 0, f"the {part}, {text!r}, does not stand in {message!r}"
        spans.append((start, start + len(text), part))
    spans.sort()
    for (_, end, part), (start, _, other) in itertools.pairwise(spans):
        assert end <= start, f"the {part} and the {other} of {message!r} overlap"
    assert _IMPERATIVES.search(remedy), f"{remedy!r} tells nobody what to do; of {message!r}"


def message_sites(package: Path, makers: Iterable[str] = ()) -> list[Site]:
    """Every wording of every exception that the modules below `package` construct, by its class or by one of
    the functions `makers`, which add something to the text that they are given."""
    makers = frozenset(makers)
    found = []
    for path in sorted(package.rglob("*.py")):
        tree = ast.parse(path.read_text())
        functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            expression, is_made = _message(node, makers)
            if expression is None:
                continue
            for pattern in _patterns(expression, functions):
                own = pattern + is_made * _ANYTHING if _has_words(pattern) else ""
                found.append(
                    Site(str(path.relative_to(package)), expression.lineno, own, ast.unparse(expression))
                )
    return found


def without_example(sites: Iterable[Site], messages: Iterable[str]) -> list[str]:
    """The sites with words of their own that none of these messages comes from."""
    told = list(messages)
    return [str(site) for site in sites if site.pattern and not any(map(site.matches, told))]


def _message(node: ast.AST, makers: frozenset[str]) -> tuple[ast.expr | None, bool]:
    """The message of an exception's construction, and whether it is by one of the `makers`."""
    if not isinstance(node, ast.Call) or not node.args:
        return None, False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in makers:
        return node.args[0], True
    if not name.endswith(("Error", "Exception")):
        return None, False
    return (node.args[1] if name == "OSError" and len(node.args) > 1 else node.args[0]), False


def _patterns(expression: ast.expr, functions: dict[str, ast.FunctionDef]) -> list[str]:
    if isinstance(expression, ast.Constant):
        return [re.escape(str(expression.value))]
    if isinstance(expression, ast.JoinedStr):
        return ["".join(_part(value) for value in expression.values)]
    if isinstance(expression, ast.IfExp):
        return [*_patterns(expression.body, functions), *_patterns(expression.orelse, functions)]
    if isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.Add):
        return [
            left + right
            for left in _patterns(expression.left, functions)
            for right in _patterns(expression.right, functions)
        ]
    if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name):
        function = functions.get(expression.func.id)
        if function is not None:
            others = {name: other for name, other in functions.items() if other is not function}
            return [pattern for value in _returned(function) for pattern in _patterns(value, others)]
    return [_ANYTHING]


def _part(value: ast.expr) -> str:
    return re.escape(str(value.value)) if isinstance(value, ast.Constant) else _ANYTHING


def _returned(function: ast.FunctionDef) -> Iterator[ast.expr]:
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value is not None:
            yield node.value


def _has_words(pattern: str) -> bool:
    return len(re.findall(r"[A-Za-z]", pattern.replace(_ANYTHING, ""))) >= _LEAST_LETTERS
