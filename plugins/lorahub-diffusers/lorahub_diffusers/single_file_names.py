"""How single-file checkpoints call parameters, and what the same are in a pipeline of diffusers: prefixes and tables.

A single file holds the diffusion model, the autoencoder and text encoders under their makers' names.  A parameter that
a pipeline has too, as it is, gets the pipeline's name; one that is split or joined there keeps its maker's, behind the
component, and ``lorahub.conversion.words`` says which modules of the pipeline it is.  Names alone; told from headers.

Facts: CompVis' and Stability's checkpoints, OpenCLIP, those that ComfyUI saves, and diffusers 0.42.1.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from lorahub.conversion.unet_blocks import grouped, is_counted

__all__ = ["ALIKE", "COMPONENTS", "MODEL", "Named", "named", "told_apart"]

MODEL = "model.diffusion_model."
"""What stands before the diffusion model's names in a file with more than that."""

_CLIP, _OPEN_CLIP, _PLAIN = "clip", "open-clip", ""

COMPONENTS: tuple[tuple[str, str, str], ...] = (
    ("cond_stage_model.transformer.", "text_encoder", _CLIP),
    ("cond_stage_model.model.", "text_encoder", _OPEN_CLIP),
    ("conditioner.embedders.0.transformer.", "text_encoder", _CLIP),
    ("conditioner.embedders.0.model.", "text_encoder_2", _OPEN_CLIP),
    ("conditioner.embedders.1.model.", "text_encoder_2", _OPEN_CLIP),
    ("text_encoders.clip_l.transformer.", "text_encoder", _CLIP),
    ("text_encoders.clip_g.transformer.", "text_encoder_2", _CLIP),
    ("text_encoders.t5xxl.transformer.", "text_encoder_3", _PLAIN),
    ("first_stage_model.", "vae", _PLAIN),
    ("vae.", "vae", _PLAIN),
)
"""How a stored name begins -> the component of a pipeline, and whose names follow."""

_T5 = "text_encoders.t5xxl."
_SECOND = "text_encoders.clip_g."

_BUFFERS = ("position_ids", "logit_scale", "text_model.embeddings.position_ids")
"""Ends of what no pipeline has as a parameter."""

_WITH_PROJECTION = frozenset({"text_encoder_2"})
"""Components whose class keeps its text encoder below ``text_model.``, beside a projection."""

_OF_OPEN_CLIP: Mapping[str, str] = MappingProxyType(
    {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
)
_IN_OPEN_CLIP: Mapping[str, str] = MappingProxyType(
    {
        "attn.in_proj_weight": "self_attn.in_proj_weight",
        "attn.in_proj_bias": "self_attn.in_proj_bias",
        "attn.out_proj": "self_attn.out_proj",
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
)
"""OpenCLIP's name -> that of transformers, outside of layers and within one."""

_LAYER = re.compile(r"transformer\.resblocks\.(\d{1,3})\.(.+)")
_PROJECTION = "text_projection"

_MODELS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "stable-diffusion": ("input_blocks.0.0.weight", "middle_block.1.norm.weight", "out.2.weight"),
        "stable-diffusion-3": ("joint_blocks.0.context_block.attn.qkv.weight",),
        "hunyuan-video": (
            "double_blocks.0.img_attn_qkv.weight",
            "txt_in.individual_token_refiner.blocks.0.self_attn_qkv.weight",
        ),
        "flux-2": ("double_blocks.0.img_attn.qkv.weight", "double_stream_modulation_img.lin.weight"),
        "flux": ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"),
        "wan": ("blocks.0.self_attn.q.weight", "head.head.weight"),
        "z-image": ("layers.0.attention.qkv.weight", "layers.0.adaLN_modulation.0.weight"),
        "lumina-2": ("layers.0.attention.qkv.weight", "layers.0.adaLN_modulation.1.weight", "cap_embedder.1.weight"),
        "ltx-video": ("patchify_proj.weight", "adaln_single.linear.weight", "transformer_blocks.0.attn1.q_norm.weight"),
        "sana": ("blocks.0.mlp.inverted_conv.conv.weight", "blocks.0.cross_attn.kv_linear.weight"),
        "auraflow": ("double_layers.0.attn.w2q.weight", "init_x_linear.weight"),
        "mochi": ("blocks.0.attn.qkv_x.weight", "t5_y_embedder.to_kv.weight"),
        "qwen-image": (
            "transformer_blocks.0.attn.add_q_proj.weight",
            "transformer_blocks.0.img_mod.1.weight",
            "txt_norm.weight",
        ),
        "hidream": ("double_stream_blocks.0.block.adaLN_modulation.1.weight", "caption_projection.0.linear.weight"),
    }
)
"""Model -> parameters that its diffusion model has, without a prefix; the first that has all."""

