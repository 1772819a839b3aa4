"""Changes of full rank as LoRA of a lower one, where that was asked for: the best approximation within a budget.

A change that depends on the weight is computed on the base's, one target at a time, in float64, and truncated; what is
lost is told for each target.  A change of a vector is kept as a difference, which loses nothing.
"""

from __future__ import annotations

from dataclasses import replace

from lorahub.composition.algebra.factorise import factorise
from lorahub.composition.algebra.truncate import Budget
from lorahub.conversion.carry import Approximate
from lorahub.conversion.change import Change, Weight
from lorahub.conversion.folding import narrowed
from lorahub.conversion.rewrite import Obstacle, as_factors
from lorahub.conversion.verify import siblings
from lorahub.deltas.delta import LowRank
from lorahub.deltas.full import Full
from lorahub.lazy import torch

__all__ = ["approximator"]


def approximator(budget: Budget, weight: Weight) -> Approximate:
    """How a change is approximated.

    Args:
        budget: how much to keep of each.
        weight: the base's weights; gives None where there is no base.
    """

    def approximate(change: Change) -> Change:
        delta, (origin, *more) = change.delta, change.origins
        if more or not origin.whole:
            raise Obstacle(f"a {delta.kind} change that was split or fused is not approximated", "")
        under = None if delta.additive and change.extent else weight(origin.target)
        if under is None and not (delta.additive and change.extent):
            why = "depends on the weight it changes" if not delta.additive else "does not say how large it is"
            raise Obstacle(f"{delta.kind} {why}", "--base BASE")
        around = siblings(delta, origin.target, weight)
        if around is None:
            raise Obstacle(f"{delta.kind} reads {', '.join(delta.reads)}, which are not in the base", "--base BASE")
        if under is None:
            under = torch.zeros(change.extent or (), dtype=torch.float64)
        moved = delta.delta(under, **around)
        like = tuple(delta.tensors().values())
        if moved.dim() < 2:
            return change.become(Full(narrowed(moved, like)), "as-difference")
        found = factorise(moved.flatten(1), budget)
        factors = as_factors(LowRank(found.up, found.down, 1.0), tuple(moved.shape), like)
        return replace(change, shape=tuple(moved.shape)).become(factors, "approximated", error=found.error)

    return approximate
