"""A factor multiplied into stored numbers, without a loss that anyone could see later.

A power of two only moves exponents, so 16-bit numbers stay what they were as long as none leaves the range; any other
factor is multiplied in where the storage is float32 or wider (one rounding, 6e-8 relative), and 16-bit numbers are
widened first, which is exact.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from lorahub.lazy import torch

__all__ = ["commonest", "fold", "narrowed"]


def fold(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """``factor * tensor``, in its own dtype where that is exact, else in float32 at least."""
    if factor == 1.0:
        return tensor
    if factor and math.frexp(factor)[0] in (0.5, -0.5):
        there = tensor * factor
        if torch.isfinite(there).all() and torch.equal(there / factor, tensor):
            return there
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.to(torch.float64) * factor).to(wide)


def commonest(scales: Iterable[float]) -> float:
    """The commonest scale, which the others are folded over: never zero but where all are, for nothing is over zero."""
    given = Counter(scales)
    return max((scale for scale in given if scale), key=lambda scale: given[scale], default=0.0)


def narrowed(tensor: torch.Tensor, like: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A float64 result in float32, unless the tensors it was made from are all float64 themselves."""
    if tensor.dtype != torch.float64 or all(each.dtype == torch.float64 for each in like if each.is_floating_point()):
        return tensor
    return tensor.to(torch.float32)
