"""What a file is that is no safetensors file, or no index."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import SafetensorError, safe_open

from penstock.server.checkpoint.headers.recognise import FIRST_BYTES, not_an_index, not_safetensors
from penstock.server.checkpoint.headers.rules import InvalidHeaderError, parse_header_length

from ...support import checkpoint_bytes

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1000\n"
HTML = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><body>Access denied</body></html>"
XML = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'


def torch_saved(*, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def numpy_saved() -> bytes:
    buffer = io.BytesIO()
    numpy.save(buffer, numpy.ones(3))
    return buffer.getvalue()


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.safetensors", b"x" * 100)
    return buffer.getvalue()


WHOLE = checkpoint_bytes([100, 200])
HEADER_BYTES = 8 + int.from_bytes(WHOLE[:8], "little")

OTHERS = {
    "lfs": (LFS, "git lfs pull"),
    "html": (HTML, "HTML page"),
    "bare html": (b"<HTML><head>", "HTML page"),
    "xml": (XML, "XML"),
    "torch": (torch_saved(zipped=True), "torch.save"),
    "old torch": (torch_saved(zipped=False), "torch.save"),
    "zip": (zipped(), "zip archive"),
    "pickle": (pickle.dumps({"a": [1.0] * 100}, protocol=4), "pickle"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(64), "GGUF"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "HDF5"),
    "numpy": (numpy_saved(), "numpy"),
    "gzip": (gzip.compress(WHOLE), "gzip"),
    "apple": (b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(4064), "AppleDouble"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_are_known_by_their_first_bytes(kind: str) -> None:
    content, said = OTHERS[kind]
    first = content[:FIRST_BYTES]
    words = not_safetensors(first, len(content))
    assert words is not None
    assert said in words
    index_words = not_an_index(first, len(content), content[-FIRST_BYTES:])
    assert index_words is not None
    assert said in index_words


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (WHOLE[:7], "too few for a safetensors file"),
        (WHOLE[:8], f"{HEADER_BYTES - 8} more of the header alone are missing"),
        (WHOLE[: HEADER_BYTES - 5], "5 more of the header alone are missing"),
        (bytes(1000), "zeros"),
        (json.dumps({"error": "Repository not found" * 20}).encode(), "is JSON"),
    ],
)
def test_what_downloads_leave_is_known(content: bytes, said: str) -> None:
    words = not_safetensors(content[:FIRST_BYTES], len(content))
    assert words is not None
    assert said in words


def test_a_damaged_safetensors_file_is_not_taken_for_another_format() -> None:
    """Headers of 640 or 1152 bytes begin as pickles do, and of 35615 as gzip."""
    for header_bytes in (0x0280, 0x0480, 0x8B1F, 0x4B50):
        raw = b'{"a":' + b" " * (header_bytes - 6) + b"}"
        content = header_bytes.to_bytes(8, "little") + raw
        assert not_safetensors(content[:FIRST_BYTES], len(content)) is None


@pytest.mark.parametrize("kind", OTHERS)
def test_the_library_refuses_whatever_is_recognised(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(OTHERS[kind][0])
    with pytest.raises(SafetensorError), safe_open(path, framework="np"):
        pass
    with pytest.raises(InvalidHeaderError):
        parse_header_length(OTHERS[kind][0][:8], file_bytes=len(OTHERS[kind][0]))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b'{"weight_map": {"a": "m.safe', "is cut off after 28 bytes"),
        (WHOLE, "is a safetensors file and no index"),
        (b'{"weight_map": {"a": 1}}', None),
        (b"nothing at all", None),
    ],
)
def test_what_is_no_index_is_known(content: bytes, said: str | None) -> None:
    words = not_an_index(content[:FIRST_BYTES], len(content), content[-FIRST_BYTES:])
    assert words is None if said is None else words is not None and said in words
