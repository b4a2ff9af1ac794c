"""A model of transformers: the files beside the weights are fetched, the weights arrive as tensors.

transformers makes the model from the state dict as it does from files: it cares for dtypes, tied weights,
renamed keys, quantization and devices. It takes a state dict only without a name. So this module adds the
things that transformers finds by the name: the configuration, the class behind an Auto class, and the
generation settings.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import StreamerClient

_OF_CONFIG = ("trust_remote_code", "code_revision", "subfolder")


def from_pretrained(
    client: StreamerClient, cls: Any, source: str | os.PathLike[str], *arguments: Any, **options: Any
) -> Any:
    """See `StreamerClient.from_pretrained`."""
    given = [name for name in ("state_dict", "gguf_file") if options.get(name) is not None]
    if given:
        raise ValueError(
            f"{given[0]} is given, and the weights are to come from {os.fspath(source)[:200]}; leave it out, "
            f"or call {cls.__name__}.from_pretrained"
        )
    directory = client.fetch(source)
    subfolder = options.get("subfolder") or ""
    weights = os.path.join(os.fspath(source), subfolder) if subfolder else source
    own_config = options.pop("config", None)
    config = os.fspath(directory) if own_config is None else own_config
    made = cls
    if hasattr(cls, "from_config"):  # an Auto class
        made = _class_for(cls, config, options)
        options.pop("code_revision", None)
    state = client.load_state_dict(weights, variant=options.pop("variant", None))
    made_of = made.from_pretrained(None, *arguments, config=config, state_dict=state, **options)
    model = made_of[0] if options.get("output_loading_info") else made_of
    model.name_or_path = model.config.name_or_path = os.fspath(directory)
    if options.get("generation_config") is None and model.can_generate():
        model.generation_config = _generation_config(directory / subfolder)
    return made_of


def _class_for(cls: Any, config: Any, options: dict[str, Any]) -> Any:
    """The model's class that an Auto class chooses for a configuration."""
    import torch
    from transformers import AutoConfig

    chosen = {name: options[name] for name in _OF_CONFIG if name in options}
    if not hasattr(config, "to_dict"):
        config = AutoConfig.from_pretrained(config, **chosen)
    chosen.pop("subfolder", None)
    with torch.device("meta"):
        return type(cls.from_config(config, **chosen))


def _generation_config(directory: Path) -> Any:
    """The generation settings, as transformers finds them: in a file of their own, else in the
    configuration."""
    from transformers import GenerationConfig

    if (directory / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(directory)
    return GenerationConfig.from_pretrained(
        directory, config_file_name="config.json", _from_model_config=True
    )
