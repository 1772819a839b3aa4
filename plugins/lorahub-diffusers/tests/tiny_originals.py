"""Models whose makers name them otherwise than diffusers: small ones of its classes, and its own conversions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["CONVERTERS", "SMALL"]

HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
FLUX_LIKE = {"in_channels": 4, "num_layers": 2, "num_single_layers": 2, **HEADS, "joint_attention_dim": 16}

SMALL: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 8,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            **HEADS,
            "joint_attention_dim": 16,
            "caption_projection_dim": 24,
            "pos_embed_max_size": 16,
        },
    ),
    "chroma": ("ChromaTransformer2DModel", {**FLUX_LIKE, "axes_dims_rope": (4, 4, 4), "approximator_layers": 2}),
    "flux": (
        "FluxTransformer2DModel",
        {**FLUX_LIKE, "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": (4, 4, 4)},
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {**FLUX_LIKE, "timestep_guidance_channels": 16, "axes_dims_rope": (3, 3, 3, 3)},
    ),
    "hunyuan": (
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            **HEADS,
            "num_layers": 2,
            "num_single_layers": 2,
            "num_refiner_layers": 2,
            "text_embed_dim": 16,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
        },
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            **HEADS,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "caption_channels": 16,
        },
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "hidden_size": 2304,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "num_attention_heads": 24,
            "num_kv_heads": 8,
            "cap_feat_dim": 16,
        },
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {**HEADS, "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {**HEADS, "sample_size": 8, "num_layers": 2, "cross_attention_dim": 24, "caption_channels": 16},
    ),
    "sana": (
        "SanaTransformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            **HEADS,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 16,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "sample_size": 8,
            "num_layers": 2,
            **HEADS,
            "joint_attention_dim": 16,
            "caption_projection_dim": 24,
            "pooled_projection_dim": 16,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            **HEADS,
            "text_dim": 16,
            "ffn_dim": 32,
            "num_layers": 2,
            "image_dim": 16,
            "added_kv_proj_dim": 24,
            "freq_dim": 8,
        },
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [8, 4, 4],
            "axes_lens": [16, 16, 16],
        },
    ),
}
"""Family -> a class of diffusers, and arguments that make it small."""


CONVERTERS: Mapping[str, tuple[str, Mapping[str, tuple[int, ...]]]] = {
    "auraflow": ("convert_auraflow_transformer_checkpoint_to_diffusers", {"positional_encoding": (1,)}),
    "ltx": ("convert_ltx_transformer_checkpoint_to_diffusers", {}),
    "lumina2": ("convert_lumina2_to_diffusers", {}),
    "sana": (
        "convert_sana_transformer_to_diffusers",
        {
            "pos_embed": (1,),
            "y_embedder.y_embedding": (1,),
            "final_layer.scale_shift_table": (1,),
            **{f"blocks.{n}.scale_shift_table": (1,) for n in range(2)},
        },
    ),
    "z-image": ("convert_z_image_transformer_checkpoint_to_diffusers", {}),
}
"""Family -> diffusers' conversion of its checkpoints, and what these hold beside modules."""
