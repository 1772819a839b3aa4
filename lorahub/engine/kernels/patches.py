"""Low-rank changes to many matrices at once, as data: ``weight += scale * up @ down`` for each, rounded once.

Sums are float32 where bfloat16 is stored and float64 where float16 or float32 is, as everywhere in the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from lorahub.engine.folding.sums import Change
from lorahub.lazy import torch

__all__ = ["Outcome", "Patch", "accumulator"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One matrix, and what is added to it.

    Attributes:
        weight: ``[m, n]`` with any strides, bfloat16, float16 or float32; changed in place.
        up: ``[m, r]``, contiguous, bfloat16 or float32, on the weight's device.
        down: ``[r, n]``, contiguous, of the same dtype.
        scale: what their product is multiplied with.
        saved: ``[m, n]`` of the weight's dtype, contiguous: where the untouched weights are put; or None.
    """

    weight: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    scale: float
    saved: torch.Tensor | None = None


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one patch.

    Attributes:
        change: sums of squares of the weights before and of what was added.
        finite: whether every number that was written is one.
    """

    change: Change
    finite: bool


def accumulator(storage: torch.dtype) -> torch.dtype:
    """The dtype that sums have for weights of ``storage``."""
    return torch.float32 if storage == torch.bfloat16 else torch.float64
