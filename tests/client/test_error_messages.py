"""Every error message of the client names the thing, what is wrong with it, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

import penstock.client

from ..error_rule import Example, check, message_of, message_sites, without_example
from .error_examples import EXAMPLES

PACKAGE = Path(penstock.client.__file__).parent
# Functions that make errors, and add what to do to the text that they are given.
MAKERS = ("broken",)
# Errors that pass on what somebody else said, and whose words these are.
PASSED_ON = {
    ("cli/arguments.py", "str(error)"): "of parse_memory_limit, for argparse",
    ("adopt/run_ai.py", "str(error)"): "of another error of the client or the daemon",
}
_messages: dict[str, str] = {}


def message(example: Example) -> str:
    """Provoked once."""
    if example.title not in _messages:
        _messages[example.title] = message_of(example.error())
    return _messages[example.title]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_an_error_names_the_thing_what_is_wrong_and_what_to_do(example: Example) -> None:
    check(message(example), thing=example.thing, wrong=example.wrong, remedy=example.remedy)


def test_every_error_message_has_an_example() -> None:
    messages = [message(example) for example in EXAMPLES]
    assert without_example(message_sites(PACKAGE, MAKERS), messages) == []


def test_errors_without_words_of_their_own_are_known() -> None:
    silent = {(site.file, site.source) for site in message_sites(PACKAGE, MAKERS) if not site.pattern}
    assert silent == PASSED_ON.keys()
