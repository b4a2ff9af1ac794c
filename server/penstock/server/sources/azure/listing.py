"""What a page of a list says: XML, of which a hostile store can make a parser do anything. So there are no
document types and entities here, and elements, their depth and their texts are bounded. Pure."""

from __future__ import annotations

import xml.parsers.expat
from dataclasses import dataclass, field
from urllib.parse import unquote

from ..objects.faults import Transient
from ..objects.service import Entry, Page

MAX_ELEMENTS = 200_000
"""A page of 1000 blobs has about 40,000, and as many of metadata as these may have."""
MAX_DEPTH = 10
MAX_TEXT_CHARACTERS = 16 << 10
"""A name has 1024, each written as up to nine; metadata 8 KiB."""
_ROOT = ("EnumerationResults",)
_BLOB = ("EnumerationResults", "Blobs", "Blob")
_PIECE_BYTES = 64 << 10
"""Between pieces other threads get their turn."""


def parse_page(body: bytes) -> Page:
    """Directories, where an account has some, are left out. Raises Transient."""
    reader = _Reader()
    parser = xml.parsers.expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = _refuse
    parser.EntityDeclHandler = _refuse
    try:
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
    """Handlers of the parser. Raise ValueError."""

    entries: list[Entry] = field(default_factory=list)
    next: str = ""
    whole: bool = False
    """The root was closed, and it is that of a list."""
    _path: list[str] = field(default_factory=list)
    _elements: int = 0
    _text: list[str] = field(default_factory=list)
    _characters: int = 0
    _encoded: bool = False
    _blob: dict[str, str] = field(default_factory=dict)

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self._elements += 1
        self._path.append(name)
        if self._elements > MAX_ELEMENTS or len(self._path) > MAX_DEPTH:
            raise ValueError("more elements than a list has")
        self._text, self._characters = [], 0
        if tuple(self._path) == _BLOB:
            self._blob = {}
        elif name == "Name":
            self._encoded = attributes.get("Encoded") == "true"

    def text(self, text: str) -> None:
        self._characters += len(text)
        if self._characters > MAX_TEXT_CHARACTERS:
            raise ValueError("a longer text than a list has")
        self._text.append(text)

    def end(self, name: str) -> None:
        path, text = tuple(self._path), "".join(self._text)
        self._path.pop()
        self._text, self._characters = [], 0
        if path == (*_BLOB, "Name"):
            self._blob["name"] = unquote(text, errors="strict") if self._encoded else text
        elif path[: len(_BLOB)] == _BLOB and path[len(_BLOB) : -1] in (("Properties",), ("Metadata",)):
            self._blob[name.lower()] = text.strip()
        elif path == _BLOB:
            self._end_blob()
        elif path == (*_ROOT, "NextMarker"):
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
