"""Pipelines as small as they get, with random weights, built from configurations; no file is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch

diffusers: Any = pytest.importorskip("diffusers", reason="diffusers is not installed")
transformers: Any = pytest.importorskip("transformers", reason="diffusers is not installed")


def tokenizer() -> Any:
    """A tokenizer of six words, in the place of any."""
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"]
    return transformers.CLIPTokenizer(vocab={word: at for at, word in enumerate(words)}, merges=[])


def clip(*, projected: bool = False, seed: int = 0) -> Any:
    """A CLIP text encoder."""
    torch.manual_seed(seed)
    config = transformers.CLIPTextConfig(
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        vocab_size=99,
        max_position_embeddings=16,
        projection_dim=32,
        hidden_act="gelu" if projected else "quick_gelu",
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def t5() -> Any:
    """A T5 encoder."""
    torch.manual_seed(2)
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=99, feed_forward_proj="gated-gelu"
    )
    return transformers.T5EncoderModel(config).eval()


def unet(**more: Any) -> Any:
    """A UNet for text."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    }
    return diffusers.UNet2DConditionModel(**{**settings, **more}).eval()


def vae(channels: int = 4) -> Any:
    """An autoencoder."""
    torch.manual_seed(3)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    ).eval()


def sd() -> Any:
    """Stable Diffusion 1."""
    return diffusers.StableDiffusionPipeline(
        unet=unet(),
        vae=vae(),
        text_encoder=clip(),
        tokenizer=tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> Any:
    """Stable Diffusion XL."""
    return diffusers.StableDiffusionXLPipeline(
        unet=unet(
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
        ),
        vae=vae(),
        text_encoder=clip(),
        text_encoder_2=clip(projected=True, seed=1),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(steps_offset=1),
    )


def sd3() -> Any:
    """Stable Diffusion 3."""
    torch.manual_seed(1)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    ).eval()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae(),
        text_encoder=clip(projected=True),
        text_encoder_2=clip(projected=True, seed=1),
        text_encoder_3=t5(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        tokenizer_3=tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def flux() -> Any:
    """Flux."""
    torch.manual_seed(1)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    return diffusers.FluxPipeline(
        transformer=transformer,
        vae=vae(1),
        text_encoder=clip(),
        text_encoder_2=t5(),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )


def wan() -> Any:
    """Wan 2.2, with a transformer for much noise and one for little."""

    def transformer(seed: int) -> Any:
        torch.manual_seed(seed)
        model = diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=32,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
        return model

    torch.manual_seed(3)
    coder = diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()
    return diffusers.WanPipeline(
        transformer=transformer(1),
        transformer_2=transformer(2),
        vae=coder,
        text_encoder=t5(),
        tokenizer=tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        boundary_ratio=0.9,
    )


PIPELINES: Mapping[str, Callable[[], Any]] = MappingProxyType({"sd": sd, "sdxl": sdxl, "sd3": sd3, "flux": flux})
"""Those of the usual run."""
