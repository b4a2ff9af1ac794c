"""Parses a page of a list. It is XML, with which a hostile store could make a parser do anything. So document
types and entities are refused, and elements, their depth and their texts are bounded. Pure."""

from __future__ import annotations

import xml.parsers.expat
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from ..objects.faults import Transient
from ..objects.markup import MAX_ELEMENTS, is_costly
from ..objects.service import Entry, Page

MAX_DEPTH = 10
MAX_TEXT_CHARACTERS = 12 << 10
"""Most characters of a text. A name has 1024, each written as up to twelve; metadata have 8 KiB."""
_ROOT = "/EnumerationResults"
_BLOB = f"{_ROOT}/Blobs/Blob"
_PIECE_BYTES = 64 << 10
"""Bytes parsed at once. Other threads run between these pieces."""


def parse_page(body: bytes) -> Page:
    """Directories are left out, if the account has any. Raises Transient."""
    reader = _Reader()
    parser = xml.parsers.expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = _refuse
    parser.EntityDeclHandler = _refuse
    try:
        if is_costly(body):
            raise ValueError("a longer tag than a list has, or another encoding")
        for start in range(0, len(body), _PIECE_BYTES):
            parser.Parse(body[start : start + _PIECE_BYTES], False)
        parser.Parse(b"", True)
    except (xml.parsers.expat.ExpatError, ValueError, LookupError) as error:
        raise Transient("bad_response", "HTTP 200 and not the list that was asked for") from error
    if not reader.whole:
        raise Transient("bad_response", "HTTP 200 and not the list that was asked for")
    return Page(reader.entries, reader.next)


@dataclass
class _Reader:
    """The parser's handlers. They raise ValueError."""

    entries: list[Entry] = field(default_factory=list)
    next: str = ""
    whole: bool = False
    """Whether the root was closed, and is that of a list."""
    _paths: list[str] = field(default_factory=lambda: [""])
    """The paths of the open elements, from the outermost to the innermost."""
    _elements: int = 0
    _text: list[str] = field(default_factory=list)
    _characters: int = 0
    _encoded: bool = False
    _blob: dict[str, str] = field(default_factory=dict)

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._elements += 1
        if self._elements > MAX_ELEMENTS or len(self._paths) > MAX_DEPTH:
            raise ValueError("more elements than a list has")
        path = f"{self._paths[-1]}/{name}"
        self._paths.append(path)
        self._text, self._characters = [], 0
        if path == _BLOB:
            self._blob = {}
        elif name == "Name":
            self._encoded = attributes.get("Encoded") == "true"

    def text(self, text: str) -> None:
        self._characters += len(text)
        if self._characters > MAX_TEXT_CHARACTERS:
            raise ValueError("a longer text than a list has")
        self._text.append(text)

    def end(self, name: str) -> None:
        path, text = self._paths.pop(), "".join(self._text)
        self._text, self._characters = [], 0
        if path == f"{_BLOB}/Name":
            self._blob["name"] = unquote_to_bytes(text).decode() if self._encoded else text
        elif path in (f"{_BLOB}/Properties/{name}", f"{_BLOB}/Metadata/{name}"):
            self._blob[name.lower()] = text.strip()
        elif path == _BLOB:
            self._end_blob()
        elif path == f"{_ROOT}/NextMarker":
            self.next = text.strip()
        elif path == _ROOT:
            self.whole = True

    def _end_blob(self) -> None:
        blob = self._blob
        if blob.get("hdi_isfolder") == "true" or blob.get("resourcetype") == "directory":
            return
        size = blob.get("content-length", "")
        size_bytes = int(size) if size.isascii() and size.isdecimal() and len(size) < 20 else None
        etag = blob.get("etag", "").removeprefix("W/").strip('"')
        self.entries.append(Entry(blob["name"], size_bytes, etag))


def _refuse(*_: object) -> None:
    raise ValueError("a list declares no types and entities")
