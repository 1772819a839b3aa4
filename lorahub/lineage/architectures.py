"""Architectures by names and widths of their modules.  Tables; numbers are those of the published configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["LAYERED", "ROWS", "Row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One architecture by its modules; the first row that fits decides.

    Attributes:
        name: of the architecture.
        having: each occurs in some path.
        lacking: none occurs in any.
        ends: a path ends in one of these, ...
        widths: ... and has one of these numbers of inputs; empty: any.
        beyond: some number in a path that follows ``having[0]`` is at least this.
        dotted: the module's own name, where it has dots, ends in one of these; empty: any.
    """

    name: str
    having: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    widths: tuple[int, ...] = ()
    beyond: int = 0
    dotted: tuple[str, ...] = ()


_TO = ("to_q", "to_k", "to_v")
_CROSS = ("attn2_to_k", "attn2_to_v")
_JOINT = ("attn_to_q", "attn_to_k", "attn_to_v", "attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj")
_WAN = ("self_attn_q", "self_attn_k", "self_attn_v", "cross_attn_q", "attn1_to_q", "attn1_to_k", "attn2_to_q")
_FLAT_ATTENTION = (".img_attn_qkv", ".img_attn_proj", ".txt_attn_qkv", ".txt_attn_proj")  # Flux: .img_attn.qkv
_UNET = ("down_blocks", "input_blocks", "mid_block", "middle_block", "up_blocks", "output_blocks")

ROWS: tuple[Row, ...] = (
    *(Row(name="SDXL", having=(part,), ends=_CROSS, widths=(2048,)) for part in _UNET),
    *(Row(name="SD2", having=(part,), ends=_CROSS, widths=(1024,)) for part in _UNET),
    *(Row(name="SD1", having=(part,), ends=_CROSS, widths=(768,)) for part in _UNET),
    *(Row(name="SDXL", having=("transformer_blocks_", part), beyond=1) for part in _UNET),
    *(Row(name="UNet", having=(part,)) for part in _UNET),
    Row(name="Flux.2", having=("to_qkv_mlp_proj",)),
    Row(name="Flux.2", having=("single_transformer_blocks",), ends=(*_JOINT, "proj_out"), widths=(6144,)),
    Row(name="Flux.2", having=("double_blocks",), ends=("attn_qkv",), widths=(6144,)),
    Row(name="HunyuanVideo", having=("double_blocks_",), widths=(3072,), dotted=_FLAT_ATTENTION),
    Row(name="HunyuanVideo", having=("double_blocks_",), ends=("_fc1", "_mod_linear"), widths=(3072,)),
    Row(name="HunyuanVideo", having=("double_blocks_",), beyond=19, widths=(3072,)),
    Row(name="HunyuanVideo", having=("single_blocks_",), beyond=38, widths=(3072,)),
    Row(name="HunyuanVideo", having=("refiner",), ends=("attn_qkv",), widths=(3072,)),
    Row(name="Flux", having=("double_blocks",), widths=(3072,)),
    Row(name="Flux", having=("single_blocks",), widths=(3072,)),
    Row(name="Flux", having=("single_transformer_blocks",), widths=(3072,)),
    Row(name="Qwen-Image", having=("transformer_blocks", "img_mlp")),
    Row(name="Qwen-Image", having=("transformer_blocks", "txt_mlp")),
    Row(name="Qwen-Image", having=("transformer_blocks", "img_mod")),
    Row(name="Qwen-Image", having=("transformer_blocks_",), ends=_JOINT, widths=(3072,), beyond=19),
    Row(name="Flux", having=("transformer_blocks", "ff_context"), widths=(3072,)),
    Row(name="SD3.5 Large", having=("joint_blocks",), widths=(2432,)),
    Row(name="SD3", having=("joint_blocks",), widths=(1536,)),
    Row(name="SD3.5 Large", having=("transformer_blocks",), ends=_JOINT, widths=(2432,)),
    Row(name="SD3", having=("transformer_blocks",), ends=_JOINT, widths=(1536,)),
    Row(name="HiDream", having=("double_stream_blocks",)),
    Row(name="HiDream", having=("single_stream_blocks",)),
    Row(name="LTX-Video", having=("transformer_blocks",), ends=("attn1_to_q", "attn1_to_k"), widths=(2048,)),
    Row(name="LTX-2", having=("transformer_blocks",), ends=("attn1_to_q", "attn1_to_k"), widths=(4096,)),
    Row(name="Sana 1.6B", having=("transformer_blocks",), ends=("attn1_to_q", "attn1_to_k"), widths=(2240,)),
    Row(name="PixArt", having=("transformer_blocks",), ends=("attn1_to_q", "attn1_to_k"), widths=(1152,)),
    Row(name="CogVideoX-2B", having=("transformer_blocks",), ends=("attn1_to_q", "attn1_to_k"), widths=(1920,)),
    Row(name="CogVideoX-5B", having=("transformer_blocks",), ends=("attn1_to_q", "attn1_to_k"), widths=(3072,)),
    Row(name="Wan 14B", having=("blocks",), lacking=("transformer_blocks",), ends=_WAN, widths=(5120,)),
    Row(name="Wan 2.2 5B", having=("blocks",), lacking=("transformer_blocks",), ends=_WAN, widths=(3072,)),
    Row(name="Wan 1.3B", having=("blocks",), lacking=("transformer_blocks",), ends=_WAN, widths=(1536,)),
    Row(name="Cosmos 2B", having=("blocks",), ends=("self_attn_q_proj", "cross_attn_q_proj"), widths=(2048,)),
    Row(name="Z-Image", having=("layers",), ends=("attention_qkv", *_TO), widths=(3840,)),
    Row(name="Lumina 2", having=("layers",), ends=("attention_qkv", "attn_to_q", "attn_to_k"), widths=(2304,)),
    Row(name="SDXL text encoder", having=("te2_text_model",), widths=(1280,)),
    Row(name="SDXL text encoder", having=("text_encoder_2_text_model",), widths=(1280,)),
    Row(name="CLIP-L text encoder", having=("text_model_encoder_layers",), ends=("_proj", "fc1"), widths=(768,)),
    Row(name="SD2 text encoder", having=("text_model_encoder_layers",), ends=("_proj", "fc1"), widths=(1024,)),
)

