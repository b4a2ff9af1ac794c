"""The options in `model_loader_extra_config` for vLLM's load format "penstock" (see docs/vllm.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..system.sizes import parse_memory_limit


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """As given by the user, checked."""

    # In the place of the model's own path or URI.
    source: str | list[str] | None = None
    socket_dir: str | None = None
    memory_limit: int | str | None = None
    # "cpu", "cuda", or "auto".
    device: str = "auto"
    # Whether ranks that load the same share one pass over the storage.
    distributed: bool = True
    # Whether a weight that the checkpoint lacks is an error. None is the rule of vLLM's own loader: it is
    # one, unless the model is quantized or does not report the weights that it loaded.
    enable_weights_track: bool | None = None

    @classmethod
    def parse(cls, extra: Any) -> LoaderOptions:
        """Raises ValueError that names the key."""
        if not isinstance(extra, dict):
            raise ValueError(
                f"model_loader_extra_config is a {type(extra).__name__} and no dict: give a JSON object"
            )
        if "concurrency" in extra:
            raise ValueError(
                "model_loader_extra_config: concurrency is the daemon's, not a load's: leave it out here, "
                "and start `penstockd --concurrency N`"
            )
        known = sorted(cls.__dataclass_fields__)
        if unknown := sorted(set(extra) - set(known)):
            raise ValueError(
                f"model_loader_extra_config: load_format penstock does not know {unknown}; use {known}"
            )
        options = cls(**extra)
        sources = options.source if isinstance(options.source, list) else [options.source]
        socket_dir, device = options.socket_dir, options.device
        for name, right, expected in (
            ("source", "source" not in extra or _are_names(sources), "a path, a URI, or a list of these"),
            ("socket_dir", socket_dir is None or _are_names([socket_dir]), "the directory of a daemon"),
            ("device", device in ("auto", "cpu", "cuda"), '"auto", "cpu" or "cuda"'),
            ("distributed", isinstance(options.distributed, bool), "true or false"),
            ("enable_weights_track", options.enable_weights_track in (None, True, False), "true or false"),
        ):
            if not right:
                raise ValueError(
                    f"model_loader_extra_config: {name}={extra[name]!r} makes no sense; give {expected}"
                )
        try:
            parse_memory_limit(options.memory_limit)
        except TypeError as error:
            raise ValueError(f"model_loader_extra_config: {error}") from error
        return options


def _are_names(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) and value for value in values)