ALIKE = frozenset({"hidream", "qwen-image"})
"""Models that diffusers has under their makers' names, so that names do not tell a file of the one from the other's."""

_T5_FIRST = frozenset({"ltx-video", "mochi"})
"""Models whose pipeline has a T5 for its only text encoder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A stored parameter under its canonical name.

    Attributes:
        component: of the pipeline.
        name: within the component.
        transposed: a linear weight that is stored [in, out].
    """

    component: str
    name: str
    transposed: bool = False


def told_apart(names: Collection[str]) -> tuple[str, str]:
    """(which model a file holds, what stands before the diffusion model's names); ("", "") for no such file."""
    known = set(names)
    for prefix in (MODEL, "diffusion_model.", ""):
        for model, telling in _MODELS.items():
            if known.issuperset(f"{prefix}{each}" for each in telling):
                return model, prefix
    return "", ""


def named(names: Collection[str], model: str, prefix: str) -> dict[str, Named]:
    """Stored name -> what it is; what no pipeline has as a parameter is left out.

    Args:
        names: all of the file.
        model: see ``told_apart``.
        prefix: before the diffusion model's names.
    """
    own = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    modules = {name.rpartition(".")[0] for name in own}
    groups = grouped(modules) if is_counted(modules) else {}
    diffusion = "unet" if model == "stable-diffusion" else "transformer"
    lone_t5 = any(name.startswith(_T5) for name in names) and not any(name.startswith(_SECOND) for name in names)
    result: dict[str, Named] = {}
    for name in names:
        found = _of_component(name)
        if found is None and name.startswith(prefix):
            module, _, parameter = name.removeprefix(prefix).rpartition(".")
            dotted = f"{groups.get(module, module)}.{parameter}" if module else parameter
            found = Named(component=diffusion, name=dotted)
        if found is None:
            continue
        if found.component == "text_encoder_3" and lone_t5:  # Flux has CLIP and T5
            found = Named(component="text_encoder" if model in _T5_FIRST else "text_encoder_2", name=found.name)
        result[name] = found
    return result


def _of_component(name: str) -> Named | None:
    """A parameter of a text encoder or the autoencoder; None for others and for buffers."""
    for beginning, component, whose in COMPONENTS:
        if not name.startswith(beginning):
            continue
        rest = name.removeprefix(beginning)
        if rest in _BUFFERS:
            return None
        if whose == _OPEN_CLIP:
            return _open_clip(component, rest)
        if whose == _CLIP and component not in _WITH_PROJECTION:
            rest = rest.removeprefix("text_model.")
        return Named(component=component, name=rest)
    return None


def _open_clip(component: str, rest: str) -> Named:
    within = "text_model." if component in _WITH_PROJECTION else ""
    if rest == _PROJECTION:  # a parameter that is multiplied from the right
        return Named(component=component, name=f"{_PROJECTION}.weight", transposed=True)
    if rest in _OF_OPEN_CLIP:
        return Named(component=component, name=within + _OF_OPEN_CLIP[rest])
    if layer := _LAYER.fullmatch(rest):
        at, inner = layer.groups()
        for theirs, ours in _IN_OPEN_CLIP.items():
            if inner == theirs or inner.startswith(f"{theirs}."):
                return Named(
                    component=component, name=f"{within}encoder.layers.{at}.{ours}{inner.removeprefix(theirs)}"
                )
    return Named(component=component, name=rest)
