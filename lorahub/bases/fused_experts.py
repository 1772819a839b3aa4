"""Gate and up projections of experts that a model keeps in one parameter, as targets of their own.

Some trainers have factors for each projection of a mixture's experts, while transformers 5 keeps the two in
``gate_up_proj``: one below the other, [E, 2 * inner, hidden], or, in GPT-OSS, woven and turned, [E, hidden, 2 * inner].
Which of the two it is, the architecture says; one that is not in the table is not guessed at.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Piece, Region

__all__ = ["FUSED", "PROJECTIONS", "part_pieces"]

FUSED = "gate_up_proj"

PROJECTIONS: Mapping[str, int] = MappingProxyType({"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1})
"""Projection -> which of the two it is."""

_STACKED = frozenset(
    {
        "deepseek_v2",
        "deepseek_v3",
        "ernie4_5_moe",
        "exaone_moe",
        "flex_olmo",
        "glm4_moe",
        "hunyuan_v1_moe",
        "lfm2_moe",
        "minimax",
        "mixtral",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_vl_moe",
        "qwen3_vl_moe_text",
    }
)
"""``model_type`` of architectures that keep the gates' rows above the others'."""

_WOVEN = frozenset({"gpt_oss"})
"""``model_type`` of architectures that keep columns of both in turn."""


def part_pieces(index: BaseIndex, module: str, parameter: str) -> tuple[Piece, ...]:
    """Where the matrices [inner, hidden] of a projection lie in the fused parameter; none where nobody says."""
    name, which = f"{module}.{FUSED}", PROJECTIONS.get(parameter)
    info = index.parameters.get(name)
    if which is None or info is None or len(info.shape) != 3:
        return ()
    experts, first, last = info.shape
    kind = _architecture(index)
    if kind in _STACKED and not first % 2:
        rows, turned = slice(which * first // 2, (which + 1) * first // 2), False
    elif kind in _WOVEN and not last % 2:
        rows, turned = slice(which, last, 2), True
    else:
        return ()
    return tuple(
        Piece(
            parameter=name,
            of_delta=Region(expert=expert),
            of_parameter=Region(expert=expert, transposed=turned, rows=rows),
        )
        for expert in range(experts)
    )


def _architecture(index: BaseIndex) -> str:
    inner = index.config.get("text_config")
    kinds = (inner.get("model_type") if isinstance(inner, dict) else None, index.config.get("model_type"))
    return next((kind for kind in kinds if isinstance(kind, str)), "")
