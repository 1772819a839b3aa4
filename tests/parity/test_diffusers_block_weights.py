"""A UNet's block weights come to the numbers that diffusers' ``set_adapters`` gives each module."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import UNet2DConditionModel
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from diffusers.utils.peft_utils import set_weights_and_activate_adapters
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from lorahub.bases.layout import Target
from lorahub.composition.weights.resolve import weights_of
from lorahub.recipe import Recipe


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    """A UNet of three levels, the first without attention, as in SDXL; LoRA on attentions and convolutions."""
    model = UNet2DConditionModel(
        block_out_channels=(4, 8, 8),
        layers_per_block=2,
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
    )
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_out.0", "conv1", "proj_in"]), "ink")
    return model


@pytest.mark.parametrize(
    ("diffusers", "toml"),
    [
        (0.7, "0.7"),
        ({"down": 0.5}, "{ down = 0.5 }"),
        ({"mid": 0.3}, "{ mid = 0.3 }"),
        ({"mid": [0.3], "up": 2.0}, "{ mid = [0.3], up = 2.0 }"),
        ({"up": [0.1, 0.2, 0.3]}, "{ up = [0.1, 0.2, 0.3] }"),
        ({"down": {"block_2": [0.0, 1.5]}, "mid": 0.5, "up": {"block_0": 0.25}}, None),
        ({"down": {"block_1": 0.4, "block_2": [0.6]}, "up": {"block_1": [0.7, 0.8, 0.9]}}, None),
    ],
)
def test_every_module_gets_the_weight_that_diffusers_gives_it(
    unet: UNet2DConditionModel, diffusers: Any, toml: str | None
) -> None:
    (expanded,) = _maybe_expand_lora_scales(unet, [diffusers])
    set_weights_and_activate_adapters(unet, ["ink"], [expanded])
    theirs = {name: module.scaling["ink"] for name, module in unet.named_modules() if isinstance(module, LoraLayer)}
    targets = [Target("unet", name, "weight") for name in theirs]
    recipe = (
        Recipe.from_document({"adapters": [{"ref": "a/b", "weight": diffusers}]})
        if toml is None
        else Recipe.from_text(f'[[adapters]]\nref = "a/b"\nweight = {toml}')
    )
    ours = {target.module: value for target, value in weights_of(recipe, [targets])[0].items()}
    assert ours == pytest.approx(theirs)
    assert len(theirs) > 30
    assert any(value != 1 for value in theirs.values())
