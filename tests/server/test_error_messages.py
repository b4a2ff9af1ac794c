"""Every error message of the daemon names the thing, what is wrong with it, and what to do. `messages/` has
an example of each."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

import penstock.server

from ..error_rule import Example, Site, check, message_of, message_sites
from .messages import ToldError, bounds, checkpoints, clouds, configuration, loads, storage, web

PACKAGE = Path(penstock.server.__file__).parent
EXAMPLES = [
    *configuration.EXAMPLES,
    *checkpoints.EXAMPLES,
    *storage.EXAMPLES,
    *clouds.EXAMPLES,
    *web.EXAMPLES,
    *bounds.EXAMPLES,
    *loads.EXAMPLES,
]

INTERNAL = {
    "the threads have been stopped": "raised to the daemon itself, as executors do",
    "slabs asked for": "a fault of the daemon's own",
    "a job needs a block": "a fault of the daemon's own",
    "abort raises": "never raised",
    "was recycled already": "a fault of the daemon's own",
    "cannot become": "a fault of the daemon's own",
    "not a tensor table": "between the daemon and its children",
    "not packed metadata": "between the daemon and its children",
    "not a packed index": "between the daemon and its children",
    "another kind of answer": "caught where a list is parsed",
    "more elements than a list has": "caught where a list is parsed",
    "a longer tag than a list has": "caught where a list is parsed",
    "a longer text than a list has": "caught where a list is parsed",
    "a list declares no types": "caught where a list is parsed",
    "a header block is cut off": "gRPC's libraries send none; closes the connection",
    "the headers end early": "connection.py says that the answer is no valid HTTP",
    "a header line is no header": "connection.py says that the answer is no valid HTTP",
    "the length of the body is no number": "connection.py says that the answer is no valid HTTP",
    "a number in a header block": "gRPC's libraries send none; closes the connection",
}
"""Parts of messages that reach no user, and why."""


PASSED_ON = {
    "checkpoint/headers/reading.py": "refusal.py names the file and says what to do",
    "checkpoint/headers/index.py": "refusal.py names the index and says what to do",
    "checkpoint/headers/rules.py": "refusal.py names the file and says what to do",
    "checkpoint/headers/serde.py": "refusal.py names the file and says what to do",
    "config/options.py": "options.py names the flag or the variable",
    "config/units.py": "options.py names the flag or the variable",
    "config/values.py": "options.py names the flag or the variable",
    "sources/objects/reach.py": "web/location.py names the URL, and reach.py the prefix",
}
"""Files whose errors are a part of a longer message, and whose."""


def internal(site: Site) -> bool:
    return any(part in site.source for part in INTERNAL)


def covered(site: Site, messages: Iterable[str]) -> bool:
    """Some message is the site's, or has its words where they are passed on."""
    if site.file in PASSED_ON:
        return any(re.search(site.pattern, message, re.DOTALL) for message in messages)
    return any(map(site.matches, messages))


@functools.cache
def message_and_kind(example: Example) -> tuple[str, type[BaseException]]:
    """Of its error, which is provoked once."""
    error = example.error()
    return message_of(error), type(error)


@pytest.fixture(scope="module")
def sites() -> list[Site]:
    return [site for site in message_sites(PACKAGE) if site.pattern]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_a_message_names_the_thing_what_is_wrong_and_what_to_do(example: Example) -> None:
    message, _ = message_and_kind(example)
    check(message, thing=example.thing, wrong=example.wrong, remedy=example.remedy)


def test_every_message_in_the_source_has_an_example(sites: list[Site]) -> None:
    messages = [message_and_kind(example)[0] for example in EXAMPLES]
    missing = [str(site) for site in sites if not internal(site) and not covered(site, messages)]
    assert not missing, "\n".join(["give each an example in tests/server/messages:", *missing])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_a_message_that_is_given_as_text_is_one_of_the_source(example: Example, sites: list[Site]) -> None:
    """With its remedy: so that nobody keeps an example of words that are gone."""
    message, kind = message_and_kind(example)
    if kind is ToldError:
        begins = example.remedy.split()[0].rstrip(",")
        assert any(begins in site.source and covered(site, [message]) for site in sites)


def test_nothing_is_called_internal_that_is_not_there(sites: list[Site]) -> None:
    for part in INTERNAL:
        assert any(part in site.source for site in sites), part
