"""Models in object storage: vLLM gets their configuration, tokenizer and code from the daemon too.

vLLM itself knows s3://, gs:// and az:// URIs. It pulls these files by runai_model_streamer, and refuses load
formats other than its own. `install` replaces, for models that penstock loads:

    EngineArgs.create_model_config, create_speculative_config     tell that penstock loads what they make
    ModelConfig.maybe_pull_model_tokenizer_for_runai              fetches, and names the URI in model_weights
    VllmConfig.try_verify_and_update_config                       does not see the URI, so nothing is refused
    vllm.engine.arg_utils.is_cloud_storage                        knows the other schemes as well

With a version of vLLM that lacks one of these, such a model is an error that names it. Nothing changes for
other models.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from ..ring.socket_dir import socket_directory
from .run_ai import OBJECT_SCHEMES
from .vllm_files import fetch_apart
from .vllm_options import LoaderOptions
from .vllm_own import member

_BY_VLLM = ("s3://", "gs://", "az://")
_PULL = "maybe_pull_model_tokenizer_for_runai"
_VERIFY = "try_verify_and_update_config"
_socket_dir: ContextVar[str | None] = ContextVar("_socket_dir", default=None)
"""The socket directory of the daemon from which vLLM gets the model that it configures now; None for a model
that penstock does not load."""


def install(replaces_runai: Callable[[], bool], engine: Any = None) -> None:
    """Makes the replacements that this module lists, once. `engine` is vLLM's module `engine.arg_utils`, in
    processes that start an engine."""
    from vllm import config

    _replace(getattr(config, "ModelConfig", None), _PULL, _pulling)
    _replace(getattr(config, "VllmConfig", None), _VERIFY, functools.partial(_verifying, replaces_runai))
    if engine is not None:
        check = functools.partial(_check_seams, config, engine)
        for name in ("create_model_config", "create_speculative_config"):
            _replace(engine.EngineArgs, name, functools.partial(_telling, replaces_runai, check))
        _replace(engine, "is_cloud_storage", _knowing_more)


def _replace(owner: Any, name: str, wrap: Callable[[Any], Any]) -> None:
    original = getattr(owner, name, None)
    if original is not None and not hasattr(original, "by_penstock"):
        wrapper: Any = functools.wraps(original)(wrap(original))
        wrapper.by_penstock = True
        setattr(owner, name, wrapper)


def _check_seams(config: Any, engine: Any) -> None:
    """Raises RuntimeError if this version of vLLM lacks a function that is replaced."""
    member(member(config, "ModelConfig"), _PULL)
    member(member(config, "VllmConfig"), _VERIFY)
    member(engine, "is_cloud_storage")


def _telling(replaces_runai: Callable[[], bool], check: Callable[[], None], create: Any) -> Any:
    def create_config(self: Any, *arguments: Any, **options: Any) -> Any:
        uris = [uri for uri in _models(self) if uri.startswith(OBJECT_SCHEMES)]
        if not uris or not _is_ours(self.load_format, replaces_runai, uris):
            return create(self, *arguments, **options)
        check()
        extra = LoaderOptions.parse(self.model_loader_extra_config or {})
        reset = _socket_dir.set(os.fspath(socket_directory(extra.socket_dir)))
        try:
            return create(self, *arguments, **options)
        finally:
            _socket_dir.reset(reset)

    return create_config


def _models(engine_args: Any) -> list[str]:
    """The options that may be a URI: model, tokenizer and draft model. A draft may be a part of the model's
    weights."""
    given = [
        getattr(engine_args, name, None) for name in ("model", "model_weights", "tokenizer", "spec_model")
    ]
    speculative = getattr(engine_args, "speculative_config", None)
    if isinstance(speculative, dict):
        given.append(speculative.get("model"))
    return [str(name) for name in given if name]


def _is_ours(load_format: str, replaces_runai: Callable[[], bool], uris: list[str]) -> bool:
    if load_format == "penstock":
        return True
    # With "auto" vLLM takes runai_streamer for the schemes that it knows.
    by_runai = load_format == "runai_streamer" or (
        load_format == "auto" and all(uri.startswith(_BY_VLLM) for uri in uris)
    )
    return by_runai and replaces_runai()


def _pulling(pull: Any) -> Any:
    def maybe_pull(self: Any, model: str, tokenizer: str) -> None:
        socket_dir = _socket_dir.get()
        if socket_dir is None or self.model_weights:
            pull(self, model, tokenizer)
            return
        if model.startswith(OBJECT_SCHEMES):
            self.model_weights, self.model = model, _fetch(socket_dir, model, self.revision)
        if tokenizer == model:
            self.tokenizer = self.model
        elif tokenizer.startswith(OBJECT_SCHEMES):
            self.tokenizer = _fetch(socket_dir, tokenizer, self.tokenizer_revision)

    return maybe_pull


def _fetch(socket_dir: str, source: str, revision: str | None) -> str:
    """Raises ValueError for a revision, which would not be one of `source`."""
    if revision:
        raise ValueError(
            f"the revision {revision!r} is given apart from {source}, where it would not count; leave it "
            "out, and for the Hub write hf://org/repo@revision"
        )
    return str(fetch_apart(socket_dir, source))


def _verifying(replaces_runai: Callable[[], bool], verify: Any) -> Any:
    def try_verify(self: Any) -> None:
        model = self.model_config
        uri = getattr(model, "model_weights", "")
        if not uri or not _is_ours(self.load_config.load_format, replaces_runai, [uri]):
            verify(self)
            return
        if self.load_config.load_format == "auto":
            self.load_config.load_format = "runai_streamer"
        model.model_weights = ""
        try:
            verify(self)
        finally:
            model.model_weights = uri

    return try_verify


def _knowing_more(is_cloud_storage: Any) -> Any:
    def is_remote(model_or_path: str) -> bool:
        return model_or_path.startswith(OBJECT_SCHEMES) or bool(is_cloud_storage(model_or_path))

    return is_remote
