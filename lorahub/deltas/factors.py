"""A pair of low-rank factors: what LoRA, DoRA and every later kind built on ``up @ down`` has in common.

``up`` is ``[out, r]`` or, beside a convolution, ``[out, r, *1]``; ``down`` is ``[r, in, *k]``.
"""

from __future__ import annotations

import math

from lorahub.deltas.fit import expect_matrix
from lorahub.deltas.kind import JSON, Group, Slot
from lorahub.lazy import torch

__all__ = [
    "FACTORS",
    "dissolve_factors",
    "example_factors",
    "factor_shape",
    "fresh_factors",
    "product",
    "scale_of",
]

FACTORS = (Slot(name="down", dims="r in *k"), Slot(name="up", dims="out r *1"))


def product(up: torch.Tensor, down: torch.Tensor, scale: float, weight: torch.Tensor) -> torch.Tensor:
    """``scale * up @ down`` as ``[out, in, *k]``, in the weight's dtype and on its device.

    The factors are converted first and the scale multiplies the product: one more rounding an element, where scaling
    a factor would round every term of the sum.  It is also PEFT's order of operations.
    """
    change = up.flatten(1).to(weight) @ down.flatten(1).to(weight)
    return change.mul_(scale).reshape(factor_shape(up, down))


def factor_shape(up: torch.Tensor, down: torch.Tensor) -> tuple[int, ...]:
    """``[out, in, *k]`` of the weight that the factors ``[out, r, *1]`` and ``[r, in, *k]`` fit."""
    return (up.shape[0], *down.shape[1:])


def fresh_factors(
    kind: str, shape: tuple[int, ...], r: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """``up`` of zeros and ``down`` as PEFT begins it: Kaiming uniform with a = sqrt(5), so within 1/sqrt(fan_in)."""
    out, _, fan_in = expect_matrix(kind, shape)
    bound = 1 / math.sqrt(fan_in)
    down = torch.empty(r, *shape[1:], device=generator.device).uniform_(-bound, bound, generator=generator)
    return torch.zeros(pointwise(out, r, shape), device=generator.device), down


def example_factors(
    kind: str, shape: tuple[int, ...], r: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal factors whose product has elements of size 1, whatever ``r``."""
    out, _, _ = expect_matrix(kind, shape)
    up, down = (
        torch.randn(size, generator=generator, device=generator.device)
        for size in (pointwise(out, r, shape), (r, *shape[1:]))
    )
    return up / math.sqrt(r), down


def pointwise(out: int, r: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of ``up`` beside a weight of ``shape``: as many trailing ones as there are kernel axes."""
    return (out, r, *(1 for _ in shape[2:]))


def dissolve_factors(
    up: torch.Tensor, down: torch.Tensor, scale: float
) -> tuple[dict[str, torch.Tensor], dict[str, JSON]]:
    """The slots and options of a pair of factors; ``up`` gets the trailing ones that files have for convolutions."""
    r = down.shape[0]
    return {"down": down, "up": up.reshape(pointwise(up.shape[0], r, tuple(down.shape)))}, {"scale": scale, "rank": r}


def scale_of(group: Group) -> float:
    """The scale a format wrote into the group's options."""
    scale = group.options["scale"]
    assert isinstance(scale, int | float)
    return float(scale)
