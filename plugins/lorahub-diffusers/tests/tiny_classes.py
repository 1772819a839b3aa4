"""Every class of models that diffusers has, on the meta device, and small ones with fused projections."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tiny_diffusers import diffusers
from tiny_models import FAMILIES

REQUIRED: dict[str, dict[str, Any]] = {
    "EasyAnimateTransformer3DModel": {"in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8},
    "HunyuanDiT2DModel": {"in_channels": 4, "num_layers": 2, "cross_attention_dim_t5": 8, "sample_size": 8},
    "LatteTransformer3DModel": {"in_channels": 4, "out_channels": 8, "sample_size": 8},
    "LuminaNextDiT2DModel": {"num_layers": 2, "num_kv_heads": 8},
}
"""What some classes cannot be built without."""

PARTLY = frozenset({"LegacyModelMixin"})
"""Classes that are no models themselves."""

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
AUDIO = {
    "io_channels": 4,
    "embed_dim": 64,
    "depth": 1,
    "num_heads": 2,
    "cond_token_dim": 8,
    "global_cond_dim": 8,
    "local_add_cond_dim": 5,
    "timestep_features_dim": 8,
    "num_memory_tokens": 2,
}
OVIS = {
    "num_layers": 1,
    "num_single_layers": 1,
    "in_channels": 4,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 8),
    **HEADS,
}
PRX = {"in_channels": 4, "context_in_dim": 16, "hidden_size": 32, "num_heads": 2, "depth": 1, "axes_dim": [8, 8]}

CONFIGS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "flux2": ("Flux2Transformer2DModel", {**FAMILIES["Flux2"].config, **HEADS}),
    "prx": ("PRXTransformer2DModel", PRX),
    "joy image": (
        "JoyImageEditTransformer3DModel",
        {"hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 1, "rope_dim_list": [4, 6, 6]},
    ),
    "stable audio 3": ("StableAudio3DiTModel", AUDIO),
    "stable audio 3, plain": ("StableAudio3DiTModel", {**AUDIO, "use_differential_attention": False}),
    "mochi": (
        "MochiTransformer3DModel",
        {**HEADS, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16},
    ),
    "sana wm": (
        "SanaWMTransformer3DModel",
        {
            "in_channels": 4,
            "num_layers": 1,
            "hidden_size": 48,
            "num_attention_heads": 2,
            "linear_head_dim": 24,
            "caption_channels": 16,
            "chunk_plucker_post_attn_blocks": 1,
        },
    ),
    "consisid": (
        "ConsisIDTransformer3DModel",
        {
            **HEADS,
            "num_layers": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 5,
            "is_train_face": True,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 16,
            "LFE_vit_dim": 16,
            "LFE_depth": 5,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_output_dim": 16,
        },
    ),
    "flux3": (
        "Flux3Transformer2DModel",
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 16,
            "timestep_channels": 16,
            "axes_dims_rope": (4, 4, 4, 4),
            **HEADS,
        },
    ),
    "minimax music 3": (
        "MiniMaxMusic3Transformer1DModel",
        {
            **HEADS,
            "in_channels": 4,
            "condition_dim": 16,
            "num_layers": 1,
            "ff_inner_dim": 48,
            "rotary_dim": 8,
            "fourier_embedding_dim": 16,
        },
    ),
    "omnigen": (
        "OmniGenTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "num_layers": 1,
            "vocab_size": 32,
            "pad_token_id": 0,
            "pos_embed_max_size": 8,
            "time_step_dim": 16,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
        },
    ),
    "ovis image": ("OvisImageTransformer2DModel", OVIS),
}
"""Name -> class of diffusers and what makes it small."""


def classes() -> Iterator[str]:
    """Every class of models that can be built without arguments, or with those of ``REQUIRED``."""
    for module in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        importlib.import_module(module.name)

    found = _every(diffusers.ModelMixin)
    own = {each.__name__ for each in found if each.__module__.startswith("diffusers.models")}
    yield from sorted(own - PARTLY)


def on_meta(name: str) -> Any:
    kind: Any = getattr(diffusers, name, None) or next(
        each for each in _every(diffusers.ModelMixin) if each.__name__ == name
    )
    with torch.device("meta"):
        return kind(**REQUIRED.get(name, {}))


def _every(one: Any) -> Iterator[Any]:
    for each in one.__subclasses__():
        yield each
        yield from _every(each)
