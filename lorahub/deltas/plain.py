"""Plain LoRA from kinds that need the weight: the same change as factors, once the weight is there.

PiSSA, OLoRA, KaSA and OSF take a low-rank part of the weight away and add another product; both together are factors of
the summed rank.  PSOFT turns a low-rank part, which is one product.  Exact up to the rounding of the factors.  Knows
deltas and weights; no files.
"""

from __future__ import annotations

from typing import TypeAlias

from lorahub.deltas.delta import Delta
from lorahub.deltas.kasa import Kasa
from lorahub.deltas.lora import LoRA
from lorahub.deltas.osf import Tail
from lorahub.deltas.pissa import Moved
from lorahub.deltas.psoft import Principal
from lorahub.lazy import torch

__all__ = ["plain_lora"]

_Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"


def plain_lora(delta: Delta, weight: torch.Tensor) -> LoRA | None:
    """The LoRA with the change that ``delta`` makes to ``weight``, or None where its kind has no such form.

    For PiSSA and OLoRA of rank r the factors are ``[up | -first_up]`` and ``[down; first_down]`` of rank 2 r, at the
    scale they were trained with.

    Args:
        delta: what was trained.
        weight: the untouched weight ``[out, in]``; the factors get its dtype, float32 at least.

    Raises:
        BaseMismatch: the weight has other sizes than the delta.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    match delta:
        case Moved():
            return _with(delta.taken(wide), (delta.up, delta.down), delta.scale)
        case Kasa():
            return _with(delta.taken(wide), (delta.up.to(wide) * delta.diagonal.to(wide), delta.down), delta.scale)
        case Tail():
            return _with(delta.taken(wide), (delta.up.to(wide) * delta.values.to(wide), delta.down), 1.0)
        case Principal():
            return LoRA(*delta.factors(wide), 1.0)
    return None


def _with(taken: _Pair, trained: _Pair, scale: float) -> LoRA:
    """``scale * trained - taken`` as factors of one product with that scale; at scale 0 only what was taken is left."""
    (left, right), (up, down) = taken, trained
    if not scale:
        return LoRA(-left, right, 1.0)
    return LoRA(torch.cat([up.to(left), left / -scale], dim=1), torch.cat([down.to(right), right]), scale)
