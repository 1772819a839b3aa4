"""Adapters in another vocabulary than a base that no plugin knows: names of diffusers and of makers find each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorahub
from lorahub.conversion.unet_blocks import counted, grouped
from lorahub.conversion.vocabulary import speaks
from lorahub.conversion.word import Word
from lorahub.errors import BaseMismatch

SIZE = 6
UNET = {
    "down_blocks.0.resnets.0.conv1": (SIZE, SIZE, 3, 3),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (SIZE, SIZE),
    "down_blocks.0.downsamplers.0.conv": (SIZE, SIZE, 3, 3),
    "down_blocks.1.resnets.0.conv1": (SIZE, SIZE, 3, 3),
    "mid_block.attentions.0.proj_in": (SIZE, SIZE),
    "up_blocks.0.resnets.1.conv2": (SIZE, SIZE, 3, 3),
    "up_blocks.0.attentions.1.proj_out": (SIZE, SIZE),
    "up_blocks.0.upsamplers.0.conv": (SIZE, SIZE, 3, 3),
    "time_embedding.linear_1": (SIZE, SIZE),
}
"""A UNet of one layer a block, under diffusers' names."""

ORIGINAL = {
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0.conv1": "input_blocks.3.0.in_layers.2",
    "mid_block.attentions.0.proj_in": "middle_block.1.proj_in",
    "up_blocks.0.resnets.1.conv2": "output_blocks.1.0.out_layers.3",
    "up_blocks.0.attentions.1.proj_out": "output_blocks.1.1.proj_out",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "time_embedding.linear_1": "time_embed.0",
}


def weights(names: Mapping[str, tuple[int, ...]], place: Path) -> dict[str, torch.Tensor]:
    tensors = {
        f"{name}.weight": torch.randn(*shape, generator=torch.Generator().manual_seed(at))
        for at, (name, shape) in enumerate(names.items())
    }
    save_file(tensors, place)
    return tensors


def factors(stem: str, out: int, into: int, place: Path) -> torch.Tensor:
    """A file in kohya's ends, of rank 2 without alpha; gives the change."""
    generator = torch.Generator().manual_seed(3)
    down, up = (torch.randn(*size, generator=generator, dtype=torch.float64).float() for size in ((2, into), (out, 2)))
    save_file({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}, place)
    return up.double() @ down.double()


def moved(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    """Name -> by how much it changed, of what did."""
    lorahub.merge(base, {"one": str(adapter)}, out=out)
    before, after = load_file(base), load_file(out)
    assert before.keys() == after.keys()
    return {
        name: after[name].double() - each.double()
        for name, each in before.items()
        if not torch.equal(after[name], each)
    }


def test_the_unet_is_counted_and_grouped_again() -> None:
    assert counted(UNET) == ORIGINAL
    assert grouped(ORIGINAL.values()) == {name: module for module, name in ORIGINAL.items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("spelled", ["diffusers", "original"])
def test_either_name_of_a_module_finds_it_in_a_checkpoint_of_the_makers(
    spelled: str, prefix: str, tmp_path: Path
) -> None:
    weights({f"{prefix}{ORIGINAL[name]}": shape for name, shape in UNET.items()}, tmp_path / "base.safetensors")
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    name = module if spelled == "diffusers" else ORIGINAL[module]
    change = factors(f"lora_unet_{name.replace('.', '_')}", SIZE, SIZE, tmp_path / "x.safetensors")
    found = moved(tmp_path / "base.safetensors", tmp_path / "x.safetensors", tmp_path / "out.safetensors")
    assert found.keys() == {f"{prefix}{ORIGINAL[module]}.weight"}
    assert (next(iter(found.values())) - change).abs().max() <= 1e-5
    assert change.norm() > 1


def test_queries_keys_and_values_are_bands_of_what_the_makers_fuse(tmp_path: Path) -> None:
    fused = {"double_blocks.0.img_attn.qkv": (3 * SIZE, SIZE), "single_blocks.0.linear1": (7 * SIZE, SIZE)}
    weights(fused, tmp_path / "base.safetensors")
    bands = {
        "transformer_blocks.0.attn.to_k": ("double_blocks.0.img_attn.qkv", SIZE, 2 * SIZE),
        "single_transformer_blocks.0.attn.to_v": ("single_blocks.0.linear1", 2 * SIZE, 3 * SIZE),
        "single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", 3 * SIZE, 7 * SIZE),
    }
    for at, (module, (name, start, stop)) in enumerate(bands.items()):
        change = factors(f"transformer.{module}", stop - start, SIZE, tmp_path / f"{at}.safetensors")
        found = moved(tmp_path / "base.safetensors", tmp_path / f"{at}.safetensors", tmp_path / f"{at}out.safetensors")
        assert found.keys() == {f"{name}.weight"}
        (difference,) = found.values()
        assert (difference[start:stop] - change).abs().max() <= 1e-5
        difference[start:stop] = 0
        assert not difference.any()


def test_projections_of_clip_are_bands_of_openclips(tmp_path: Path) -> None:
    names = {f"encoder.layers.{at}.self_attn.in_proj": (3 * SIZE, SIZE) for at in range(2)}
    tensors = {f"{name}_weight": torch.randn(*shape) for name, shape in names.items()}
    save_file(tensors, tmp_path / "base.safetensors")
    stem = "lora_te_text_model_encoder_layers_1_self_attn_v_proj"
    change = factors(stem, SIZE, SIZE, tmp_path / "x.safetensors")
    found = moved(tmp_path / "base.safetensors", tmp_path / "x.safetensors", tmp_path / "out.safetensors")
    assert found.keys() == {"encoder.layers.1.self_attn.in_proj_weight"}
    (difference,) = found.values()
    assert (difference[2 * SIZE :] - change).abs().max() <= 1e-5
    assert not difference[: 2 * SIZE].any()


def test_a_model_that_nobody_has_words_for_is_left_to_its_own_names(tmp_path: Path) -> None:
    assert not speaks({"model.layers.0.self_attn.q_proj", "lm_head"})
    weights({"model.layers.0.self_attn.q_proj": (SIZE, SIZE)}, tmp_path / "base.safetensors")
    factors("lora_unet_double_blocks_0_img_attn_qkv", 3 * SIZE, SIZE, tmp_path / "x.safetensors")
    with pytest.raises(BaseMismatch) as stop:
        lorahub.merge(tmp_path / "base.safetensors", {"x": str(tmp_path / "x.safetensors")}, out=tmp_path / "out")
    assert "names-translated" not in {each.code for each in stop.value.findings}


@pytest.mark.parametrize(
    ("template", "other", "own"),
    [("{}", "bias", "bias"), ("in_proj_{}", "weight", "in_proj_weight"), ("scale", "weight", "scale")],
)
def test_a_word_spells_parameters_both_ways(template: str, other: str, own: str) -> None:
    word = Word(name="a", parts=("b",), parameter=template)
    assert word.own(other) == own
    assert word.other(own) == other


def test_a_parameter_that_a_word_does_not_have_is_none() -> None:
    word = Word(name="a", parts=("b",), parameter="scale")
    assert (word.own("bias"), word.other("shift")) == ("", "")
    assert Word(name="a", parts=("b",), parameter="in_proj_{}").other("weight") == ""
