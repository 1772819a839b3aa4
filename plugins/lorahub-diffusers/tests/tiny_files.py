"""Pipelines as one file under their makers' names: the other way round than diffusers converts such files.

Written from OpenCLIP's and CompVis' classes; ``test_single_file.py`` holds them against diffusers' own conversions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorahub.conversion.unet_blocks import counted
from lorahub.conversion.vocabulary import words

METADATA = {"modelspec.title": "tiny", "format": "pt"}

_OPEN = (
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)
_AROUND = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def original_unet(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A UNet's tensors as Stability counts its blocks."""
    names = counted({name.rpartition(".")[0] for name in state})
    return {f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": each for name, each in state.items()}


def open_clip(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text encoder's tensors as OpenCLIP has them, queries, keys and values in one."""
    state = {name.removeprefix("text_model."): each for name, each in state.items()}
    result = {_AROUND[name]: each for name, each in state.items() if name in _AROUND}
    if "text_projection.weight" in state:
        result["text_projection"] = state["text_projection.weight"].T
    for name, each in state.items():
        if not (found := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)):
            continue
        block, inner = f"transformer.resblocks.{found[1]}", found[2]
        if inner.startswith("self_attn.q_proj"):
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            result[f"{block}.attn.in_proj_{inner.rpartition('.')[2]}"] = torch.cat(parts)
        for theirs, own in _OPEN:
            if inner.startswith(f"{theirs}."):
                result[f"{block}.{own}{inner.removeprefix(theirs)}"] = each
    return result


def as_file(pipe: Any, place: Path, *, open_clip_only: bool = False) -> Path:
    """Save a pipeline of Stable Diffusion 1, 2 or XL as its makers did, with what else their files hold."""
    tensors = {f"model.diffusion_model.{name}": each for name, each in original_unet(pipe.unet.state_dict()).items()}
    first = pipe.text_encoder.state_dict()
    if hasattr(pipe, "text_encoder_2"):
        clip, second = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
        tensors |= {f"{clip}{name.removeprefix('text_model.')}": each for name, each in first.items()}
        tensors |= {f"{second}{name}": each for name, each in open_clip(pipe.text_encoder_2.state_dict()).items()}
        tensors[f"{second}logit_scale"] = torch.tensor(4.6)
    elif open_clip_only:
        tensors |= {f"cond_stage_model.model.{name}": each for name, each in open_clip(first).items()}
    else:
        clip = "cond_stage_model.transformer.text_model."
        tensors |= {f"{clip}{name.removeprefix('text_model.')}": each for name, each in first.items()}
        tensors[f"{clip}embeddings.position_ids"] = torch.arange(16)[None]
    tensors |= {f"first_stage_model.{name}": each for name, each in pipe.vae.state_dict().items()}
    tensors["alphas_cumprod"] = torch.linspace(0, 1, 10)
    save_file({name: each.detach().clone().contiguous() for name, each in tensors.items()}, place, metadata=METADATA)
    return place


def weighted(model: Any) -> dict[str, tuple[int, ...]]:
    """Modules with a weight -> its shape."""
    return {
        name: tuple(each.weight.shape)
        for name, each in model.named_modules()
        if getattr(each, "weight", None) is not None
    }


def inverted(model: Any) -> dict[str, torch.Tensor]:
    """A model's tensors under its makers' names by the words alone, fused and swapped as these say."""
    state = dict(model.state_dict())
    result: dict[str, torch.Tensor] = {}
    for word in words(weighted(model).keys()):
        for parameter in ("weight", "bias"):
            names = [f"{part}.{parameter}" for part in word.parts]
            if word.name.find(".processor.") >= 0 or not all(name in state for name in names):
                continue
            tensor = torch.cat([state[name] for name in names])
            if word.halves_swapped:
                tensor = torch.cat(tensor.chunk(2)[::-1])
            if own := word.own(parameter):
                result[f"{word.name}.{own}"] = tensor
    taken = {f"{p}.{n}" for word in words(weighted(model).keys()) for p in word.parts for n in ("weight", "bias")}
    return {**{name: each for name, each in state.items() if name not in taken}, **result}
