"""One batch over many low-rank changes in plain torch: what ``segmented_triton`` computes, a row at a time."""

from __future__ import annotations

from lorahub.engine.kernels.segments import Segments
from lorahub.lazy import torch

__all__ = ["add_segments"]


def add_segments(y: torch.Tensor, x: torch.Tensor, segments: Segments, scales: torch.Tensor) -> None:
    """Add to some rows of ``y``, in place, the change that each has; see ``Segments``.

    Args:
        y: ``[size, tokens, out]`` with any strides, of the factors' dtype.
        x: ``[size, tokens, in]``, likewise.
        segments: the rows and their factors.
        scales: float32 ``[rows]``, on their device.
    """
    for row, which, scale in zip(segments.rows, segments.which, scales, strict=True):
        inner = x[row].float() @ segments.downs[which].float().T
        y[row] = y[row] + scale * (inner @ segments.ups[which].float().T)
