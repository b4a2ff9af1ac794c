"""sentence-transformers through the daemon: the same embeddings, also of modules beside the transformer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ..support import DaemonProcess
from .patched import Library, library_daemon, reading_through, same_modules

transformers: Any = Library("transformers")
sentence_transformers: Any = Library("sentence_transformers")
SENTENCES = ["a b c", "c d", "e"]


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with library_daemon() as daemon:
        yield daemon


def test_embeddings_are_the_same(daemon: DaemonProcess, tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    bert = tmp_path / "bert"
    bert.mkdir()
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    transformers.BertModel(config).save_pretrained(bert)
    transformers.BertTokenizer({word: number for number, word in enumerate(words)}).save_pretrained(bert)
    modules: Any = Library("sentence_transformers.models")
    transformer = modules.Transformer(str(bert))
    dense = modules.Dense(32, 16)
    made = sentence_transformers.SentenceTransformer(modules=[transformer, modules.Pooling(32), dense])
    directory = tmp_path / "model"
    made.save(str(directory))
    assert len(list(directory.rglob("*.safetensors"))) == 2

    wanted = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    with reading_through(daemon, directory):
        found = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    same_modules(found, wanted)
    assert (found.encode(SENTENCES) == wanted.encode(SENTENCES)).all()
    assert found.encode(SENTENCES).shape == (3, 16)
    del found
