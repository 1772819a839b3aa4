"""Which parameters hold several projections, and how their rows lie: a table, and the few rules that it needs.

Data alone, read in the modelling code of the library: an entry names architectures, the module, the projections inside
it and how the rows are dealt out.  ``tests/test_fused.py`` and ``tests/test_fused_classes.py`` hold every entry against
what the real classes compute.  To add a fused parameter, add an entry, and its class to those tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from lorahub.deltas.kind import JSON

__all__ = ["FUSED", "Bands", "Config", "Fused"]

Config: TypeAlias = Mapping[str, JSON]
Bands: TypeAlias = tuple[int, tuple[int, ...]]
"""How often a pattern of rows comes, and how many rows each projection has in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """Several projections in one parameter, along its rows.

    Attributes:
        kinds: ``model_type`` of the architectures that keep them so.
        module: end of the path of the module that has them.
        parts: their names, in the order of the rows; each stands in the place of the module's last name.
        bands: how the rows lie, from the configuration and their number; None where that does not say.
        how: the same in words.
        config: the part of the configuration that says it ("text_config"), where it has parts.
        own: how the names of the parameters begin where the module is no linear layer itself, but has these rows as
            parameters of its own, as ``in_proj_weight``; the projections then stand below the module.
    """

    kinds: tuple[str, ...]
    module: str
    parts: tuple[str, ...]
    bands: Callable[[Config, int], Bands | None]
    how: str
    config: str = ""
    own: str = ""


_QKV = ("q_proj", "k_proj", "v_proj")
_BOTH = ("gate_proj", "up_proj")
_ONE_BY_ONE, _BY_HEAD = "one projection after the other", "head by head"


def _number(config: Config, *names: str) -> int | None:
    """A setting under the first of its names that is there."""
    return next((value for name in names if isinstance(value := config.get(name), int) and value > 0), None)


