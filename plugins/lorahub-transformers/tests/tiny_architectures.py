"""Small real models of architectures that are in no table, one of each sort, and inputs for them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers

__all__ = ["ARCHITECTURES", "built", "inputs"]

_WIDTH: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
_WORDS: dict[str, Any] = {**_WIDTH, "vocab_size": 50, "max_position_embeddings": 20}
_BOTH: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
}
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
_PICTURE: dict[str, Any] = {**_WIDTH, "image_size": 8, "patch_size": 4}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "encoder": ("electra", "ElectraForSequenceClassification", {**_WORDS, "embedding_size": 16}),
    "decoder": (
        "opt",
        "OPTForCausalLM",
        {**_WORDS, "ffn_dim": 24, "word_embed_proj_dim": 16},
    ),
    "encoder and decoder": (
        "bart",
        "BartForConditionalGeneration",
        {**_BOTH, **_SPECIAL, "vocab_size": 50, "max_position_embeddings": 20, "forced_eos_token_id": 2},
    ),
    "pictures and words": (
        "llava",
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **_WORDS, "num_key_value_heads": 1},
            "vision_config": {"model_type": "clip_vision_model", **_PICTURE, "projection_dim": 16},
            "image_token_index": 49,
        },
    ),
    "experts": (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            **_WORDS,
            "num_key_value_heads": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
    ),
    "turned matrices": (
        "openai-gpt",
        "OpenAIGPTLMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "n_positions": 20},
    ),
    "sound": (
        "wav2vec2",
        "Wav2Vec2ForCTC",
        {
            **_WIDTH,
            "vocab_size": 32,
            "conv_dim": (8, 8),
            "conv_stride": (4, 4),
            "conv_kernel": (4, 4),
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
    ),
    "state space": (
        "mamba",
        "MambaForCausalLM",
        {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "state_size": 4, "time_step_rank": 2},
    ),
    "convolutions": (
        "convnext",
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16, "patch_size": 2},
    ),
}
"""What it is -> (``model_type``, class, settings)."""


def built(what: str) -> Any:
    """A model with random weights, the same each time."""
    kind, name, settings = ARCHITECTURES[what]
    torch.manual_seed(0)
    return getattr(transformers, name)(transformers.AutoConfig.for_model(kind, **settings)).float().eval()


@cache
def inputs(what: str) -> dict[str, torch.Tensor]:
    """What a model is called with."""
    generator = torch.Generator().manual_seed(2)
    words = torch.arange(3, 13).view(2, 5)
    match what:
        case "sound":
            return {"input_values": torch.randn(2, 200, generator=generator)}
        case "convolutions":
            return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
        case "pictures and words":
            prompt = torch.cat([torch.full((2, 4), 49), words], 1)  # one token for each patch
            return {"input_ids": prompt, "pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
        case _:
            return {"input_ids": words}
