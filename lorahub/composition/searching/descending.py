"""Adam over a few tensors, and nothing else.  Knows numbers; no models, no adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lorahub.composition.searching.trial_log import as_loss
from lorahub.errors import NotFinite, UsageError
from lorahub.lazy import torch

__all__ = ["descend"]


def descend(
    leaves: Sequence[torch.Tensor],
    loss: Callable[[int], torch.Tensor],
    *,
    steps: int,
    lr: float,
    tick: Callable[[], None] = lambda: None,
) -> tuple[tuple[float, ...], list[bool]]:
    """Lower a loss by Adam over ``leaves`` alone; whatever else wants gradients gets none.

    Args:
        leaves: what changes, in place.
        loss: step -> a tensor of one number, with gradients.
        steps: how many.
        lr: the learning rate.
        tick: called after each step.

    Returns:
        The loss of every step, before it; and for each leaf whether the loss ever depended on it.

    Raises:
        UsageError: the loss is no number with gradients.
        NotFinite: it is NaN or infinite at some step.
    """
    optimizer = torch.optim.Adam(leaves, lr=lr)
    curve: list[float] = []
    used = [False] * len(leaves)
    with torch.enable_grad():
        for step in range(steps):
            value = loss(step)
            curve.append(_demand_gradient(value, step))
            found = torch.autograd.grad(value, leaves, allow_unused=True)
            used = [before or each is not None for before, each in zip(used, found, strict=True)]
            for leaf, gradient in zip(leaves, found, strict=True):
                leaf.grad = gradient
            optimizer.step()
            tick()
    for leaf in leaves:
        leaf.grad = None
    return tuple(curve), used


def _demand_gradient(value: object, step: int) -> float:
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise UsageError(
            f"the loss gave a {type(value).__name__} at step {step}", "return one tensor of one number, as a loss is"
        )
    if not value.requires_grad:
        raise UsageError(
            f"the loss has no gradient at step {step}",
            "compute it with the model that is passed, outside of torch.no_grad and without .item() or .detach()",
        )
    number = as_loss(value)
    if math.isnan(number):
        raise NotFinite(f"the loss is no finite number at step {step}", "look at the examples, or lower lr")
    return number
