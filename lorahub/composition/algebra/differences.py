"""The difference of two stored tensors, as matrices; knows dtypes and axes, no names."""

from __future__ import annotations

import math

from lorahub.lazy import torch

__all__ = ["has_arithmetic", "matrices", "norm_of", "same_bits", "subtract"]

_PART = 1 << 17  # numbers summed at a time


def subtract(value: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """``value - before`` in float32, or in float64 where one of them is; ``value`` may be overwritten."""
    dtype = torch.float64 if torch.float64 in (value.dtype, before.dtype) else torch.float32
    return value.to(dtype).sub_(before)


def has_arithmetic(*tensors: torch.Tensor) -> bool:
    """Whether all are floating-point numbers of 16 bits or more; narrower ones are codes of quantised weights."""
    return all(each.is_floating_point() and each.element_size() > 1 for each in tensors)


def matrices(difference: torch.Tensor, *, stack: bool, transposed: bool) -> tuple[torch.Tensor, ...]:
    """What has factors of its own, each [out, in * prod(k)], as views: the whole, or every matrix of a stack."""
    each = difference.unbind(0) if stack else (difference,)
    return tuple((one.transpose(0, 1) if transposed else one).flatten(1) for one in each)


def norm_of(tensor: torch.Tensor) -> float:
    """The Frobenius norm, summed in float64."""
    flat = tensor.reshape(-1)
    parts = (flat[start : start + _PART].to(torch.float64) for start in range(0, flat.numel(), _PART))
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold the same bytes, in any dtype."""
    if one.dtype != other.dtype:
        return False
    flat = (each.reshape(-1).view(torch.uint8) for each in (one, other))
    return torch.equal(*flat)
