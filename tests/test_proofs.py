"""docs/proofs.md names the tests that prove what other pages say, and tells which were seen to fail."""

from __future__ import annotations

import re
from pathlib import Path

from .mutants.breaks import BREAKS, Break, known_tests, locate

ROOT = Path(__file__).parents[1]
PROOFS = (ROOT / "docs/proofs.md").read_text()
SECURITY = (ROOT / "docs/security.md").read_text()


def rows(text: str) -> dict[str, str]:
    """The tables' rows: what stands in the first column, and the rest."""
    cells = re.findall(r"^\| (.+?) \|(.*)\|$", text, re.MULTILINE)
    return {first: rest for first, rest in cells if not first.startswith("-")}


def test_every_test_that_the_page_of_proofs_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PROOFS))
    assert len(named) > 100
    assert named <= set(known_tests())


def test_every_bound_of_the_security_page_has_a_test() -> None:
    tables = SECURITY.partition("## What is enforced")[2].partition("## What is not enforced")[0]
    bounds = set(rows(tables)) - {"what", "queue"}
    proven = {bound for bound, tests in rows(PROOFS.partition("## Security")[2]).items() if "`test_" in tests}
    assert len(bounds) > 30
    assert bounds - proven == set(), "each needs a line with its test in docs/proofs.md"


def test_the_security_page_leaves_tests_to_the_page_of_proofs() -> None:
    assert re.findall(r"test_\w+", SECURITY) == []


def test_a_tick_says_that_a_test_was_seen_to_fail_with_its_rule_broken() -> None:
    ticked = set(re.findall(r"`(test_\w+)` ✓", PROOFS))
    unticked = set(re.findall(r"`(test_\w+)`(?! ✓)", PROOFS))
    broken = {each.test.partition("[")[0] for each in BREAKS}
    assert ticked == broken
    assert not ticked & unticked


def test_every_break_still_finds_the_text_that_it_replaces() -> None:
    def wrong(each: Break) -> str:
        count = (ROOT / each.file).read_text().count(each.old)
        return f"{each.file}: {each.old!r} occurs {count} times" if count != 1 else ""

    assert [words for words in map(wrong, BREAKS) if words] == []
    assert all((ROOT / locate(each.test).partition("::")[0]).is_file() for each in BREAKS)
