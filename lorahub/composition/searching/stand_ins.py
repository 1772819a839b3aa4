"""Adapters that know nothing, to hold others against: random changes of the same shapes and norms, and fresh ones.

Knows deltas and shapes; no models, no files.
"""

from __future__ import annotations

import math
from dataclasses import replace

from lorahub.deltas.delta import Delta, LowRank
from lorahub.deltas.full import Full
from lorahub.deltas.lora import LoRA
from lorahub.errors import NotLocal
from lorahub.lazy import torch

__all__ = ["RANK", "fresh_like", "is_stack", "norm_of", "random_like", "shuffled"]

RANK = 8
"""Of factors that stand in for changes without a rank."""


def norm_of(low: LowRank) -> float:
    """The Frobenius norm of a change by its factors, in float64."""
    up, down = low.up.detach().double(), low.down.detach().double()
    square = float(((up.mT @ up) * (down @ down.mT)).sum())
    return abs(low.scale) * math.sqrt(max(square, 0.0))


def random_like(
    delta: Delta, shape: tuple[int, ...], norm: float, *, rank: int | None, generator: torch.Generator
) -> Delta:
    """A random change of the same shape and norm; of the same rank where the change has one.

    Args:
        delta: what it stands in for; its tensors say dtype and device.
        shape: of the parameter, [out, in, *k] or [n].
        norm: Frobenius norm of the change.
        rank: of factors, where ``delta`` has none; ``RANK`` if nobody knows.
        generator: on the CPU.
    """
    low = delta.low_rank()
    like = low.up if low is not None else next(iter(delta.tensors().values()))
    like = like if like.is_floating_point() else like.float()
    if len(shape) < 2:
        vector = torch.randn(shape, generator=generator)
        return Full((vector * (norm / (float(vector.norm()) or 1.0))).to(like), 1.0)
    r = low.down.shape[0] if low is not None else _capped(rank or RANK, shape)
    up = torch.randn(shape[0], r, *(1 for _ in shape[2:]), generator=generator).to(like)
    down = torch.randn(r, *shape[1:], generator=generator).to(like)
    scale = norm / (norm_of(LowRank(up.flatten(1), down.flatten(1), 1.0)) or 1.0)
    return LoRA(up, down, scale)


def is_stack(delta: Delta) -> bool:
    """Whether it changes a stack of matrices, each by factors of its own."""
    if delta.replacement() is not None:  # a value can be taken apart, whatever its axes mean
        return False
    try:
        return delta.expert(0).low_rank() is not None
    except NotLocal:
        return False


def shuffled(delta: Delta, generator: torch.Generator) -> Delta:
    """A stack of changes with normal numbers in its tensors, of the norm of the whole."""
    drawn = {
        name: torch.randn(tensor.shape, generator=generator).to(tensor)
        for name, tensor in delta.tensors().items()
        if tensor.is_floating_point()
    }
    made = replace(delta, **drawn)  # type: ignore[type-var]  # every delta is a dataclass
    first = next(iter(drawn))
    ratio = _stack_norm(delta) / (_stack_norm(made) or 1.0)
    return replace(made, **{first: drawn[first] * ratio})  # type: ignore[type-var]  # as above


def _stack_norm(delta: Delta) -> float:
    """The Frobenius norm of all matrices' changes together, by their factors."""
    experts = next(iter(delta.tensors().values())).shape[0]
    lows = [delta.expert(position).low_rank() for position in range(experts)]
    return math.sqrt(sum(norm_of(low) ** 2 for low in lows if low is not None))


def fresh_like(
    shape: tuple[int, ...], *, rank: int, generator: torch.Generator, device: torch.device, stack: Delta | None = None
) -> Delta:
    """A change that begins at nothing and wants gradients: LoRA, or a whole difference for a vector.

    Args:
        shape: of the parameter, [out, in, *k] or [n].
        rank: of the factors, at most as many as the matrix has directions.
        generator: on the CPU.
        device: where it is trained.
        stack: a change of a stack of matrices: there it is one of the same kind.
    """
    if stack is not None:
        made = type(stack).fresh(shape, r=rank, generator=generator)
    elif len(shape) < 2:
        made = Full.fresh(shape, r=rank, generator=generator)
    else:
        made = LoRA.fresh(shape, r=_capped(rank, shape), generator=generator)
    tensors = {
        name: tensor.to(device).requires_grad_() if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in made.tensors().items()
    }
    return replace(made, **tensors)  # type: ignore[type-var]  # every delta is a dataclass


def _capped(rank: int, shape: tuple[int, ...]) -> int:
    return max(1, min(rank, shape[0], math.prod(shape[1:])))
