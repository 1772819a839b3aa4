"""Small models of many architectures; whoever imports this is skipped where timm is absent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch

timm: Any = pytest.importorskip("timm", reason="timm is not installed")

if TYPE_CHECKING:
    from torch import nn

__all__ = ["TINY", "Tiny", "build", "images", "timm"]


@dataclass(frozen=True)
class Tiny:
    """A small model: timm's name, arguments, the side of its images, and modules that people adapt."""

    name: str
    args: Mapping[str, Any] = field(default_factory=dict)
    side: int = 32
    modules: tuple[str, ...] = ("qkv", "proj", "fc1")
    head: str = "head"


_PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
_STAGES = {"img_size": 64, "embed_dim": (16, 32, 48, 64), "depths": (1, 1, 1, 1)}
_SWIN = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
_LEVIT = {"embed_dim": (32, 48, 64), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (1, 1, 1)}

TINY: dict[str, Tiny] = {
    "vit": Tiny("vit_tiny_patch16_224", _PLAIN),
    "vit with an attention pool": Tiny("vit_base_patch16_siglip_224", _PLAIN, modules=("qkv", "kv", "q", "proj")),
    "deit": Tiny("deit_tiny_distilled_patch16_224", _PLAIN),
    "swin": Tiny("swin_tiny_patch4_window7_224", _SWIN, head="head.fc"),
    "swin v2": Tiny("swinv2_tiny_window8_256", _SWIN, head="head.fc"),
    "beit": Tiny("beit_base_patch16_224", _PLAIN),
    "eva": Tiny("eva02_tiny_patch14_224", {**_PLAIN, "mlp_ratio": 2}, modules=("qkv", "proj", "fc2")),
    "eva apart": Tiny("eva02_base_patch14_224", {**_PLAIN, "mlp_ratio": 2}, modules=("q_proj", "v_proj", "proj")),
    "convnext": Tiny(
        "convnext_atto",
        {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
        modules=("fc1", "fc2", "downsample.1"),
        head="head.fc",
    ),
    "efficientnet": Tiny("test_efficientnet", modules=("conv_pw", "conv_pwl", "conv_head"), head="classifier"),
    "pvt v2": Tiny(
        "pvt_v2_b0",
        {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)},
        side=64,
        modules=("q", "kv", "proj", "fc1"),
    ),
    "maxvit": Tiny("test_maxvit", {"img_size": 64}, side=64, modules=("qkv", "proj", "fc1"), head="head.fc"),
    "maxvit of tensorflow": Tiny(
        "maxvit_tiny_tf_224",
        {**_STAGES, "embed_dim": (32, 32, 64, 64), "stem_width": 16},
        side=64,
        modules=("qkv", "proj"),
        head="head.fc",
    ),
    "coatnet": Tiny("test_coatnet", {"img_size": 64}, side=64, modules=("qkv", "proj"), head="head.fc"),
    "levit": Tiny("levit_128s", _LEVIT, side=224, modules=("qkv.linear", "kv.linear"), head="head.l"),
}
"""What it is -> a small model of it."""


def build(tiny: Tiny, *, seed: int = 0, **more: Any) -> nn.Module:
    """The model with random weights, biases and scales among them, in evaluation mode."""
    torch.manual_seed(seed)
    model = timm.create_model(tiny.name, pretrained=False, num_classes=more.pop("num_classes", 5), **tiny.args, **more)
    with torch.no_grad():
        for parameter in model.parameters():  # scales that begin at 1e-6 would hide what a block does
            parameter.add_((0.3 if parameter.dim() < 2 else 0.1) * torch.randn_like(parameter))
    return model.eval()


def images(tiny: Tiny, count: int = 2, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 3, tiny.side, tiny.side, generator=torch.Generator().manual_seed(5)).to(dtype)
