"""Rounding to the nearest stored number, ties to even, in one step.

PyTorch takes float64 to 16 and 8 bits by way of float32: two roundings, and wrong where the first one makes a tie.
"""

from __future__ import annotations

from lorahub.lazy import torch

__all__ = ["nearest", "round_into"]


def nearest(total: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    """``total`` in the dtype ``storage``; a float64 sum becomes float32 to odd first (Boldo & Melquiond 2008).

    Rounded to odd means: where float32 cannot hold it, the one of its two neighbours whose last bit is 1.  That can be
    no tie of a shorter format, and lies on the same side of every tie.
    """
    if total.dtype != torch.float64 or storage.itemsize > 2 or not storage.is_floating_point:
        return total.to(storage)
    short = total.float()
    wide = short.double()
    bits = short.view(torch.int32)
    outwards = torch.where(total.abs() > wide.abs(), 1, -1).to(torch.int32)
    bits.add_(outwards.mul_((wide != total) & (bits.bitwise_and(1) == 0) & ~torch.isnan(total)))
    return short.to(storage)


def round_into(total: torch.Tensor, out: torch.Tensor) -> None:
    """Store ``total``."""
    out.copy_(total if total.dtype != torch.float64 else nearest(total, out.dtype))
