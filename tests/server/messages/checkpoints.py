"""What files and directories say, and what is asked of them."""

from __future__ import annotations

import json

from penstock.server.checkpoint.catalog import MAX_SOURCES
from penstock.server.checkpoint.headers.index import MAX_FILES, MAX_INDEX_BYTES
from penstock.server.checkpoint.headers.table import MAX_NAME_BYTES
from penstock.server.checkpoint.layout import decide
from penstock.server.checkpoint.selection import select, select_matching
from penstock.server.sources.verification import Wish

from ...error_rule import Example
from ..support import checkpoint_bytes, header_of
from . import provoked, resolved, said

INDEX = "model.safetensors.index.json"
GOOD = checkpoint_bytes([4])
U64 = 2**64 - 1


def header(raw: str | bytes, data: bytes = b"") -> bytes:
    raw = raw.encode() if isinstance(raw, str) else raw
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype: str, shape: list[int], start: int, end: int) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})


def damaged(content: bytes, wrong: str) -> Example:
    return provoked(
        resolved({"m.safetensors": content}, "m.safetensors"), "m.safetensors", wrong, "fetch it again"
    )


def index(content: str | bytes, wrong: str) -> Example:
    content = content.encode() if isinstance(content, str) else content
    return provoked(resolved({INDEX: content}), INDEX, wrong, "fetch it again")


A = f'"a": {entry("U8", [4], 0, 4)}'

