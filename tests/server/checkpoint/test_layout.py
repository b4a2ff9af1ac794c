"""Which files a directory's names mean."""

from __future__ import annotations

import pytest

from penstock.server.checkpoint.layout import common_names, decide, is_index
from penstock.server.errors import CheckpointInvalidError, CheckpointNotFoundError

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def files(*names: str, variant: str = "") -> tuple[str, ...]:
    """What is loaded of a directory with these names and without an index."""
    layout = decide("/m", sorted(names), variant)
    assert layout.index is None
    return layout.files


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (INDEX, True),
        ("model.safetensors.index.fp16.json", True),
        ("diffusion_pytorch_model.safetensors.index.bf16.json", True),
        ("model.fp16.safetensors.index.json", True),
        ("._model.safetensors.index.json", True),
        ("model.safetensors", False),
        ("model.safetensors.index.json.bak", False),
        ("model_index.json", False),
        ("pytorch_model.bin.index.json", False),
        (".safetensors.index.json", False),
        ("model.safetensors.index.2.json", False),
    ],
)
def test_indexes_are_known_by_their_names(name: str, expected: bool) -> None:
    assert is_index(name) is expected


@pytest.mark.parametrize(
    "hidden",
    [
        "._model.safetensors",
        ".model.safetensors",
        "._model.safetensors.index.json",
        ".model-00001-of-00009.safetensors",
        ".model.safetensors.swp",
        ".cache",
        ".gitattributes",
    ],
)
def test_hidden_files_are_no_shards_and_no_indexes(hidden: str) -> None:
    assert files("model.safetensors", hidden) == ("model.safetensors",)
    with pytest.raises(CheckpointNotFoundError, match=r"holds no \*\.safetensors file"):
        decide("/m", [hidden])


def test_an_index_counts_and_the_files_beside_it_do_not() -> None:
    layout = decide("/m", [INDEX, *SHARDS, "other.safetensors"])
    assert (layout.index, layout.files, layout.rival, layout.warnings) == (INDEX, (), None, ())


@pytest.mark.parametrize(
    ("names", "instead", "rival"),
    [
        ([INDEX, "model.safetensors"], ("model.safetensors",), "model.safetensors"),
        ([INDEX, *SHARDS, "model.safetensors"], ("model.safetensors",), "model.safetensors"),
        ([INDEX, *SHARDS], SHARDS, None),
        ([INDEX, SHARDS[0]], (), None),
        (
            [INDEX, *SHARDS, "model-00001-of-00003.safetensors"],
            SHARDS,
            None,
        ),
        (["x.safetensors.index.json", "x.safetensors", "y.safetensors"], ("x.safetensors",), "x.safetensors"),
        ([INDEX, "other.safetensors"], (), None),
        ([INDEX, "model.fp16.safetensors"], (), None),
        ([INDEX, "._model.safetensors"], (), None),
        ([INDEX, "consolidated.safetensors"], ("consolidated.safetensors",), None),
        (["adapter_model.safetensors.index.json", "consolidated.safetensors"], (), None),
    ],
)
def test_what_can_take_the_place_of_a_stale_index(
    names: list[str], instead: tuple[str, ...], rival: str | None
) -> None:
    layout = decide("/m", names)
    assert layout.index is not None
    assert (layout.instead, layout.rival) == (instead, rival)


def test_two_complete_sets_of_shards_do_not_take_the_place_of_an_index() -> None:
    three = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert decide("/m", [INDEX, *SHARDS, *three]).instead == ()


# ---- variants -----------------------------------------------------------------------------------

FP16_SHARDS = ("model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors")
FP16_OTHERWISE = ("model-00001-of-00002.fp16.safetensors", "model-00002-of-00002.fp16.safetensors")


@pytest.mark.parametrize(
    ("names", "variant", "index", "expected"),
    [
        (("model.safetensors", "model.fp16.safetensors"), "", None, ("model.safetensors",)),
        (("model.safetensors", "model.fp16.safetensors"), "fp16", None, ("model.fp16.safetensors",)),
        ((*SHARDS, *FP16_SHARDS), "", None, SHARDS),
        ((*SHARDS, *FP16_SHARDS), "fp16", None, FP16_SHARDS),
        ((*SHARDS, *FP16_OTHERWISE), "", None, SHARDS),
        ((*SHARDS, *FP16_OTHERWISE), "fp16", None, FP16_OTHERWISE),
        ((INDEX, "model.safetensors.index.fp16.json"), "", INDEX, ()),
        (
            (INDEX, "model.safetensors.index.fp16.json"),
            "fp16",
            "model.safetensors.index.fp16.json",
            (),
        ),
        (
            ("model.fp16.safetensors.index.json", INDEX),
            "fp16",
            "model.fp16.safetensors.index.json",
            (),
        ),
        (("model.safetensors.index.fp16.json", "model.safetensors"), "", None, ("model.safetensors",)),
        (
            ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.non_ema.safetensors"),
            "",
            None,
            ("diffusion_pytorch_model.safetensors",),
        ),
        (("unet.safetensors", "unet.fp16.safetensors"), "", None, ("unet.safetensors",)),
        (("unet.safetensors", "unet.mine.safetensors"), "mine", None, ("unet.mine.safetensors",)),
    ],
)
def test_the_default_variant_is_loaded_unless_another_is_asked_for(
    names: tuple[str, ...], variant: str, index: str | None, expected: tuple[str, ...]
) -> None:
    layout = decide("/m", sorted(names), variant)
    assert (layout.index, layout.files, layout.warnings) == (index, tuple(sorted(expected)), ())


