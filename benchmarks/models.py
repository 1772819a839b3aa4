"""What the benchmarks merge and compose: random bases of real shape, and LoRA adapters for them, saved by PEFT.

Everything is seeded; nothing is downloaded.  The factors are scaled so that a merge changes each weight by about a
per cent: large enough to survive rounding to bfloat16, as that of a real adapter.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

__all__ = [
    "LLAMA",
    "LLAMA3",
    "NARROW",
    "RANK",
    "SDXL",
    "TARGETS",
    "TINYLLAMA",
    "Stack",
    "adapters_on_disk",
    "base_on_disk",
    "layers_of",
    "llama_on_disk",
    "lora_on",
    "meta_llama",
    "meta_stack",
    "meta_unet",
    "randomise",
    "small",
    "unet_targets",
]

LLAMA = LlamaConfig(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
"""1.1 billion parameters, 2.2 GB in bfloat16."""

LLAMA3 = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
"""Llama-3-8B's shape."""

TINYLLAMA = LlamaConfig(
    vocab_size=32_000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=22,
    num_attention_heads=32,
    num_key_value_heads=4,
    tie_word_embeddings=False,
    dtype="bfloat16",
)
"""TinyLlama's shape: 1.1 billion parameters, 154 linear layers in 22 blocks."""

SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""SDXL's UNet."""

NARROW = SDXL | {"block_out_channels": (32, 64, 128), "attention_head_dim": (2, 2, 2), "cross_attention_dim": 64}
"""The same with a tenth of its width: many small layers."""

RANK = 16
DECAY = 0.85
"""Of adapters to be composed: what each further direction has of the one before, as trained ones fall off."""

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def small(config: LlamaConfig) -> LlamaConfig:
    """The same architecture at a fiftieth of the size, for trying the benchmarks out."""
    return LlamaConfig(
        **(config.to_dict() | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2})
        | {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 8000, "head_dim": 64}
    )


def layers_of(config: LlamaConfig, count: int) -> LlamaConfig:
    """The same shape with fewer blocks."""
    return LlamaConfig(**(config.to_dict() | {"num_hidden_layers": count}))


class Stack(nn.Module):
    """Square linear layers without bias, in bfloat16; holds weights and is never called."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False, dtype=torch.bfloat16) for _ in range(layers))


def meta_stack(layers: int, width: int) -> Stack:
    """A stack without any memory behind its parameters."""
    with torch.device("meta"):
        return Stack(layers, width)


def meta_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """A UNet in bfloat16 without any memory behind its parameters."""
    with torch.device("meta"):
        return UNet2DConditionModel(**config).to(torch.bfloat16)


def unet_targets(unet: nn.Module) -> list[str]:
    """The linear and convolutional layers of a UNet."""
    return sorted(name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))


def meta_llama(config: LlamaConfig) -> LlamaForCausalLM:
    """The model in bfloat16 without any memory behind its parameters."""
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def randomise(state: dict[str, torch.Tensor], *, seed: int) -> dict[str, torch.Tensor]:
    """Fresh tensors of the same names, shapes and dtypes: normal with deviation 0.02, ones where there is one axis."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(tensor.shape, dtype=tensor.dtype)
        if tensor.dim() == 1
        else torch.empty(tensor.shape).normal_(0, 0.02, generator=generator).to(tensor.dtype)
        for name, tensor in state.items()
    }


def lora_on(model: nn.Module, targets: list[str], *, dtype: torch.dtype, seed: int = 7) -> PeftModel:
    """PEFT's LoRA of rank 16 on the targets, with random factors of the given dtype where the weights are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    for module in wrapped.modules():
        if "default" not in getattr(module, "lora_A", {}):
            continue
        for factors in (module.lora_A, module.lora_B):
            shape = factors["default"].weight.shape
            values = torch.empty(shape).normal_(0, 0.007, generator=generator)
            place = module.get_base_layer().weight.device
            factors["default"].weight = nn.Parameter(values.to(place, dtype), requires_grad=False)
    return wrapped


def llama_on_disk(folder: Path, config: LlamaConfig) -> tuple[Path, Path]:
    """A base folder (one safetensors file) and a folder with an fp32 adapter for all its linear layers."""
    base, adapter = folder / "base", folder / "adapter"
    lora_on(base_on_disk(base, config), TARGETS, dtype=torch.float32).save_pretrained(adapter)
    return base, adapter


def base_on_disk(base: Path, config: LlamaConfig) -> LlamaForCausalLM:
    """A base in one safetensors file, in a folder of its own; and the model."""
    disable_progress_bar()
    shutil.rmtree(base, ignore_errors=True)
    model = meta_llama(config)
    model.load_state_dict(randomise(model.state_dict(), seed=1), assign=True)
    model.save_pretrained(base, max_shard_size="100GB")
    return model


def adapters_on_disk(folder: Path, config: LlamaConfig, count: int, base: Path | None = None) -> list[Path]:
    """Adapters for all linear layers with factors in bfloat16, in folders of their own.

    A change is about a tenth of a weight of ``randomise``, and its directions fall off by ``DECAY``.
    """
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    with torch.device("meta"):
        wrapped = get_peft_model(meta_llama(config), lora, autocast_adapter_dtype=False)
    wrapped.to_empty(device="cpu")  # of the base nothing is touched, so that it takes no memory
    if base is not None:
        wrapped.peft_config["default"].base_model_name_or_path = str(base)
    falling = DECAY ** torch.arange(RANK, dtype=torch.float32)
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                first = "lora_A" in name
                size = parameter.shape[1] ** -0.5 if first else 0.04
                values = torch.empty(parameter.shape).normal_(0, size, generator=generator)
                parameter.data = (values * (falling[:, None] if first else falling)).to(torch.bfloat16)
        wrapped.save_pretrained(folder / f"a{number}")
    return [folder / f"a{number}" for number in range(count)]
