"""What modules of diffusers are, told by names and shapes: a weight's axes say it, but for those in the table.

Data alone: ``tests/test_index.py`` holds it against every class of diffusers.  No class stores a weight transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache

from lorahub.deltas.kind import JSON

__all__ = ["ATTENTION", "ELSE", "in_attention", "role_of"]

_BY_AXES = {2: "linear", 3: "conv", 4: "conv", 5: "conv"}
"""Axes of a parameter called "weight" -> what its module is."""

ELSE: tuple[tuple[str, str, str], ...] = (
    ("*", "*.class_embedder.embedding_table", "embedding"),
    ("*", "*norm1.emb", "embedding"),
    ("*", "addition_t_embedding", "embedding"),
    ("*", "*.addition_t_embedding", "embedding"),
    ("*", "controlnet_mode_embedder", "embedding"),
    ("*", "latent_image_embedding.*", "embedding"),
    ("*", "embed_tokens", "embedding"),
    ("*", "*.style_embedder", "embedding"),
    ("*", "quantize.embedding", "embedding"),
    ("AceStepTransformer1DModel", "proj_out_conv", ""),
    ("AnimaTextConditioner", "embed", "embedding"),
    ("AutoencoderTiny*", "*.deconv", ""),
    ("ConsistencyDecoderVAE", "decoder_unet.time_proj", "embedding"),
    ("Cosmos3OmniTransformer", "*.fc", "embedding"),
    ("Cosmos3OmniTransformer", "*.bias", "embedding"),
    ("GlmImageTransformer2DModel", "prior_token_embedding", "embedding"),
    ("HunyuanVideo15Transformer3DModel", "cond_type_embed", "embedding"),
    ("Ideogram4Transformer2DModel", "embed_image_indicator", "embedding"),
    ("Kandinsky3UNet", "*.up_sample", ""),
    ("Kandinsky3UNet", "*.shortcut_up_sample", ""),
    ("Kandinsky6Transformer3DModel", "visual_token_type_embeddings", "embedding"),
    ("MMAudioVocoder", "ups.*.0", ""),
    ("MiniMaxMusic3RVQDepthDecoder", "audio_embeddings", "embedding"),
    ("MiniMaxMusic3RVQDepthDecoder", "pos_embedding", "embedding"),
    ("MiniMaxMusic3Transformer1DModel", "time_proj", ""),
    ("RFD4Proteina*", "*.cath_code.[act]", "embedding"),
    ("RFD4Proteina*", "*.feature_modules.atom_charge", "embedding"),
    ("RFD4Proteina*", "*.feature_modules.atomic_element", "embedding"),
    ("RFD4Proteina*", "*.feature_modules.secondary_structure", "embedding"),
    ("RFD4Proteina*", "*.feature_modules.token_type", "embedding"),
    ("SanaWMTransformer3DModel", "*.attn.conv_k", ""),
    ("SanaWMTransformer3DModel", "*.attn.conv_k_cam", ""),
    ("SkyReelsV2Transformer3DModel", "fps_embedding", "embedding"),
    ("StableCascadeUNet", "up_upscalers.*.1", ""),
    ("T5FilmDecoder", "position_encoding", "embedding"),
    ("UNet2DModel", "time_proj", "embedding"),
    ("UVit2DModel", "embed.embeddings", "embedding"),
    ("WanAnimateTransformer3DModel", "motion_encoder.*", ""),
)
"""(class, module, role): what the axes do not tell; ``*`` stands for anything.  "" is a module of a class of its own,
or a transposed convolution."""

ATTENTION = frozenset(
    {
        *("to_q", "to_k", "to_v", "to_out", "to_out.0", "to_gate"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("to_qkv", "to_kv", "to_qkv_mlp_proj", "qkv", "kv_linear", "q_linear"),
        *("to_query", "to_key", "to_value", "out_layer"),
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("query", "key", "value", "proj_attn"),
        *("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj", "img_qkv_proj", "txt_kv_proj"),
    }
)
"""Ends of paths of the projections of attention."""


def role_of(class_name: str, config: Mapping[str, JSON], name: str, shape: tuple[int, ...]) -> str:
    """What the module of a parameter is, by its canonical name: "linear", "conv", "embedding" or nothing."""
    module, _, parameter = name.rpartition(".")
    if parameter != "weight":
        return ""
    if module == "class_embedding" and len(shape) == 2:  # one of a kind: a layer or a table, by an argument
        return "linear" if config.get("class_embed_type") == "simple_projection" else "embedding"
    for end, role in _else_of(class_name):
        if fnmatchcase(module, end):
            return role
    return _BY_AXES.get(len(shape), "")


@cache
def _else_of(class_name: str) -> tuple[tuple[str, str], ...]:
    """Ends of paths and roles in ``ELSE`` that are said of a class."""
    return tuple((end, role) for which, end, role in ELSE if fnmatchcase(class_name, which))


def in_attention(module: str) -> bool:
    """Whether a linear module is a projection of attention."""
    return any(f".{module}".endswith(f".{end}") for end in ATTENTION)
