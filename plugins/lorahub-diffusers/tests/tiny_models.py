"""Transformers of many families as small as they get, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from tiny_diffusers import diffusers

__all__ = ["FAMILIES", "Family"]

TIME = torch.tensor([3, 500])


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A class, its arguments, and what its models are called with.

    Attributes:
        kind: name in diffusers.
        config: arguments.
        inputs: gives those of a call.
        targets: ends of modules that an adapter changes.
    """

    kind: str
    config: Mapping[str, Any]
    inputs: Callable[[], Mapping[str, Any]]
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")

    def build(self) -> Any:
        """A model with random weights; none is left at zero or one."""
        torch.manual_seed(0)
        model = getattr(diffusers, self.kind)(**self.config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
        return model

    def run(self, model: Any) -> torch.Tensor:
        """What a model gives for fixed inputs."""
        torch.manual_seed(7)
        with torch.no_grad():
            found = model(**self.inputs(), return_dict=False)[0]
        return torch.stack(list(found)) if isinstance(found, list | tuple) else found


def video(channels: int = 4, frames: int = 2, size: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, frames, size, size)


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "Wan": Family(
            kind="WanTransformer3DModel",
            config={
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "in_channels": 4,
                "out_channels": 4,
                "text_dim": 16,
                "freq_dim": 32,
                "ffn_dim": 32,
                "num_layers": 2,
                "rope_max_seq_len": 32,
            },
            inputs=lambda: {
                "hidden_states": video(),
                "timestep": TIME,
                "encoder_hidden_states": torch.randn(2, 5, 16),
            },
        ),
        "LTX": Family(
            kind="LTXVideoTransformer3DModel",
            config={
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "cross_attention_dim": 16,
                "num_layers": 2,
                "caption_channels": 16,
            },
            inputs=lambda: {
                "hidden_states": torch.randn(2, 32, 4),
                "encoder_hidden_states": torch.randn(2, 5, 16),
                "timestep": TIME,
                "encoder_attention_mask": torch.ones(2, 5),
                "num_frames": 2,
                "height": 4,
                "width": 4,
            },
        ),
        "HunyuanVideo": Family(
            kind="HunyuanVideoTransformer3DModel",
            config={
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 10,
                "num_layers": 1,
                "num_single_layers": 1,
                "num_refiner_layers": 1,
                "patch_size": 1,
                "text_embed_dim": 16,
                "pooled_projection_dim": 8,
                "rope_axes_dim": (2, 4, 4),
            },
            inputs=lambda: {
                "hidden_states": video(),
                "timestep": TIME,
                "encoder_hidden_states": torch.randn(2, 5, 16),
                "encoder_attention_mask": torch.ones(2, 5),
                "pooled_projections": torch.randn(2, 8),
                "guidance": torch.tensor([1.0, 2.0]),
            },
            targets=("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "proj_mlp"),
        ),
        "Sana": Family(
            kind="SanaTransformer2DModel",
            config={
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 2,
                "num_attention_heads": 2,
                "attention_head_dim": 4,
                "num_cross_attention_heads": 2,
                "cross_attention_head_dim": 4,
                "cross_attention_dim": 8,
                "caption_channels": 8,
                "sample_size": 8,
            },
            inputs=lambda: {
                "hidden_states": torch.randn(2, 4, 8, 8),
                "encoder_hidden_states": torch.randn(2, 5, 8),
                "timestep": TIME,
            },
            targets=("to_q", "to_k", "to_v", "conv_inverted", "conv_point"),
        ),
        "Z-Image": Family(
            kind="ZImageTransformer2DModel",
            config={
                "in_channels": 4,
                "dim": 32,
                "n_layers": 1,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": 16,
                "axes_dims": [8, 4, 4],
                "axes_lens": [256, 32, 32],
            },
            inputs=lambda: {
                "x": [torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8)],
                "t": torch.tensor([0.1, 0.7]),
                "cap_feats": [torch.randn(5, 16), torch.randn(5, 16)],
            },
            targets=("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3"),
        ),
        "AuraFlow": Family(
            kind="AuraFlowTransformer2DModel",
            config={
                "sample_size": 8,
                "num_mmdit_layers": 1,
                "num_single_dit_layers": 1,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": 16,
                "caption_projection_dim": 16,
                "pos_embed_max_size": 64,
            },
            inputs=lambda: {
                "hidden_states": torch.randn(2, 4, 8, 8),
                "encoder_hidden_states": torch.randn(2, 5, 16),
                "timestep": TIME / 1000,
            },
            targets=("to_q", "to_v", "to_out.0", "to_add_out", "linear_1", "out_projection"),
        ),
        "Lumina2": Family(
            kind="Lumina2Transformer2DModel",
            config={
                "sample_size": 8,
                "in_channels": 4,
                "hidden_size": 24,
                "num_layers": 1,
                "num_refiner_layers": 1,
                "num_attention_heads": 3,
                "num_kv_heads": 1,
                "multiple_of": 2,
                "cap_feat_dim": 16,
                "axes_dim_rope": (4, 2, 2),
                "axes_lens": (64, 32, 32),
            },
            inputs=lambda: {
                "hidden_states": torch.randn(2, 4, 8, 8),
                "timestep": TIME / 1000,
                "encoder_hidden_states": torch.randn(2, 5, 16),
                "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
            },
            targets=("to_q", "to_k", "to_v", "to_out.0", "linear_1", "linear_3"),
        ),
        "CogVideoX": Family(
            kind="CogVideoXTransformer3DModel",
            config={
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "in_channels": 4,
                "out_channels": 4,
                "time_embed_dim": 4,
                "text_embed_dim": 8,
                "num_layers": 1,
                "sample_width": 8,
                "sample_height": 8,
                "sample_frames": 8,
                "max_text_seq_length": 8,
            },
            inputs=lambda: {
                "hidden_states": torch.randn(2, 2, 4, 8, 8),
                "encoder_hidden_states": torch.randn(2, 8, 8),
                "timestep": TIME,
            },
        ),
        "Chroma": Family(
            kind="ChromaTransformer2DModel",
            config={
                "in_channels": 4,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 32,
                "axes_dims_rope": (4, 4, 8),
                "approximator_num_channels": 8,
                "approximator_hidden_dim": 16,
                "approximator_layers": 1,
            },
            inputs=lambda: {
                "hidden_states": torch.randn(2, 16, 4),
                "encoder_hidden_states": torch.randn(2, 5, 32),
                "timestep": TIME / 1000,
                "img_ids": torch.zeros(16, 3),
                "txt_ids": torch.zeros(5, 3),
            },
            targets=("to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out"),
        ),
        "Qwen-Image": Family(
            kind="QwenImageTransformer2DModel",
            config={
                "in_channels": 16,
                "out_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 3,
                "joint_attention_dim": 16,
                "axes_dims_rope": (8, 4, 4),
            },
            inputs=lambda: {
                "hidden_states": torch.randn(2, 16, 16),
                "encoder_hidden_states": torch.randn(2, 5, 16),
                "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.bool),
                "timestep": TIME / 1000,
                "img_shapes": [(1, 4, 4)] * 2,
            },
            targets=("to_q", "add_q_proj", "to_add_out", "img_mlp.net.2", "txt_mod.1"),
        ),
        "Flux2": Family(
            kind="Flux2Transformer2DModel",
            config={
                "in_channels": 4,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 32,
                "timestep_guidance_channels": 32,
                "axes_dims_rope": (4, 4, 4, 4),
            },
            inputs=lambda: {
                "hidden_states": torch.randn(2, 16, 4),
                "encoder_hidden_states": torch.randn(2, 5, 32),
                "timestep": TIME / 1000,
                "img_ids": torch.zeros(16, 4),
                "txt_ids": torch.zeros(5, 4),
                "guidance": torch.tensor([1.0, 2.0]),
            },
            targets=("to_q", "add_k_proj", "to_qkv_mlp_proj", "linear_in", "linear_out"),
        ),
    }
)
"""What people call a family -> a small model of it."""
