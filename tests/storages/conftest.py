"""Small quantised models of every storage, and LoRA adapters for them that PEFT saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

WIDE, MIDDLE, NARROW = 128, 64, 32


class Net(nn.Module):
    """Two linear layers, of which one has no bias, a norm and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDE, MIDDLE)
        self.v = nn.Linear(MIDDLE, NARROW, bias=False)
        self.norm = nn.LayerNorm(NARROW)
        self.register_buffer("steps", torch.arange(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.v(torch.relu(self.q(x))))


def four_bit(model: nn.Module, kind: str, again: bool) -> nn.Module:
    import bitsandbytes as bnb

    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Linear):
            options = {"compress_statistics": again, "quant_type": kind}
            new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None, **options)
            new.weight = bnb.nn.Params4bit(layer.weight.data.clone(), requires_grad=False, module=new, **options)
            if layer.bias is not None:
                new.bias = nn.Parameter(layer.bias.data.clone())
            setattr(model, name, new)
    return model.to("cpu")  # which quantises


def eight_bit(model: nn.Module) -> nn.Module:
    import bitsandbytes as bnb

    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Linear):
            new = bnb.nn.Linear8bitLt(
                layer.in_features, layer.out_features, bias=layer.bias is not None, has_fp16_weights=False
            )
            new.load_state_dict(layer.state_dict())
            setattr(model, name, new)
    return model.to("cpu")


def torchao(model: nn.Module, config: str, **options: Any) -> nn.Module:
    import torchao.quantization as library

    library.quantize_(model, getattr(library, config)(**options))
    return model


def compressed(model: nn.Module, strategy: str, kind: str = "float") -> nn.Module:
    """Scales that reach each block's largest weight, as calibration would find, and compressed."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    shape = {"block_structure": [32, 32]} if strategy == "block" else {}
    shape |= {"group_size": 32} if strategy == "group" else {}
    args = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy=strategy, **shape)
    seen = QuantizationArgs(num_bits=8, type="int", strategy="token", dynamic=True) if kind == "int" else None
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=seen)  # else int8 is packed
    config = QuantizationConfig(
        config_groups={"all": scheme}, format="float-quantized" if kind == "float" else "int-quantized"
    )
    apply_quantization_config(model, config)
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            weight, scale = layer.weight.detach().float(), layer.weight_scale
            rows, cols = {"tensor": (1, 1), "channel": (weight.shape[0], 1), "block": (None, None)}.get(
                strategy, (weight.shape[0], weight.shape[1] // 32)
            )
            rows, cols = rows or weight.shape[0] // 32, cols or weight.shape[1] // 32
            blocks = weight.reshape(rows, weight.shape[0] // rows, cols, weight.shape[1] // cols)
            most = 448 if kind == "float" else 127
            scale.data.copy_((blocks.abs().amax((1, 3)) / most).reshape(scale.shape))
    ModelCompressor(quantization_config=config).compress_model(model)
    return model


STORED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nf4": lambda model: four_bit(model, "nf4", again=False),
    "nf4-nested": lambda model: four_bit(model, "nf4", again=True),
    "fp4": lambda model: four_bit(model, "fp4", again=True),
    "int8": eight_bit,
    "ao-int8": lambda model: torchao(model, "Int8WeightOnlyConfig"),
    "ao-int8-dynamic": lambda model: torchao(model, "Int8DynamicActivationInt8WeightConfig"),
    "ao-float8": lambda model: torchao(model, "Float8WeightOnlyConfig"),
    "ao-intx": lambda model: torchao(model, "IntxWeightOnlyConfig"),
    "ct-channel": lambda model: compressed(model, "channel"),
    "ct-tensor": lambda model: compressed(model, "tensor"),
    "ct-block": lambda model: compressed(model, "block"),
    "ct-int8": lambda model: compressed(model, "channel", "int"),
}
"""Storage, in each of the ways that a test on a CPU can make -> what makes a model so."""

COARSE = {"nf4", "nf4-nested", "fp4"}


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().to(torch.bfloat16).eval()


@pytest.fixture(params=sorted(STORED))
def stored(request: pytest.FixtureRequest) -> str:
    """The name of one storage after another."""
    return str(request.param)


@pytest.fixture
def quantised(net: nn.Module) -> Callable[[str], nn.Module]:
    return lambda name: STORED[name](copy.deepcopy(net)).eval()


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(5, WIDE, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


@pytest.fixture
def lora(net: nn.Module, tmp_path: Path) -> Callable[..., Path]:
    """``lora(size=0.1)``: a folder with a LoRA of both layers, whose change is about that part of the weights."""
    from peft import LoraConfig, get_peft_model

    def make(*, size: float = 0.1, name: str = "adapter", seed: int = 0, **options: Any) -> Path:
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]} | options)
        model = get_peft_model(copy.deepcopy(net), config)
        generator = torch.Generator().manual_seed(seed)
        for module in model.modules():
            if hasattr(module, "lora_A") and "default" in module.lora_A:
                up, down = module.lora_B["default"].weight, module.lora_A["default"].weight
                for factor in (up, down):
                    factor.data.copy_(torch.randn(factor.shape, generator=generator))
                change = module.get_delta_weight("default").float()
                up.data.mul_(size * module.weight.float().norm() / change.norm())
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make
