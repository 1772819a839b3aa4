"""Adapters as diffusers' own scripts train and save them: PEFT's layers in a pipeline's models, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import peft
import torch

TARGETS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "unet": ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.0.proj"),
        "transformer": ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "ff.net.0.proj", "proj_mlp"),
        "text_encoder": ("q_proj", "k_proj", "v_proj", "out_proj"),
    }
)
"""Component -> ends of its modules' names; of a second one those of the first."""

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2")


def loadable(pipe: Any) -> list[str]:
    """The components that the pipeline's own loader takes adapters for."""
    return [name for name in pipe._lora_loadable_modules if getattr(pipe, name, None) is not None]


def save_lora(pipe: Any, folder: Path, *, alpha: int | None = 6, seed: int = 0, only: tuple[str, ...] = ()) -> Path:
    """Put random LoRA into each of the pipeline's models, save it as diffusers does, and leave the pipe without.

    Args:
        pipe: the pipeline.
        folder: where to.
        alpha: for every module, at rank 4; None writes no metadata, which makes the scale 1.
        seed: of the weights.
        only: components; all that the pipeline's loader takes by default.
    """
    layers: dict[str, Any] = {}
    for component in only or loadable(pipe):
        model = getattr(pipe, component)
        targets = TARGETS[component.removesuffix("_2")]
        config = peft.LoraConfig(r=4, lora_alpha=4 if alpha is None else alpha, target_modules=list(targets))
        torch.manual_seed(seed)
        model.add_adapter(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape) * 0.1)
        layers[f"{component}_lora_layers"] = peft.utils.get_peft_model_state_dict(model)
        if alpha is not None:
            layers[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    pipe.save_lora_weights(folder, **layers)
    pipe.unload_lora_weights()
    return folder


def outputs(pipe: Any) -> dict[str, torch.Tensor]:
    """What each of the models gives for fixed inputs."""
    found = {}
    with torch.no_grad():
        for component in loadable(pipe):
            torch.manual_seed(7)
            found[component] = _run(component, getattr(pipe, component))
    return found


def _run(component: str, model: Any) -> torch.Tensor:
    if component.startswith("text_encoder"):
        result: torch.Tensor = model(torch.arange(2, 18)[None] % 99).last_hidden_state
        return result
    return denoised(type(model).__name__, model)


def denoised(kind: str, model: Any) -> torch.Tensor:
    config, time = model.config, torch.tensor([3, 500])
    if kind == "UNet2DConditionModel":
        more = {}
        if config.addition_embed_type:
            more = {"added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": torch.ones(2, 6)}}
        text = torch.randn(2, 5, config.cross_attention_dim)
        result: torch.Tensor = model(torch.randn(2, 4, 8, 8), time, text, return_dict=False, **more)[0]
    elif kind == "SD3Transformer2DModel":
        text, pooled = torch.randn(2, 5, config.joint_attention_dim), torch.randn(2, config.pooled_projection_dim)
        result = model(torch.randn(2, 4, 8, 8), text, pooled, time, return_dict=False)[0]
    elif kind == "FluxTransformer2DModel":
        text, pooled = torch.randn(2, 5, config.joint_attention_dim), torch.randn(2, config.pooled_projection_dim)
        ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
        result = model(torch.randn(2, 16, 4), text, pooled, time / 1000, **ids, return_dict=False)[0]
    elif kind == "WanTransformer3DModel":
        text = torch.randn(2, 5, config.text_dim)
        result = model(torch.randn(2, 4, 2, 8, 8), time, text, return_dict=False)[0]
    else:
        raise AssertionError(kind)
    return result