def _thirds(_config: Config, rows: int) -> Bands | None:
    return None if rows % 3 else (1, (rows // 3,) * 3)


def _halves(_config: Config, rows: int) -> Bands | None:
    return None if rows % 2 else (1, (rows // 2,) * 2)


def _shared(heads: int | None, groups: int | None, rows: int) -> Bands | None:
    """As many rows for queries as heads, and as many for keys and values as heads of theirs."""
    if heads is None or groups is None or rows % (heads + 2 * groups):
        return None
    size = rows // (heads + 2 * groups)
    return 1, (heads * size, groups * size, groups * size)


def _grouped(config: Config, rows: int) -> Bands | None:
    heads = _number(config, "num_attention_heads", "num_heads")
    return _shared(heads, _number(config, "num_key_value_heads") or heads, rows)


def _dbrx(config: Config, rows: int) -> Bands | None:
    inner = config.get("attn_config")
    groups = _number(inner, "kv_n_heads") if isinstance(inner, Mapping) else None
    return _shared(_number(config, "n_heads", "num_attention_heads"), groups, rows)


def _heads(config: Config, rows: int) -> Bands | None:
    heads = _number(config, "num_attention_heads", "n_head")
    return None if heads is None or rows % (3 * heads) else (heads, (rows // heads // 3,) * 3)


def _falcon(config: Config, rows: int) -> Bands | None:
    heads = _number(config, "num_attention_heads", "n_head")
    new, one = config.get("new_decoder_architecture"), config.get("multi_query")
    if heads is None or not isinstance(new, bool) or not isinstance(one, bool):
        return None
    if not new and not one:
        return _heads(config, rows)
    groups = (_number(config, "num_kv_heads") if new else 1) or 0
    if not groups or heads % groups or rows % (heads + 2 * groups):
        return None
    size = rows // (heads + 2 * groups)
    return groups, (heads // groups * size, size, size)


def _bigcode(config: Config, rows: int) -> Bands | None:
    heads, one = _number(config, "n_head", "num_attention_heads"), config.get("multi_query")
    if heads is None or not isinstance(one, bool):
        return None
    if not one:
        return _heads(config, rows)
    return None if rows % (heads + 2) else (1, (rows // (heads + 2) * heads, *(rows // (heads + 2),) * 2))


def _codegen(_config: Config, rows: int) -> Bands | None:
    """Four blocks, as the machines had on which it was trained."""
    return None if rows % 12 else (4, (rows // 12,) * 3)


def _linear_sizes(config: Config) -> tuple[int, int, int] | None:
    """Of a linear attention: heads of keys, rows of keys and queries each, rows of values."""
    heads, width = _number(config, "linear_num_key_heads"), _number(config, "linear_key_head_dim")
    others, size = _number(config, "linear_num_value_heads"), _number(config, "linear_value_head_dim")
    if heads is None or width is None or others is None or size is None or others % heads:
        return None
    return heads, heads * width, others * size


def _linear(config: Config, _rows: int) -> Bands | None:
    sizes = _linear_sizes(config)
    return None if sizes is None else (1, (sizes[1], sizes[1], sizes[2]))


def _linear_groups(config: Config, _rows: int) -> Bands | None:
    """By heads of keys, each with the values and gates of those that share it."""
    sizes = _linear_sizes(config)
    if sizes is None:
        return None
    heads, keys, values = sizes
    return heads, (keys // heads, keys // heads, values // heads, values // heads)


def _linear_rates(config: Config, rows: int) -> Bands | None:
    heads = _number(config, "linear_num_key_heads")
    return None if heads is None or rows % (2 * heads) else (heads, (rows // heads // 2,) * 2)


_QWEN_PICTURES = (
    "cohere_compass_vision",
    "colqwen2",
    "cosmos3_omni",
    "dots3_note",
    "dots3_note_vision_encoder",
    "ernie4_5_vl_moe",
    "ernie4_5_vl_moe_vision",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm4v_moe_vision",
    "glm4v_vision",
    "glm5_next",
    "glm5_next_vision",
    "glm_image",
    "glm_image_vision",
    "glm_ocr",
    "glm_ocr_vision",
    "glmga",
    "hyperclovax_vision_v2",
    "qwen2_5_vl",
    "qwen2_5_vl_vision",
    "qwen2_vl",
    "qwen2_vl_vision",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_vision",
    "qwen3_5_vision",
    "qwen3_omni_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_omni_moe_vision_encoder",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_vl_moe_vision",
    "qwen3_vl_vision",
    "qwen4_exp_vision",
)
"""Architectures with the picture tower of Qwen2-VL, or one like it."""

_SEGMENTING = (
    "deepseek_ocr2_sam_vision_model",
    "deepseek_ocr2_vision",
    "deepseek_vl_hybrid",
    "edgetam_video",
    "got_ocr2",
    "got_ocr2_vision",
    "hiera",
    "mgp-str",
    "pp_formulanet",
    "pp_formulanet_vision",
    "sam",
    "sam2",
    "sam2_hiera_det_model",
    "sam2_video",
    "sam2_vision_model",
    "sam_hq",
    "sam_hq_vision_model",
    "sam_vision_model",
    "slanext",
    "slanext_vision",
    "unlimited_ocr",
    "unlimited_ocr_sam_vision_model",
    "unlimited_ocr_vision",
)
"""Architectures with the picture tower of SAM or SAM 2, or one like it."""

_BLIP = (
    "blip",
    "blip_vision_model",
    "blip-2",
    "blip_2_vision_model",
    "instructblip",
    "instructblip_vision_model",
    "instructblipvideo",
    "instructblipvideo_vision_model",
)

_GLM = (
    "dia",
    "dia_decoder",
    "dia_encoder",
    "dots3_note",
    "dots3_note_audio_encoder",
    "glm",
    "glm4",
    "glm46v",
    "glm4v",
    "glm4v_text",
    "glm_image",
    "glm_image_text",
    "glm_ocr",
    "glm_ocr_text",
    "glmga",
    "phi3",
    "phi4_multimodal",
)

_WHOLE_BERT = ("modernbert", "modernvbert", "colmodernvbert", "pe_audio", "pe_audio_video", "pe_video")

_POOLED = (
    "cohere2_vision",
    "colmodernvbert",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "gemma3",
    "lfm2_vl",
    "modernvbert",
    "phi4_multimodal",
    "phi4_multimodal_vision",
    "shieldgemma2",
    "siglip",
    "siglip2",
    "siglip2_vision_model",
    "siglip_vision_model",
    "t5gemma2",
)
"""Architectures with the head of SigLIP's picture tower, whose attention pools."""


def _each(kinds: tuple[str, ...], *modules: str, how: str = _ONE_BY_ONE, own: str = "") -> tuple[Fused, ...]:
    """Queries, keys and values of equal size, one after the other, in several modules."""
    return tuple(Fused(kinds=kinds, module=module, parts=_QKV, bands=_thirds, how=how, own=own) for module in modules)


FUSED: tuple[Fused, ...] = (
    *_each(("gpt2", "decision_transformer", "imagegpt", "openai-gpt"), "attn.c_attn"),
    Fused(kinds=("gpt_bigcode",), module="attn.c_attn", parts=_QKV, bands=_bigcode, how="as multi_query says"),
    Fused(
        kinds=("gpt_neox", "gpt_neox_japanese"),
        module="attention.query_key_value",
        parts=_QKV,
        bands=_heads,
        how=_BY_HEAD,
    ),
    Fused(kinds=("bloom",), module="self_attention.query_key_value", parts=_QKV, bands=_heads, how=_BY_HEAD),
    Fused(
        kinds=("falcon",),
        module="self_attention.query_key_value",
        parts=_QKV,
        bands=_falcon,
        how="by groups of heads, as new_decoder_architecture and multi_query say",
    ),
    Fused(kinds=("persimmon",), module="self_attn.query_key_value", parts=_QKV, bands=_heads, how=_BY_HEAD),
    Fused(
        kinds=("fuyu",),
        module="self_attn.query_key_value",
        parts=_QKV,
        bands=_heads,
        how=_BY_HEAD,
        config="text_config",
    ),
    Fused(kinds=("minimax",), module="self_attn.qkv_proj", parts=_QKV, bands=_heads, how=_BY_HEAD),
    Fused(kinds=("deberta",), module="attention.self.in_proj", parts=_QKV, bands=_heads, how=_BY_HEAD),
    *_each(("mpt", *_WHOLE_BERT), "attn.Wqkv"),
    Fused(
        kinds=("codegen",),
        module="attn.qkv_proj",
        parts=("q_proj", "v_proj", "k_proj"),
        bands=_codegen,
        how="four blocks of queries, values and keys",
    ),
    Fused(kinds=("phi3", "phi4_multimodal"), module="self_attn.qkv_proj", parts=_QKV, bands=_grouped, how=_ONE_BY_ONE),
    Fused(kinds=("dbrx",), module="attn.Wqkv", parts=_QKV, bands=_dbrx, how=_ONE_BY_ONE),
    *_each(("bark", "semantic", "coarse_acoustics", "fine_acoustics"), "attn.att_proj"),
    *_each(_QWEN_PICTURES, "attn.qkv"),
    Fused(kinds=("exaone4_5",), module="attn.qkv", parts=_QKV, bands=_grouped, how=_ONE_BY_ONE, config="vision_config"),
    Fused(kinds=("exaone4_5_vision",), module="attn.qkv", parts=_QKV, bands=_grouped, how=_ONE_BY_ONE),
    *_each(_SEGMENTING, "attn.qkv"),
    *_each(_BLIP, "self_attn.qkv"),
    *_each(("seggpt", "timesformer", "vitdet"), "attention.qkv"),
    *_each(("florence2", "florence_vision"), "window_attn.qkv", "channel_attn.qkv"),
    *_each(_POOLED, "head.attention", own="in_proj_"),
    *_each(("bridgetower", "bridgetower_vision_model"), "attn", own="in_proj_"),
    *_each(("aria",), "multihead_attn", own="in_proj_"),
    *_each(("mask2former",), "cross_attn", own="in_proj_"),
    *_each(("oneformer",), "self_attn", "multihead_attn", own="in_proj_"),
    Fused(kinds=_GLM, module="mlp.gate_up_proj", parts=_BOTH, bands=_halves, how=_ONE_BY_ONE),
    Fused(
        kinds=("minimax_m3_vl", "minimax_m3_vl_text"),
        module="shared_experts.gate_up_proj",
        parts=_BOTH,
        bands=_halves,
        how=_ONE_BY_ONE,
    ),
    Fused(
        kinds=("phi4_multimodal", "phi4_multimodal_audio"),
        module="feed_forward_in.gate_up_proj",
        parts=_BOTH[::-1],
        bands=_halves,
        how="the gate second",
    ),
    Fused(
        kinds=("phi4_multimodal", "phi4_multimodal_audio"),
        module="feed_forward_out.gate_up_proj",
        parts=_BOTH[::-1],
        bands=_halves,
        how="the gate second",
    ),
    Fused(kinds=("zamba2",), module="feed_forward.gate_up_proj", parts=_BOTH, bands=_halves, how=_ONE_BY_ONE),
    Fused(
        kinds=("granitemoehybrid", "granitemoeshared"),
        module="shared_mlp.input_linear",
        parts=_BOTH,
        bands=_halves,
        how=_ONE_BY_ONE,
    ),
    Fused(kinds=(*_WHOLE_BERT, "modernbert-decoder"), module="mlp.Wi", parts=_BOTH, bands=_halves, how=_ONE_BY_ONE),
    Fused(
        kinds=("qwen3_next",),
        module="linear_attn.in_proj_qkvz",
        parts=(*_QKV, "in_proj_z"),
        bands=_linear_groups,
        how="by heads of keys",
    ),
    Fused(
        kinds=("qwen3_next",),
        module="linear_attn.in_proj_ba",
        parts=("in_proj_b", "in_proj_a"),
        bands=_linear_rates,
        how="by heads of keys",
    ),
    Fused(
        kinds=("qwen3_5_moe_text", "qwen3_5_text"),
        module="linear_attn.in_proj_qkv",
        parts=_QKV,
        bands=_linear,
        how=_ONE_BY_ONE,
    ),
    Fused(
        kinds=("minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "qwen3_5", "qwen3_5_moe"),
        module="linear_attn.in_proj_qkv",
        parts=_QKV,
        bands=_linear,
        how=_ONE_BY_ONE,
        config="text_config",
    ),
)
"""Every fused parameter whose rows are known."""
