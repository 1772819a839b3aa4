"""The projections that models of diffusers keep in one parameter, as a table: which rows are whose.

Queries, keys and values in one weight, with or without the beginning of a feed-forward; the value and the gate of a
gated one.  Data alone: ``tests/test_fused.py`` holds every entry against what the real modules compute.  What is not
here is taken as a whole, and nothing inside it can be a target.

Facts: diffusers 0.42.1, the attention processors and feed-forwards of ``diffusers.models``.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorahub.deltas.kind import JSON

__all__ = ["FUSED", "HEADS", "SPLIT", "Fused", "Split"]

HEADS = ("num_attention_heads", "attention_head_dim")
"""Fields of a configuration whose product is the number of rows of queries, keys and values each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """Several projections in one parameter, one after the other along its rows.

    Attributes:
        kinds: classes of diffusers that keep them so; empty for every class, which ``inner`` then tells.
        module: end of the path of the module that has them.
        parts: what stands in the place of that end for each, in the order of the rows.
        shares: of the rows, one for each part; of those that are left after ``heads``.
        heads: how many of the parts, counted from the first, have as many rows as all heads (``HEADS``) and no share.
        inner: in the place of that end, the module whose inputs are the rows of one part; shapes that disagree are
            not this entry's.
        when: (field of the configuration, its value) where a class keeps them in more than one way.
    """

    kinds: tuple[str, ...]
    module: str
    parts: tuple[str, ...]
    shares: tuple[int, ...]
    heads: int = 0
    inner: str = ""
    when: tuple[str, JSON] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Projections that models keep apart, and ``fuse_qkv_projections`` puts together: the fused name as a target.

    Attributes:
        module: end of the path of the fused one.
        parts: the modules that stand beside it instead, in the order of its rows.
    """

    module: str
    parts: tuple[str, ...]


_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
_VALUE_FIRST, _GATE_FIRST = ("up_proj", "gate_proj"), ("gate_proj", "up_proj")
_FLUX2, _AUDIO3 = ("Flux2Transformer2DModel",), ("StableAudio3DiTModel",)
_JOY = ("JoyImageEditTransformer3DModel", "JoyImageEditPlusTransformer3DModel")
_WM, _CONSIS = ("SanaWMTransformer3DModel",), ("ConsisIDTransformer3DModel",)


def _below(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" for name in names)


FUSED: tuple[Fused, ...] = (
    # Flux's words for the same rows of a single block: its feed-forward begins in ``proj_mlp``
    Fused(
        kinds=_FLUX2,
        module="attn.to_qkv_mlp_proj",
        parts=(*_below("attn", _QKV), "proj_mlp"),
        shares=(1,),
        heads=3,
    ),
    Fused(
        kinds=_FLUX2,
        module="attn.to_qkv_mlp_proj",
        parts=(*_below("attn", _QKV), *_below("attn", _GATE_FIRST)),
        shares=(1, 1),
        heads=3,
    ),
    Fused(kinds=("PRXTransformer2DModel",), module="img_qkv_proj", parts=_QKV, shares=(1, 1, 1)),
    Fused(kinds=("PRXTransformer2DModel",), module="txt_kv_proj", parts=_ADDED[1:], shares=(1, 1)),
    Fused(kinds=_JOY, module="img_attn_qkv", parts=_QKV, shares=(1, 1, 1)),
    Fused(kinds=_JOY, module="txt_attn_qkv", parts=_ADDED, shares=(1, 1, 1)),
    # two sets of queries and keys, whose attentions are subtracted, and one of values
    *(
        Fused(kinds=_AUDIO3, module=module, parts=parts, shares=shares, when=("use_differential_attention", twice))
        for module, parts, shares, twice in (
            ("self_attn.to_qkv", _below("self_attn", _QKV), (2, 2, 1), True),
            ("self_attn.to_qkv", _below("self_attn", _QKV), (1, 1, 1), False),
            ("cross_attn.to_kv", _below("cross_attn", _QKV[1:]), (2, 1), True),
            ("cross_attn.to_kv", _below("cross_attn", _QKV[1:]), (1, 1), False),
        )
    ),
    Fused(kinds=_WM, module="attn.qkv", parts=_below("attn", _QKV), shares=(1, 1, 1)),
    Fused(kinds=_WM, module="kv_linear", parts=("k_linear", "v_linear"), shares=(1, 1)),
    Fused(kinds=_CONSIS, module="to_kv", parts=_QKV[1:], shares=(1, 1)),
    Fused(kinds=("MochiTransformer3DModel",), module="pooler.to_kv", parts=_below("pooler", _QKV[1:]), shares=(1, 1)),
    # gated feed-forwards
    Fused(kinds=(), module="net.0.proj", parts=_below("net.0", _VALUE_FIRST), shares=(1, 1), inner="net.2"),
    *(
        Fused(kinds=kinds, module=module, parts=parts, shares=(1, 1), inner=inner)
        for kinds, module, parts, inner in (
            ((*_FLUX2, "Flux3Transformer2DModel"), "linear_in", _GATE_FIRST, "linear_out"),
            (_AUDIO3, "ff.proj_in", _below("ff", _VALUE_FIRST), "ff.proj_out"),
            (("MiniMaxMusic3Transformer1DModel",), "ff_in", _VALUE_FIRST, "ff_out"),
            (("OmniGenTransformer2DModel",), "gate_up_proj", _GATE_FIRST, "down_proj"),
        )
    ),
    Fused(kinds=("OvisImageTransformer2DModel",), module="proj_mlp", parts=_VALUE_FIRST, shares=(1, 1)),
)
"""Every module of the kind that people adapt; autoencoders' and proteins' are left whole."""

SPLIT: tuple[Split, ...] = (
    Split(module="to_qkv", parts=_QKV),
    Split(module="to_kv", parts=_QKV[1:]),
    Split(module="to_added_qkv", parts=_ADDED),
    Split(module="to_added_kv", parts=_ADDED[1:]),
)
"""What attention of every class is fused to; diffusers saves adapters that were put on it under these names."""
