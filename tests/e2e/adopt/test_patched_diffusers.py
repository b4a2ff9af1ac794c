"""A pipeline of diffusers through the daemon: the same models and images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.client import patch_safetensors

from ..support import DaemonProcess
from .patched import Library, library_daemon, reading_through, same_modules

diffusers: Any = Library("diffusers")


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with library_daemon() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With subfolders, in two variants."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("pipeline")
    unet = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 32), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.VQModel(block_out_channels=(16,), norm_num_groups=8, latent_channels=3)
    pipeline = diffusers.LDMPipeline(vae, unet, diffusers.DDIMScheduler())
    pipeline.save_pretrained(directory)
    with torch.no_grad():
        for module in (unet, vae):
            for parameter in module.parameters():
                parameter.add_(0.01)  # so that a variant taken for the other shows
    pipeline.to(dtype=torch.float16).save_pretrained(directory, variant="fp16")
    assert len(list(directory.rglob("*.safetensors"))) == 4
    return directory


@pytest.mark.parametrize("options", [{}, {"variant": "fp16", "dtype": torch.float16}], ids=["plain", "fp16"])
def test_a_pipeline_is_the_same(daemon: DaemonProcess, pipeline_dir: Path, options: dict[str, Any]) -> None:
    wanted = diffusers.DiffusionPipeline.from_pretrained(pipeline_dir, **options)
    before = daemon.status()["totals"]["delivered_bytes"]
    with patch_safetensors(daemon.client()):
        found = diffusers.DiffusionPipeline.from_pretrained(pipeline_dir, **options)
    parts = [name for name, part in wanted.components.items() if isinstance(part, torch.nn.Module)]
    assert sorted(parts) == ["unet", "vqvae"]
    for name in parts:
        same_modules(found.components[name], wanted.components[name])
    total_bytes = sum(
        tensor.nbytes for name in parts for tensor in wanted.components[name].state_dict().values()
    )
    assert daemon.status()["totals"]["delivered_bytes"] - before >= total_bytes
    if not options:
        images = [
            pipeline(num_inference_steps=2, generator=torch.manual_seed(1), output_type="np").images
            for pipeline in (found, wanted)
        ]
        assert (images[0] == images[1]).all()
    del found


def test_a_model_in_shards_is_the_same(daemon: DaemonProcess, pipeline_dir: Path, tmp_path: Path) -> None:
    wanted = diffusers.UNet2DModel.from_pretrained(pipeline_dir / "unet")
    wanted.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with reading_through(daemon, tmp_path):
        found = diffusers.UNet2DModel.from_pretrained(tmp_path)
    same_modules(found, wanted)
    del found