EXAMPLES = [
    provoked(
        lambda: select_matching([header_of([4]).tensors], ["model.*"]),
        "the checkpoint",
        "has no tensor whose name matches 'model.*'",
        "compare with the names",
    ),
    provoked(
        resolved({"m.safetensors": GOOD}, wish=Wish("require")),
        "m.safetensors",
        "cannot be verified: its store says no checksum of the whole content",
        "write a SHA256SUMS beside it",
    ),
    provoked(
        resolved({"m.safetensors": GOOD, "SHA256SUMS": bytes((1 << 20) + 1)}, wish=Wish("require")),
        "SHA256SUMS",
        "has 1048577 bytes, more than 1048576",
        "leave only the names of the checkpoint's files in it",
    ),
    damaged(header('{"a": ' + "[" * 500, b"\0" * 9), "the header"),
    damaged(header('{"__metadata__": NaN}'), "the header is not JSON"),
    damaged(header('{"a": ' + "[" * 200 + "]" * 200 + "}"), "the header nests deeper than"),
    damaged(b"1234567", "too few for a safetensors file"),
    said(
        "/m/m.safetensors: the file",
        " has 7 bytes, too few for a safetensors file; ",
        "fetch it again, or save it again with safetensors",
    ),
    damaged(b"", "is empty"),
    damaged(GOOD[:20], "is cut off in its header"),
    damaged(bytes(100), "begins with 100 zeros"),
    damaged(b'{"error": "not found"}', "is JSON and no weights"),
    damaged(b"<html>", "is an HTML page"),
    damaged(b"<Error>", "is XML"),
    *(
        provoked(resolved({"m": content + bytes(64)}, "m"), "/m ", wrong, remedy)
        for content, wrong, remedy in [
            (b"version https://git-lfs.github.com/spec/v1", "is a pointer of Git LFS", "run `git lfs pull`"),
            (b"PK\3\4", "is a zip archive", "convert it"),
            (b"\x80\2", "is a pickle", "convert it"),
            (b"\x89HDF\r\n\x1a\n", "is an HDF5 file", "convert it"),
            (b"\x93NUMPY", "is a numpy array", "convert it"),
            (b"\x1f\x8b", "is compressed by gzip", "unpack it"),
            (b"\0\5\x16\7", "is an AppleDouble file", "name the other file"),
        ]
    ),
    provoked(resolved({INDEX: b""}), INDEX, "is empty", "fetch it again"),
    provoked(resolved({INDEX: b'{"weight'}), INDEX, "is cut off after 8 bytes", "fetch it again"),
    provoked(resolved({INDEX: GOOD}), INDEX, "is a safetensors file and no index", "rename it"),
    provoked(resolved({"README": b""}), "*.safetensors file", "holds no", "check the path"),
    provoked(
        lambda: decide("/m", [f"{number}.safetensors" for number in range(50_001)]),
        "/m",
        "holds 50001 files of checkpoints",
        "name those to load, or their index",
    ),
    said("/m", " holds 2001 files to load, more than 2000; ", "name some of them"),
    provoked(resolved({".m.safetensors": b""}), "'.m.safetensors'", "which is hidden", "name that file"),
    provoked(
        resolved({"model_index.json": b""}), "pipeline of diffusers", "weights in subdirectories", "name one"
    ),
    provoked(
        resolved({"blobs": b"", "snapshots": b""}),
        "holds no *.safetensors file",
        "it is the cache",
        "name the",
    ),
    damaged(
        (10**9).to_bytes(8, "little") + b"nothing known", "the header claims 1000000000 bytes, more than"
    ),
    damaged((100).to_bytes(8, "little") + b"\1nothing known", "the header claims 100 bytes in a file of"),
    damaged(header("[]", b"\1"), "the header is not a JSON object"),
    damaged(header('{"__metadata__": {"a": 1}}'), "__metadata__ is not an object of strings"),
    damaged(header('{"a": 1}'), "tensor 'a': its description is not an object"),
    damaged(header('{"__metadata__": 1e999}'), "number out of range: 1e999"),
    damaged(header(f'{{"a": {entry("U16", [U64], 0, 4)}}}'), "its shape times its dtype overflows 64 bits"),
    damaged(header(f'{{"a": {entry("U16", [U64, U64], 0, 4)}}}'), "its shape overflows 64 bits"),
    damaged(header(f'{{"a": {entry("U8", [4], 0, 5)}}}'), "offsets span 5 bytes, shape and dtype 32 bits"),
    damaged(
        header(f'{{"{"a" * (MAX_NAME_BYTES + 1)}": {entry("U8", [4], 0, 4)}}}'), "its name has more than"
    ),
    damaged(header(f'{{"a": {entry("U8", [1] * 65, 0, 1)}}}'), "it has 65 dimensions, more than 64"),
    damaged(GOOD[:-1], "it is cut off, 1 are missing"),
    damaged(header(b'{"\xff": 1}'), "the header is not UTF-8 at byte 2"),
    damaged(header('{"a": {]}'), "the header is not JSON"),
    damaged(
        header(f'{{{A}, "b": {entry("U8", [4], 8, 12)}}}', bytes(12)), "its data starts at 8, where 4 was due"
    ),
    damaged(header('{"__metadata__": {}, "__metadata__": {}}'), "__metadata__ occurs twice"),
    damaged(header('{"__metadata__": {"a": "\\ud800"}}'), "lone surrogate in"),
    said(
        "/m/m.safetensors: the header",
        " is too costly to read: 9 bytes did not parse within 9 bytes of memory and 30 seconds; ",
        "fetch it again, or save it again with safetensors",
    ),
    provoked(
        resolved({"m.gguf": b"GGUF\3\0\0\0" + bytes(64)}, "m.gguf"), "m.gguf", "is a GGUF file", "convert it"
    ),
    index('{"weight_map": 1}', "malformed index"),
    index('{"weight_map": {}}', "the index names no tensor"),
    index(b'{"metadata": "\xff", "weight_map": {"a": "m"}}', "the index is not UTF-8"),
    index('{"weight_map": {"a": "/etc/passwd"}}', "the index names a file it must not name"),
    index(f'{{"weight_map": {{"{"a" * (MAX_NAME_BYTES + 1)}": "m"}}}}', "the name is longer than"),
    index(
        json.dumps({"weight_map": {str(n): str(n) for n in range(MAX_FILES + 1)}}),
        "the index names more than 2000 files",
    ),
    said(
        "/m/model.safetensors.index.json: the index",
        f" has {MAX_INDEX_BYTES + 1} bytes, more than {MAX_INDEX_BYTES}; ",
        "fetch it again, or delete it if the files beside it are all there is",
    ),
    said(
        "/m/model.safetensors.index.json: an index",
        " of 1 GiB, larger than 32 MiB; ",
        "fetch it again, or delete it if the files beside it are all there is",
    ),
    provoked(
        resolved({INDEX: b'{"weight_map": {"a": "gone.safetensors"}}'}),
        INDEX,
        "names gone.safetensors, which does not exist",
        "fetch the file, or delete the index",
    ),
    provoked(
        resolved({INDEX: b'{"weight_map": {"a": "m.safetensors"}}', "m.safetensors": GOOD}),
        INDEX,
        "holds tensor 'a', which it does not",
        "fetch both again, or delete the index",
    ),
    provoked(
        resolved({"1.safetensors": GOOD, "2.safetensors": GOOD[:-1] + b"x"}),
        "2.safetensors",
        "both hold tensor 't0', and no index says which one counts",
        "delete the file that is out of date",
    ),
    said(
        "/m/1.safetensors and the other files of the load",
        " hold 500000 tensors twice, more than 65536; ",
        "delete the files that are out of date",
    ),
    provoked(
        resolved({"pytorch_model.bin": b""}),
        "holds no *.safetensors file",
        "'pytorch_model.bin' (PyTorch's pickles) instead",
        "convert or fetch",
    ),
    provoked(
        resolved({"a.safetensors.index.json": b"", "b.safetensors.index.json": b""}),
        "a.safetensors.index.json, b.safetensors.index.json",
        "holds several index files",
        "name the one to load",
    ),
    provoked(
        resolved({"model.safetensors": GOOD}, variant="fp16"),
        "variant 'fp16'",
        "holds no",
        "choose one that it holds",
    ),
    provoked(
        resolved({"model.fp16.safetensors": GOOD, "model.bf16.safetensors": GOOD}),
        "bf16, fp16",
        "holds no default variant",
        "choose one with variant=",
    ),
    provoked(
        resolved({"m.safetensors": GOOD}, "m.safetensors", variant="fp16"),
        "m.safetensors",
        "is one file, and only a directory has variants",
        "name the directory",
    ),
    provoked(
        resolved({"model-rank-0-part-0.safetensors": GOOD}),
        "vLLM's sharded_state",
        "its own part of every tensor",
        "load it with",
    ),
    provoked(
        resolved({"\udcff.safetensors": GOOD}),
        r"\udcff.safetensors",
        "a name that is not UTF-8",
        "rename the file",
    ),
    said("sources", ": there are none; ", "name at least one file, directory or URI"),
    provoked(
        resolved({}, *["x"] * (MAX_SOURCES + 1)),
        "sources",
        f"are more than {MAX_SOURCES}",
        "name fewer at a time",
    ),
    said("/m", f" makes it more than {MAX_FILES} files; ", "load fewer at a time"),
    said(
        "the headers of the first 9 of 10 files",
        " take 81 MiB, more than the 80 MiB that one load may have; ",
        "load fewer files at a time",
    ),
    provoked(
        lambda: select([], ["x"]), "'x'", "the checkpoint has no tensor named", "compare with the names"
    ),
]
