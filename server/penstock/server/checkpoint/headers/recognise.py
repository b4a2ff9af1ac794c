"""Recognises files that should be safetensors files or indexes and are not: names, first bytes and sizes in,
words out. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from .rules import MAX_HEADER_BYTES

FIRST_BYTES = 512
"""How many of a file's first bytes are enough to recognise it."""

_FETCH = "fetch it again"
_CONVERT = "convert it to safetensors"
_UNPACK = "unpack it"
_LFS = b"version https://git-lfs"

_MAGIC: Sequence[tuple[bytes, str, str]] = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes them", _CONVERT),
    (b"\x80\x02", "a pickle, as torch.save writes them", _CONVERT),
    (b"\x80\x03", "a pickle", _CONVERT),
    (b"\x80\x04", "a pickle", _CONVERT),
    (b"\x80\x05", "a pickle", _CONVERT),
    (b"GGUF", "a GGUF file, as llama.cpp reads them", _CONVERT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes them", _CONVERT),
    (b"\x93NUMPY", "a numpy array", _CONVERT),
    (b"\x1f\x8b", "compressed by gzip", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", _UNPACK),
    (b"\xfd7zXZ\x00", "compressed by xz", _UNPACK),
    (b"BZh", "compressed by bzip2", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"\x00\x05\x16\x07", "an AppleDouble file, which macOS leaves beside others", "name the other file"),
)

_SUFFIXES: Mapping[str, str] = MappingProxyType(
    {
        ".bin": "PyTorch's pickles",
        ".pt": "PyTorch's pickles",
        ".pth": "PyTorch's pickles",
        ".ckpt": "PyTorch's pickles",
        ".distcp": "PyTorch's distributed checkpoints",
        ".gguf": "GGUF",
        ".h5": "HDF5",
        ".keras": "Keras",
        ".msgpack": "Flax",
        ".npz": "numpy",
        ".npy": "numpy",
        ".onnx": "ONNX",
        ".tflite": "TensorFlow Lite",
        ".zip": "an archive",
        ".tar": "an archive",
        ".gz": "compressed",
        ".zst": "compressed",
        ".incomplete": "a download that did not end",
        ".aria2": "a download that did not end",
        ".part": "a download that did not end",
    }
)


def not_safetensors(first: bytes, size_bytes: int) -> str | None:
    """What is wrong with a file that the format's rules refuse, and the remedy, in words that follow its
    name. None if its `first` bytes (up to FIRST_BYTES) and its size do not show it."""
    if not size_bytes:
        return f"is empty; {_FETCH}"
    header_bytes = int.from_bytes(first[:8], "little")
    if len(first) >= 8 and header_bytes <= MAX_HEADER_BYTES and first[8:9] in (b"{", b""):
        missing = 8 + header_bytes - size_bytes
        if missing > 0:
            return (
                f"is cut off in its header: it has {size_bytes} bytes, {missing} more of the header alone "
                f"are missing; {_FETCH}"
            )
        return None
    known = _known(first, "safetensors file")
    if known is not None:
        return known
    if not any(first):
        return f"begins with {len(first)} zeros, as a download that did not end; {_FETCH}"
    if first.lstrip()[:1] in (b"{", b"["):
        return f"is JSON and no weights, as an error message that was saved; {_FETCH}"
    if size_bytes < 8:
        return f"is cut off: it has {size_bytes} bytes, too few for a safetensors file; {_FETCH}"
    return None


def not_an_index(first: bytes, size_bytes: int, last: bytes) -> str | None:
    """The same for a file that should be an index; `last` are its last bytes."""
    if not size_bytes:
        return f"is empty; {_FETCH}"
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") <= MAX_HEADER_BYTES:
        return "is a safetensors file and no index; rename it"
    known = _known(first, "index")
    if known is None and first.lstrip()[:1] == b"{" and last.rstrip()[-1:] != b"}":
        return f"is cut off after {size_bytes} bytes, in the middle of its JSON; {_FETCH}"
    return known


def what_is_there(names: Iterable[str]) -> str:
    """What a directory without safetensors files holds, judged by its names, and the remedy."""
    every = list(names)
    if {"blobs", "snapshots"}.issubset(every):
        return "it is the cache of a Hugging Face repository: name the directory of a revision in `snapshots`"
    if "model_index.json" in every:
        return "it is a pipeline of diffusers, which has its weights in subdirectories: name one of these"
    others = [(name, _SUFFIXES[suffix]) for name in every if (suffix := _suffix(name)) in _SUFFIXES]
    if others:
        name, kind = others[0]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return f"it has {name[:200]!a} ({kind}){more} instead: convert or fetch the checkpoint as safetensors"
    hidden = [name for name in every if name.startswith(".") and _suffix(name) == ".safetensors"]
    if hidden:
        return f"it has {hidden[0][:200]!a}, which is hidden: name that file if it is the one to load"
    return "check the path, and that the checkpoint was saved as safetensors"


def _known(first: bytes, expected: str) -> str | None:
    if first.startswith(_LFS):
        return "is a pointer of Git LFS and not the file itself; run `git lfs pull` where it was cloned"
    text = first.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return f"is an HTML page, as an error or a login that was saved; {_FETCH}"
    if text.startswith(b"<"):
        return f"is XML, as an error message of a store that was saved; {_FETCH}"
    for magic, kind, remedy in _MAGIC:
        if first.startswith(magic):
            return f"is {kind}, and no {expected}; {remedy}"
    return None


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()
