"""Against diffusers itself: what it saves is read and merged as it fuses it, and what is written here it loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open

import lorahub
from lorahub.adapter import load, open_header, save
from lorahub.plugins import Registry

FILE = "pytorch_lora_weights.safetensors"
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def unet(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
        attention_head_dim=4,
    ).eval()


def adapted(**fields: Any) -> Any:
    model = unet()
    model.add_adapter(LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": [*PROJECTIONS, "conv1"]} | fields))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.normal_(std=0.3)
            elif "lora_magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return model


def saved(model: Any, folder: Path, *, metadata: bool = True) -> Path:
    said = model.peft_config["default"].to_dict() if metadata else None
    diffusers.StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(model), unet_lora_adapter_metadata=said
    )
    return folder


def weights(model: Any) -> dict[str, torch.Tensor]:
    own = {name: each for name, each in model.state_dict().items() if ".lora_" not in name}
    return {name.replace(".base_layer.", "."): each.detach() for name, each in own.items()}


FIELDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"to_k": 4}, "alpha_pattern": {"to_v": 7}},
    "dora": {"use_dora": True, "target_modules": PROJECTIONS},
}


@pytest.mark.parametrize("name", FIELDS)
def test_what_diffusers_saves_is_merged_as_diffusers_fuses_it(tmp_path: Path, name: str) -> None:
    model = adapted(**FIELDS[name])
    folder = saved(model, tmp_path)
    base = unet()
    before = {key: each.clone() for key, each in weights(base).items()}
    lorahub.merge(base, [folder])
    model.fuse_lora()
    expected, found = weights(model), weights(base)
    moved = [key for key in before if not torch.equal(before[key], found[key])]
    assert len(moved) == sum(key.endswith(".base_layer.weight") for key in model.state_dict())
    for key, each in found.items():
        torch.testing.assert_close(each, expected[key], rtol=0, atol=2e-5)


def test_without_metadata_diffusers_and_lorahub_take_the_same_scale(tmp_path: Path) -> None:
    folder = saved(adapted(), tmp_path, metadata=False)
    base, theirs = unet(), unet()
    lorahub.merge(base, [folder])
    theirs.load_lora_adapter(folder, weight_name=FILE, prefix="unet")
    theirs.fuse_lora()
    expected = weights(theirs)
    for key, each in weights(base).items():
        torch.testing.assert_close(each, expected[key], rtol=0, atol=2e-5)


def test_what_is_written_here_diffusers_loads_with_the_same_scales(tmp_path: Path, registry: Registry) -> None:
    model = adapted(rank_pattern={"to_k": 4}, alpha_pattern={"to_v": 7})
    adapter = load(open_header(saved(model, tmp_path / "theirs"), registry), registry)
    ours = save(adapter, tmp_path / "ours", registry=registry, format="diffusers")
    with safe_open(tmp_path / "theirs" / FILE, "pt") as one, safe_open(ours / FILE, "pt") as other:
        assert set(one.keys()) == set(other.keys())
        assert all(torch.equal(one.get_tensor(key), other.get_tensor(key)) for key in one.keys())  # noqa: SIM118
        assert set(json.loads(other.metadata()["lora_adapter_metadata"])) <= set(
            json.loads(one.metadata()["lora_adapter_metadata"])
        )
    again = unet()
    again.load_lora_adapter(ours, weight_name=FILE, prefix="unet")
    again.fuse_lora()
    model.fuse_lora()
    expected = weights(model)
    for key, each in weights(again).items():
        torch.testing.assert_close(each, expected[key], rtol=0, atol=2e-5)