LAYERED: tuple[tuple[str, tuple[str, ...], Mapping[tuple[int, int], str]], ...] = (
    (
        "decoder",
        ("self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_qkv_proj", "mlp_gate_proj"),
        {
            (576, 30): "SmolLM2-135M",
            (896, 24): "Qwen2.5-0.5B",
            (1024, 28): "Qwen3-0.6B",
            (1152, 26): "Gemma-3-1B",
            (1536, 28): "Qwen2.5-1.5B",
            (2048, 16): "Llama-3.2-1B",
            (2048, 18): "Gemma-2B",
            (2048, 22): "TinyLlama-1.1B",
            (2048, 24): "SmolLM2-1.7B",
            (2048, 28): "Qwen3-1.7B",
            (2048, 36): "Qwen2.5-3B",
            (2304, 26): "Gemma-2-2B",
            (2560, 32): "Phi-2",
            (2560, 34): "Gemma-3-4B",
            (2560, 36): "Qwen3-4B",
            (3072, 28): "Llama-3.2-3B",
            (3072, 32): "Phi-3-mini",
            (3584, 28): "Qwen2.5-7B",
            (3584, 42): "Gemma-2-9B",
            (3840, 48): "Gemma-3-12B",
            (4096, 32): "Llama-2-7B, Llama-3-8B, Mistral-7B",
            (4096, 36): "Qwen3-8B",
            (4608, 46): "Gemma-2-27B",
            (5120, 40): "Llama-2-13B, Qwen3-14B, Mistral-Nemo-12B",
            (5120, 48): "Qwen2.5-14B",
            (5120, 64): "Qwen2.5-32B, Qwen3-32B",
            (5376, 62): "Gemma-3-27B",
            (8192, 80): "Llama-3-70B, Qwen2.5-72B",
        },
    ),
    (
        "GPT-2",
        ("attn_c_attn", "mlp_c_fc"),
        {(768, 6): "DistilGPT2", (768, 12): "GPT-2", (1024, 24): "GPT-2 medium", (1280, 36): "GPT-2 large"},
    ),
    (
        "fused-attention decoder",
        ("attention_query_key_value", "self_attention_query_key_value"),
        {
            (768, 12): "Pythia-160M",
            (2048, 24): "BLOOM-1.7B, Pythia-1.4B",
            (2560, 32): "Pythia-2.8B",
            (4096, 30): "BLOOM-7B",
            (4096, 32): "Pythia-6.9B",
            (4544, 32): "Falcon-7B",
        },
    ),
    (
        "encoder",
        ("attention_self_query", "attention_self_value", "attention_attention_query", "attention_attention_value"),
        {(768, 12): "BERT-base, RoBERTa-base, ViT-base", (1024, 24): "BERT-large, RoBERTa-large, ViT-large"},
    ),
    (
        "T5",
        ("SelfAttention_q", "SelfAttention_v"),
        {(512, 6): "T5-small", (768, 12): "T5-base", (1024, 24): "T5-large", (2048, 24): "T5-3B"},
    ),
)
"""What such models are called, how their attention's inputs end, and (width, layers) -> models of that size."""
