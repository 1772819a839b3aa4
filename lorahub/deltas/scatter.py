"""Numbers scattered over a matrix at random positions that a seed gives back: what FourierFT and WaveFT have in common.

PEFT stores neither the positions nor the matrix's shape: they are the first n of a random permutation of all elements,
drawn by torch's CPU generator.  Knows tensors and sizes; no files and no configs.
"""

from __future__ import annotations

from lorahub.errors import BaseMismatch
from lorahub.lazy import torch

__all__ = ["amount", "scattered"]


def scattered(kind: str, values: torch.Tensor, seed: int, weight: torch.Tensor) -> torch.Tensor:
    """``values`` ``[n]`` in a matrix of zeros like ``weight``.

    Raises:
        BaseMismatch: the weight is no matrix, or has fewer elements than there are values.
    """
    if weight.dim() != 2 or weight.numel() < values.numel():
        raise BaseMismatch(f"a {kind} delta of {values.numel()} coefficients was given a weight {list(weight.shape)}")
    # the permutation is that of the CPU, wherever the weight is
    order = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(seed))
    places = order[: values.numel()].to(weight.device)
    flat = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
    return flat.index_put((places,), values.to(weight)).reshape(weight.shape)


def amount(kind: str, shape: tuple[int, ...], r: int) -> int:
    """How many numbers a matrix of ``shape`` gets for a rank: as many as a LoRA has, or all.

    Raises:
        BaseMismatch: it is no matrix.
    """
    if len(shape) != 2:
        raise BaseMismatch(f"a {kind} delta changes matrices [out, in], not {list(shape)}")
    return min(r * sum(shape), shape[0] * shape[1])
