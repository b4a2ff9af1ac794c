"""What a client chose must not forge a line or a field."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from penstock.server.system import log

EXAMPLES = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (debug|info|warning|error) ")
NASTY = [
    "a\n2026-01-01T00:00:00.000Z info forged",
    "a\r\nb",
    "a b=c",
    'a" b="c',
    "a' b='c",
    "",
    "\x1b[2J",
    "\u2028\u2029\x85\x0b\x0c",
    "\u202egnp.exe",
    "\ud800",
    "\\n\\",
    "ünïcödé",
]


class Lines:
    """A logger that writes as the daemon does, and what it wrote."""

    def __init__(self, *, as_json: bool) -> None:
        self._stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
        handler = logging.StreamHandler(self._stream)
        handler.setFormatter(log._Formatter(as_json=as_json))
        self.logger = logging.Logger("test")
        self.logger.addHandler(handler)

    def take(self) -> str:
        self._stream.flush()
        buffer = self._stream.buffer
        assert isinstance(buffer, io.BytesIO)
        text = buffer.getvalue().decode()
        buffer.seek(0)
        buffer.truncate()
        return text


@pytest.fixture
def text() -> Lines:
    return Lines(as_json=False)


@pytest.fixture
def as_json() -> Lines:
    return Lines(as_json=True)


def parse(line: str) -> dict[str, str]:
    """The fields of a text line, read as somebody would who knows the format."""
    found: dict[str, str] = {}
    rest = line
    while rest:
        match = re.match(r' ([a-z_]+)=("(?:[^"\\]|\\.)*"|[^ "]*)', rest)
        assert match, rest
        found[match[1]] = json.loads(match[2]) if match[2].startswith('"') else match[2]
        rest = rest[match.end() :]
    return found


@given(st.text(), st.text())
@EXAMPLES
@example(*NASTY[:2])
@example(*NASTY[2:4])
@example(*NASTY[4:6])
@example(*NASTY[6:8])
@example(*NASTY[8:10])
@example(*NASTY[10:])
def test_any_value_comes_out_of_a_text_line_as_it_went_in(text: Lines, one: str, other: str) -> None:
    log.event(text.logger, "load", {"source": one, "name": other, "bytes": 7})
    written = text.take()
    assert written.endswith("\n")
    assert len(written.splitlines()) == 1
    assert written[:-1].isprintable()
    head = LINE.match(written)
    assert head
    rest = written[head.end() : -1]
    assert rest.startswith("load ")
    assert parse(rest[len("load") :]) == {"source": one, "name": other, "bytes": "7"}


@given(st.text(), st.text())
@EXAMPLES
@example(*NASTY[:2])
@example(*NASTY[8:10])
def test_any_value_comes_out_of_a_json_line_as_it_went_in(as_json: Lines, one: str, other: str) -> None:
    log.event(as_json.logger, "load", {"source": one, "name": other, "bytes": 7})
    written = as_json.take()
    assert len(written.splitlines()) == 1
    line = json.loads(written)
    assert line["event"] == "load"
    assert (line["source"], line["name"], line["bytes"]) == (one, other, 7)
    assert set(line) == {"time", "level", "event", "source", "name", "bytes"}


@pytest.mark.parametrize("nasty", NASTY)
def test_a_message_or_an_error_cannot_forge_an_event(text: Lines, as_json: Lines, nasty: str) -> None:
    for lines in (text, as_json):
        try:
            raise OSError(nasty)
        except OSError:
            lines.logger.exception("reading %s failed", nasty)
        events = [line for line in lines.take().splitlines() if LINE.match(line) or line.startswith("{")]
        assert len(events) == 1


def test_an_error_is_shown_with_its_traceback(text: Lines, as_json: Lines) -> None:
    for lines in (text, as_json):
        try:
            raise OSError("boom")
        except OSError:
            lines.logger.exception("reading failed")
        written = lines.take()
        assert "OSError: boom" in written
        assert "test_an_error_is_shown" in written
    assert set(json.loads(written)) == {"time", "level", "event", "error"}


@pytest.fixture
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("_root_logger")
def test_set_up_sends_events_of_the_level_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up(as_json=True, level="warning")
    logger = logging.getLogger("penstock.test")
    log.event(logger, "unseen", {})
    log.event(logger, "seen", {"a": 1}, level=logging.WARNING)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [json.loads(line)["event"] for line in captured.err.splitlines()] == ["seen"]
