"""The rule that the tests of error messages are built on finds what it shall find."""

from __future__ import annotations

from pathlib import Path

import pytest

from .error_rule import Example, check, message_of, message_sites, without_example

SOURCE = """
def advice(name):
    return f"{name} is not installed: pip install {name}"

def fail(name, size, words):
    raise ValueError(f"{name} has {size} bytes: give a smaller one")
    raise ModuleNotFoundError(advice(name))
    raise errors.ClosedError("read twice: open it again" if size else "closed: open another")
    raise OSError(5, f"cannot map {size} bytes: raise the limit")
    raise KeyError(words)
    raise TypeError(f"{name}: {words}")
    return RuntimeError("first half, " + f"second half of {name}")
"""


def test_every_wording_of_every_construction_is_found(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(SOURCE)
    messages = [
        "x is not installed: pip install y",
        "x has 3 bytes: give a smaller one",
        "read twice: open it again",
        "closed: open another",
        "cannot map 9 bytes: raise the limit",
        "first half, second half of a\nb",
    ]
    sites = message_sites(tmp_path)
    assert without_example(sites, messages) == []
    for left_out in messages:
        told = [message for message in messages if message != left_out]
        assert len(without_example(sites, told)) == 1, left_out
    assert [site.source for site in sites if not site.pattern] == ["words", "f'{name}: {words}'"]


@pytest.mark.parametrize(
    ("thing", "wrong", "remedy", "complaint"),
    [
        ("", "is too long", "give a name", "not marked"),
        ("the name", "is short", "give a name", "does not stand in"),
        ("the name", "name is too long", "give a name", "overlap"),
        ("the name", "give a name", "is too long", "tells nobody"),
    ],
)
def test_a_message_without_one_of_the_parts_is_told(
    thing: str, wrong: str, remedy: str, complaint: str
) -> None:
    message = "the name is too long: give a name"
    check(message, thing="the name", wrong="is too long", remedy="give a name")
    with pytest.raises(AssertionError, match=complaint):
        check(message, thing=thing, wrong=wrong, remedy=remedy)


def test_an_example_that_raises_nothing_is_no_example() -> None:
    with pytest.raises(AssertionError, match="no error, but 3"):
        Example("three", lambda: 3, "", "", "").error()
    assert message_of(Example("made", lambda: OSError(5, "it broke"), "", "", "").error()) == "it broke"
