"""The file of a warm set: what it means, and what is said of its faults."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.server.loads.warm.wishes import (
    MAX_ENTRIES,
    MAX_FILE_BYTES,
    MAX_NAME_CHARACTERS,
    SHOWN_PROBLEMS,
    Wish,
    WishesError,
    parse,
)
from penstock.server.sources.stores import FLAGS

LOCATORS = [flags.locators for flags in FLAGS]


def parsed(text: str) -> tuple[Wish, ...]:
    return parse(text.encode(), LOCATORS)


def problems(text: str | bytes) -> tuple[str, ...]:
    with pytest.raises(WishesError) as caught:
        parse(text if isinstance(text, bytes) else text.encode(), LOCATORS)
    return caught.value.problems


def entry(more: str = "", *, name: str = "a", source: str = "/a") -> str:
    return f"checkpoints:\n  - name: {name}\n    source: {source}\n    {more}\n"


def test_entries_come_in_the_order_of_the_file_with_every_key() -> None:
    text = """
# What this node serves.
checkpoints:
  - {name: llama-3-8b, source: "s3://models/llama-3-8b/", pin: true}
  - name: parts
    source: [/models/one.safetensors, file:///models/two.safetensors]
    tensors: ["model.layers.*", lm_head.weight]
    variant: fp16
    tier: true
  - {name: B_2.x, source: /models/b, tensors: "*", pin: off, tier: false}
"""
    assert parsed(text) == (
        Wish("llama-3-8b", ("s3://models/llama-3-8b/",), pin=True),
        Wish(
            "parts",
            ("/models/one.safetensors", "file:///models/two.safetensors"),
            tensors=("model.layers.*", "lm_head.weight"),
            variant="fp16",
            tier=True,
        ),
        Wish("B_2.x", ("/models/b",), tensors=("*",)),
    )


def test_an_empty_list_keeps_nothing_warm() -> None:
    assert parsed("checkpoints: []") == ()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it is empty; write `checkpoints: []` if nothing is to be kept warm"),
        ("# nothing\n", "it is empty; write"),
        ("[]", "line 1: the file: is not a mapping; write keys such as `checkpoints:`"),
        ("{}", "line 1: checkpoints: is missing; add it"),
        ("checkpoint: []", "line 1: checkpoint: is no key of the file; remove it, or use checkpoints"),
        ("checkpoints:\n  a: 1\n", "line 2: checkpoints: is not a list; write its items after dashes"),
        ("checkpoints:\n  - /models/a\n", "line 2: an entry of checkpoints: is not a mapping; write keys"),
        ("checkpoints: []\ncheckpoints: []", "line 2: checkpoints: is there twice; remove one"),
        ("checkpoints:\n  - name: a\n", "line 2: source: is missing; add it to this entry"),
        ("checkpoints:\n  - source: /a\n", "line 2: name: is missing; add it to this entry"),
        (entry("pin: 'true'"), "line 4: pin: is neither true nor false; choose one, without quotes"),
        (
            entry("pinned: true"),
            "line 4: pinned: is no key of an entry of checkpoints; remove it, or use",
        ),
        (entry("[1]: true"), "line 4: a key: is no key of an entry"),
        (entry("<<: {pin: true}"), "line 4: <<: is no key of an entry"),
        (entry("source: /b"), "line 4: source: is there twice; remove one"),
        (
            entry("tier: 3"),
            "line 4: tier: is neither true nor false",
        ),
        (entry("tensors: []"), "line 4: tensors: is empty; write something, or remove the key"),
        (entry("tensors: [a, 2]"), "line 4: tensors: is not text; write it in quotes"),
        (entry("tensors: [[a]]"), "line 4: tensors: is not text; write it in quotes"),
        (entry("variant: 16"), "line 4: variant: is not text; write it in quotes"),
        (entry('variant: "a\\nb"'), "line 4: variant: has a control character or a line break in it; remove"),
        (entry("variant: !!python/object/apply:os.getpid []"), "line 4: variant: is not text"),
        (entry(name="1.5"), "line 2: name: is not text; write it in quotes"),
        (entry(name="a/b"), "line 2: name: 'a/b' is no name of a label; use at most 58 letters"),
        (entry(name="a-"), "line 2: name: 'a-' is no name of a label"),
        (entry(name="é"), "line 2: name: 'é' is no name of a label"),
        (entry(name="a" * (MAX_NAME_CHARACTERS + 1)), "is no name of a label"),
        (entry(source="models/a"), "line 3: source: 'models/a' is neither an absolute path nor"),
        (entry(source="[]"), "line 3: source: is empty; write something"),
        (entry(source="' /a'"), "line 3: source: ' /a' is not one source; write one, or a list of them"),
        (entry(source="/" + "a" * 3000), "line 3: source: has more than 2048 characters; shorten it"),
        (entry(source="*b"), "line 3: it is not YAML (found undefined alias"),
        ("checkpoints: [\n", "it is not YAML (expected the node content, but found '<stream end>'); correct"),
        ("a b: c: d", "line 1: it is not YAML (mapping values are not allowed here); correct it there"),
        ("a: 1\n---\nb: 2", "it is not YAML (but found another document); correct it there"),
        ("[" * 20_000, "it is nested too deeply; write a list of checkpoints"),
        (
            "#" * (MAX_FILE_BYTES + 1),
            f"it has more than the {MAX_FILE_BYTES} bytes that it may have; ",
        ),
        (b"a: 1\nb: \xff", "line 2: it is not UTF-8; save it as UTF-8"),
        ("a: \x00", "it is not YAML ("),
        ('a: "\\UFFFFFFFF"', "it is not YAML (an escape in quotes stands for no character); correct it"),
    ],
)
def test_a_fault_is_told_with_its_line_its_key_and_a_remedy(text: str | bytes, problem: str) -> None:
    (found,) = problems(text)
    assert problem in found


@given(
    st.lists(
        st.sampled_from([*"{}[]&*!|>-:#,'\"\\%@`?\n \t~0aU\xff\u2028", "<<: ", "!!map ", "\\x", "&a ", "*a"])
    )
)
def test_no_text_raises_another_error(parts: list[str]) -> None:
    for text in ("".join(parts), entry("".join(parts)), entry(source="".join(parts))):
        with contextlib.suppress(WishesError):
            parsed(text)


def test_every_fault_of_a_file_is_told_at_once() -> None:
    text = """
checkpoints:
  - {name: a, source: x, pin: 3}
  - {name: b}
  - {name: c, source: /c}
  - {name: c, source: /d}
"""
    assert [problem.split(":")[0:2] for problem in problems(text)] == [
        ["line 3", " source"],
        ["line 3", " pin"],
        ["line 4", " source"],
        ["line 6", " name"],
    ]
    assert "that of line 5 too" in problems(text)[-1]


def test_a_file_of_faults_is_told_in_a_bounded_number_of_lines() -> None:
    found = problems("checkpoints:\n" + "  - {}\n" * MAX_ENTRIES)
    assert len(found) == SHOWN_PROBLEMS + 1
    assert found[-1] == f"and {2 * MAX_ENTRIES - SHOWN_PROBLEMS} more"


def test_entries_are_bounded_also_where_aliases_repeat_them() -> None:
    bomb = "checkpoints:\n  - &a {name: a, source: /a}\n" + "  - *a\n" * MAX_ENTRIES
    assert f"has {MAX_ENTRIES + 1} items, more than {MAX_ENTRIES}; remove some" in problems(bomb)[0]


def test_a_pyramid_of_aliases_is_not_unfolded() -> None:
    levels = "".join(f"x{n + 1}: &x{n + 1} [{', '.join([f'*x{n}'] * 50)}]\n" for n in range(40))
    found = problems("x0: &x0 a\n" + levels + "checkpoints: *x40\n")
    assert all("is no key of the file" in problem for problem in found[:SHOWN_PROBLEMS])