@pytest.mark.parametrize(
    "names",
    [
        ("llama-3.1.safetensors", "llama-3.2.safetensors"),
        ("flux.transformer.safetensors", "flux.vae.safetensors"),
        ("v1.0.safetensors", "v1.safetensors"),
        ("model.00.safetensors", "model.01.safetensors"),
    ],
)
def test_a_dot_in_a_name_makes_no_variant(names: tuple[str, ...]) -> None:
    assert files(*names) == names


def test_the_only_variant_is_loaded_with_a_warning() -> None:
    layout = decide("/m", ["model.bf16.safetensors"])
    assert layout.files == ("model.bf16.safetensors",)
    assert "'bf16' alone" in "".join(layout.warnings)
    assert decide("/m", ["model.bf16.safetensors"], "bf16").warnings == ()


def test_several_variants_and_no_default_one_are_ambiguous() -> None:
    with pytest.raises(CheckpointInvalidError, match=r"choose one with variant=: bf16, fp16"):
        decide("/m", ["model.bf16.safetensors", "model.fp16.safetensors"])


def test_a_variant_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no variant 'fp8'; .*: bf16, fp16"):
        decide("/m", ["model.bf16.safetensors", "model.fp16.safetensors"], "fp8")
    with pytest.raises(CheckpointNotFoundError, match=r"no variant 'fp8'; .*only the default one"):
        decide("/m", ["model.safetensors"], "fp8")


# ---- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistral",
    [
        ("consolidated.safetensors",),
        ("consolidated-00001-of-00002.safetensors", "consolidated-00002-of-00002.safetensors"),
        ("consolidated.safetensors.index.json", "consolidated-00001-of-00001.safetensors"),
    ],
)
def test_of_two_layouts_that_of_transformers_is_loaded(mistral: tuple[str, ...]) -> None:
    assert files(*mistral, *SHARDS) == SHARDS
    assert files(*mistral, "model.safetensors") == ("model.safetensors",)
    assert decide("/m", sorted([*mistral, INDEX, *SHARDS])).index == INDEX


def test_of_several_indexes_that_of_the_model_counts() -> None:
    names = ["adapter_model.safetensors.index.json", INDEX, *SHARDS]
    assert decide("/m", names).index == INDEX
    with pytest.raises(CheckpointInvalidError, match="several index files"):
        decide("/m", ["a.safetensors.index.json", "b.safetensors.index.json"])
    with pytest.raises(CheckpointInvalidError, match="several index files"):
        decide("/m", ["model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"], "fp16")


def test_mistral_s_layout_alone_is_loaded() -> None:
    assert files("consolidated.safetensors") == ("consolidated.safetensors",)


def test_what_vllm_s_sharded_state_saves_is_refused_by_name() -> None:
    ranks = [f"model-rank-{rank}-part-{part}.safetensors" for rank in range(8) for part in range(2)]
    with pytest.raises(CheckpointInvalidError, match=r"vLLM's sharded_state saves: of each of 8 ranks"):
        decide("/m", ranks)


def test_shards_that_are_missing_are_told_of_where_no_index_says_so() -> None:
    layout = decide("/m", ["model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"])
    assert len(layout.files) == 2
    assert "holds 2 of 3 shards of model" in "".join(layout.warnings)
    assert decide("/m", SHARDS).warnings == ()
    assert decide("/m", ["x-0-of-2.safetensors", "x-1-of-2.safetensors"]).warnings == ()


# ---- nothing to load ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["pytorch_model.bin", "config.json"], "'pytorch_model.bin' (PyTorch's pickles) instead"),
        (["a.pt", "b.pt", "c.ckpt"], "'a.pt' (PyTorch's pickles) and 2 more instead"),
        (["model.Q4_K.gguf"], "GGUF"),
        (["tf_model.h5"], "HDF5"),
        (["flax_model.msgpack"], "Flax"),
        (["model.onnx"], "ONNX"),
        (["blobs", "refs", "snapshots"], "name the directory of a revision in `snapshots`"),
        (["model_index.json", "unet", "vae"], "diffusers"),
        (["._model.safetensors"], "which is hidden"),
        (["model.safetensors.zst"], "compressed"),
        (["README.md"], "check the path"),
        ([], "check the path"),
    ],
)
def test_a_directory_without_safetensors_says_what_it_has_instead(names: list[str], said: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"^/m holds no \*\.safetensors file; ") as caught:
        decide("/m", names)
    assert said in caught.value.message


def test_names_in_abundance_are_decided_on_at_once() -> None:
    """Prefixes may hold 100,000 keys of 1024 bytes, chosen by somebody else."""
    hostile = [f"{'-1-of-1' * 140}{n:06d}-{n}-of-{n + 2}.safetensors" for n in range(20_000)]
    hostile += [f"{'a.' * 480}{n:06d}.safetensors" for n in range(20_000)]
    assert len(files(*hostile)) == len(hostile)  # or the test's own timeout ends it


def test_where_a_directory_cannot_be_listed_the_usual_names_are_tried_indexes_first() -> None:
    assert common_names("")[:2] == [INDEX, "model.safetensors"]
    assert common_names("fp16")[:2] == ["model.safetensors.index.fp16.json", "model.fp16.safetensors"]
