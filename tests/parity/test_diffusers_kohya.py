"""diffusers' own converter to kohya's names: what it leaves as PEFT spells it, and files for two models at once.

The reference is what PEFT merges.  The converter writes every alpha as the rank, so training has them equal here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import nn

from lorahub import merge
from lorahub.errors import Degraded

# peft 0.21 takes a bias for a factor that was left in pieces
pytestmark = pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape")


def unet() -> nn.Module:
    torch.manual_seed(0)
    attention = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_out": nn.ModuleList([nn.Linear(8, 6)])})
    return nn.Sequential(OrderedDict(attn1=attention, conv1=nn.Conv2d(4, 6, 3)))


def encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(OrderedDict(layers=nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 8)})])))


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "unet": (unet, ["attn1.to_q", "attn1.to_out.0", "conv1"]),
    "text_encoder": (encoder, ["layers.0.q_proj"]),
}
SORTS: dict[str, dict[str, Any]] = {"plain": {}, "dora": {"use_dora": True}, "bias": {"lora_bias": True}}


def trained(path: Path, sort: str, *parts: str) -> dict[str, dict[str, torch.Tensor]]:
    """Write one file for these models; by model, what PEFT merges."""
    tensors: dict[str, torch.Tensor] = {}
    merged = {}
    generator = torch.Generator().manual_seed(2)
    for part in parts:
        build, names = MODELS[part]
        config = peft.LoraConfig(r=3, lora_alpha=3, target_modules=names, init_lora_weights=False, **SORTS[sort])
        model = peft.inject_adapter_in_model(config, build())
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        state = peft.get_peft_model_state_dict(model)
        tensors |= {f"{part}.{name}": tensor for name, tensor in state.items()}
        for layer in model.modules():
            if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                layer.merge()
        found = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
        merged[part] = {name: tensor for name, tensor in found.items() if "lora_" not in name}
    save_file({name: tensor.contiguous() for name, tensor in convert_state_dict_to_kohya(tensors).items()}, path)
    return merged


def held(model: nn.Module, before: nn.Module, wanted: dict[str, torch.Tensor], changed: int) -> None:
    moved = 0
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-5)
        old = before.state_dict()[name]
        moved += bool((tensor - old).norm() / old.norm() > 1e-2)
    assert moved == changed


@pytest.mark.parametrize("sort", SORTS)
def test_one_models_file_merges_as_peft_merges(tmp_path: Path, sort: str) -> None:
    path = tmp_path / "converted.safetensors"
    wanted = trained(path, sort, "unet")["unet"]
    model = unet()
    merge(model, {"one": path})
    held(model, unet(), wanted, 6 if sort == "bias" else 3)


@pytest.mark.parametrize("sort", SORTS)
def test_of_a_file_for_two_models_each_takes_its_own_part_knowingly(tmp_path: Path, sort: str) -> None:
    path = tmp_path / "converted.safetensors"
    wanted = trained(path, sort, "unet", "text_encoder")
    for part, count in (("unet", 3), ("text_encoder", 1)):
        build = MODELS[part][0]
        with pytest.raises(Degraded) as refused:
            merge(build(), {"one": path})
        (found,) = [each for each in refused.value.findings if each.code == "component-elsewhere"]
        assert all(not name.startswith(f"{part}:") for name in found.where)
        model = build()
        merge(model, {"one": path}, allow=["component-elsewhere"])
        held(model, build(), wanted[part], count * (2 if sort == "bias" else 1))
