"""What early tools pickled, converted for today's PEFT: its merged weights are those the early tools would have made.

References are the early tools' own operations, written out: a convolution with groups and padded rows for MergedLinear
(microsoft/LoRA, PEFT 0.2), gains on outputs for T-Few, added rows for LoRA-ViT, a walk over the live model for
cloneofsimo/lora, and diffusers' own loading of what became of that.  Holds for PEFT 0.21.2 and diffusers 0.42.1.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

import lorahub

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what PEFT's imports say of other packages is not ours
    from peft import PeftModel


def quietly(action: Callable[[], Any]) -> Any:
    """Run a peer's code, whose warnings and prints are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return action()


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(12, 36)
        self.wo = nn.Linear(12, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([block.wo(block.qkv(x)[..., :12]) for block in self.blocks], -1)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(1)
    return Net().eval()


def pickled(folder: Path, tensors: object, config: Mapping[str, Any] | None = None, name: str = "x.bin") -> Path:
    folder.mkdir()
    torch.save(tensors, folder / name)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged_by_peft(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    merged = quietly(lambda: PeftModel.from_pretrained(model, folder).merge_and_unload())
    return dict(merged.state_dict())


def test_merged_linear_becomes_lora_that_peft_merges_alike(net: Net, tmp_path: Path) -> None:
    before = {name: each.clone() for name, each in net.state_dict().items()}
    tensors, expected = {}, {}
    for at in range(2):
        a, b = randn(8, 12, seed=at), randn(24, 4, 1, seed=at)
        stem = f"base_model.model.blocks.{at}.qkv"
        tensors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
        rows = F.conv1d(a[None], b, groups=2)[0]
        change = torch.zeros(36, 12)
        change[:12], change[24:] = rows[:12], rows[12:]
        expected[f"blocks.{at}.qkv.weight"] = before[f"blocks.{at}.qkv.weight"] + 2.0 * change
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "enable_lora": [True, False, True],
        "fan_in_fan_out": False,
        "merge_weights": False,
        "target_modules": ["qkv"],
        "bias": "none",
    }
    lorahub.convert(pickled(tmp_path / "early", tensors, config, "adapter_model.bin"), "peft", tmp_path / "out")
    merged = merged_by_peft(net, tmp_path / "out")
    for name, value in expected.items():
        assert (value - before[name]).norm() > 1e-2 * before[name].norm()
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-5)
    assert torch.equal(merged["blocks.0.wo.weight"], before["blocks.0.wo.weight"])


def test_a_loralib_state_dict_becomes_lora_that_peft_merges_alike(net: Net, tmp_path: Path) -> None:
    before = {name: each.clone() for name, each in net.state_dict().items()}
    a, b, c, d = randn(2, 12), randn(8, 2), randn(4, 12), randn(24, 2)
    tensors = {
        "blocks.0.wo.lora_A": a,
        "blocks.0.wo.lora_B": b,
        "blocks.1.qkv.lora_A": c,
        "blocks.1.qkv.lora_B": d,
    }
    stated = {"lora_alpha": 6, "enable_lora": [True, False, True]}
    folder = pickled(tmp_path / "early", {"model_state_dict": tensors, "epoch": 1}, stated, "x.pt")
    lorahub.convert(folder, "peft", tmp_path / "out", kind="lora")
    merged = merged_by_peft(net, tmp_path / "out")
    torch.testing.assert_close(
        merged["blocks.0.wo.weight"], before["blocks.0.wo.weight"] + 3.0 * b @ a, rtol=1e-5, atol=1e-5
    )
    rows = F.conv1d(c[None], d[..., None], groups=2)[0]
    change = torch.cat([rows[:12], torch.zeros(12, 12), rows[12:]])
    torch.testing.assert_close(
        merged["blocks.1.qkv.weight"], before["blocks.1.qkv.weight"] + 3.0 * change, rtol=1e-5, atol=1e-5
    )


def test_t_few_gains_become_ia3_that_peft_merges_alike(net: Net, tmp_path: Path) -> None:
    before = {name: each.clone() for name, each in net.state_dict().items()}
    gains = {f"blocks.{at}.wo.multi_lora_b": 1 + 0.5 * randn(8, 1, seed=at) for at in range(2)}
    lorahub.convert(pickled(tmp_path / "early", gains, None, "finish.pt"), "peft", tmp_path / "out")
    merged = merged_by_peft(net, tmp_path / "out")
    x = randn(5, 12)
    for at in range(2):
        stem, gain = f"blocks.{at}.wo", gains[f"blocks.{at}.wo.multi_lora_b"]
        expected = F.linear(x, before[f"{stem}.weight"], before[f"{stem}.bias"]) * gain.flatten()
        found = F.linear(x, merged[f"{stem}.weight"], merged[f"{stem}.bias"])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (merged[f"{stem}.weight"] - before[f"{stem}.weight"]).norm() > 1e-2


def test_lora_vit_becomes_lora_that_peft_merges_alike(net: Net, tmp_path: Path) -> None:
    before = {name: each.clone() for name, each in net.state_dict().items()}
    factors = {
        f"w_{side}_{at:03d}": randn(*size, seed=at)
        for at in range(4)
        for side, size in (("a", (2, 12)), ("b", (12, 2)))
    }
    folder = pickled(tmp_path / "early", factors, None, "lora.pth")
    lorahub.convert(folder, "peft", tmp_path / "out", base=net)
    merged, x = merged_by_peft(net, tmp_path / "out"), randn(5, 12)
    for at in range(2):
        name = f"blocks.{at}.qkv.weight"
        expected = F.linear(x, before[name])
        expected[:, :12] += x @ factors[f"w_a_{2 * at:03d}"].T @ factors[f"w_b_{2 * at:03d}"].T
        expected[:, -12:] += x @ factors[f"w_a_{2 * at + 1:03d}"].T @ factors[f"w_b_{2 * at + 1:03d}"].T
        torch.testing.assert_close(F.linear(x, merged[name]), expected, rtol=1e-4, atol=1e-4)


def test_positions_become_names_that_diffusers_loads_alike(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    inputs = (randn(1, 4, 8, 8), torch.tensor([3]), randn(1, 5, 12))
    with torch.no_grad():
        before = unet(*inputs).sample
    listed, merged = [], {}
    for ancestor in unet.modules():
        if type(ancestor).__name__ in {"Attention", "GEGLU"}:
            for layer in ancestor.modules():
                if isinstance(layer, nn.Linear):
                    up = randn(layer.out_features, 2, seed=len(listed)) * 0.2
                    down = randn(2, layer.in_features, seed=len(listed)) * 0.2
                    listed += [nn.Parameter(up), nn.Parameter(down)]
                    merged[layer] = up @ down
    folder = pickled(tmp_path / "early", listed, None, "lora.pt")
    lorahub.convert(folder, "diffusers", tmp_path / "out", base=unet, component="unet")
    converted = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    quietly(lambda: unet.load_lora_adapter(converted, prefix="unet"))
    with torch.no_grad():
        loaded = unet(*inputs).sample
        quietly(unet.unload_lora)
        for layer, change in merged.items():
            layer.weight += change
        expected = unet(*inputs).sample
    assert (expected - before).norm() > 1e-2 * before.norm()
    torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-4)
