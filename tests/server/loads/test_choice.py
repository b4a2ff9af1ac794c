"""Which files a fetch takes by default and by patterns, and which names it refuses."""

from __future__ import annotations

import pytest

from penstock.server.errors import CheckpointInvalidError, InvalidRequestError
from penstock.server.loads.choice import MAX_PATTERNS, Choice, check_name, check_together

MODEL = [
    "config.json",
    "tokenizer.model",
    "modeling_x.py",
    "1_Pooling/config.json",
    "README.md",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "sub/x.gguf",
    "x.pth",
    "original/params.json",
    ".git/config",
    "lost+found/x",
]


def taken(allow: list[str] | None = None, ignore: list[str] | None = None) -> list[str]:
    choice = Choice(allow or (), ignore or ())
    return [name for name in MODEL if choice.wanted(name)]


def test_all_but_weights_is_taken_by_default() -> None:
    assert taken() == [*MODEL[:5], "model.safetensors.index.json"]


def test_patterns_are_of_whole_names_and_a_slash_at_the_end_means_all_below() -> None:
    assert taken(["*.json"]) == [name for name in MODEL if name.endswith(".json")]
    assert taken(["original/"]) == ["original/params.json"]
    assert taken(["config.json"]) == ["config.json"]
    assert taken(["*.bin"]) == ["pytorch_model.bin"]
    assert taken(["[ct]*.json", "?.pth"]) == ["config.json", "x.pth"]
    assert taken(["CONFIG.json"]) == []


def test_what_is_to_be_left_wins_and_leaves_the_default_as_it_is() -> None:
    assert taken(ignore=["*.md", "1_Pooling/"]) == [*MODEL[:3], "model.safetensors.index.json"]
    assert taken(["*.json"], ["*/*"]) == ["config.json", "model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("ignore", "directory", "entered"),
    [
        ([], "original/", False),
        ([], "1_Pooling/", True),
        (["deep/*"], "deep/", False),
        (["deep/*"], "deeper/", True),
        (["deep/*.json"], "deep/", True),
        (["*"], "deep/", False),
    ],
)
def test_a_directory_is_entered_unless_all_below_is_left(
    ignore: list[str], directory: str, entered: bool
) -> None:
    assert Choice((), ignore).wanted(directory) is entered


@pytest.mark.parametrize("field", ["allow", "ignore"])
def test_patterns_are_few_and_short(field: str) -> None:
    few = {"allow": ["x"], "ignore": ["x"]}
    with pytest.raises(InvalidRequestError, match=f"{field}: {MAX_PATTERNS + 1} patterns are more"):
        Choice(**{**few, field: ["x"] * (MAX_PATTERNS + 1)})
    with pytest.raises(InvalidRequestError, match=rf"{field}: 'xxx.*' and so on has 257 characters"):
        Choice(**{**few, field: ["x" * 257]})


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../x", r"'\.\.'"),
        ("a/../../x", r"'\.\.'"),
        ("/etc/passwd", "nothing between slashes"),
        ("a//b", "nothing between slashes"),
        ("./x", r"'\.'"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("\x1b[2J", "control character"),
        ("\x85", "control character"),
        ("\udcff", "is not UTF-8"),
        ("x" * 256, "more than 1024 bytes, or 255 between slashes"),
        ("é" * 128, "255 between slashes"),
        ("/".join(["x" * 200] * 6), "more than 1024 bytes"),
    ],
)
def test_names_that_lead_elsewhere_or_cannot_be_made_are_refused(name: str, why: str) -> None:
    with pytest.raises(CheckpointInvalidError, match=rf"^s3://b/m/: the name .*{why}.*`ignore`"):
        check_name("s3://b/m/", name)


@pytest.mark.parametrize("name", ["a", "é漢 x+%41", "a/b/..c/...", ".hidden", "x" * 255, "a\\b"])
def test_other_names_are_taken(name: str) -> None:
    check_name("/m", name)


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["a", "b", "a"], "'a' is listed twice"),
        (["a/b", "a", "a.b"], "'a' is that of a file and of a directory"),
        (["x/a/b/c", "x/a!", "x/a"], "'x/a' is that of a file and of a directory"),
    ],
)
def test_names_that_take_each_other_s_place_are_refused(names: list[str], why: str) -> None:
    with pytest.raises(CheckpointInvalidError, match=why):
        check_together("/m", names)


def test_names_that_only_begin_alike_are_taken() -> None:
    check_together("/m", ["a", "ab", "a.b", "a!", "b/a", "b/ab", "b.a"])
