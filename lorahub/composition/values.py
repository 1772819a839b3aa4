"""Whole new values (task heads, trained biases) that need no base to be composed.

``W0 + sum of w_i (V_i - W0)`` is ``sum of w_i V_i`` where the weights sum to 1, whatever was there before; and where
all adapters bring the same value, that is the value.  Everything else is a change against the base and needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorahub.deltas.delta import Delta
from lorahub.deltas.replace import Replace
from lorahub.lazy import torch

__all__ = ["Settled", "settled"]

ONE = 1e-9
"""How far from 1 weights may sum to be shares of a whole; 0.1 + 0.2 + 0.7 is not 1 in binary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """The new value, and what was done, in words."""

    delta: Delta
    note: str


def settled(deltas: Sequence[Delta | None], weights: Sequence[float]) -> Settled | None:
    """The value that adapters come to, where that does not depend on the one before; else None.

    Args:
        deltas: of each adapter; None where it leaves the parameter alone.
        weights: of each; one at weight 0 brings nothing.
    """
    counting = [(delta, weight) for delta, weight in zip(deltas, weights, strict=True) if weight]
    values = [delta.replacement() if delta is not None else None for delta, _ in counting]
    first = values[0] if values else None
    if first is None or any(value is None or value.shape != first.shape for value in values):
        return None
    shares = abs(sum(weight for _, weight in counting) - 1) <= ONE
    known = [value for value in values if value is not None]
    if all(torch.equal(value, first) for value in known):
        delta = counting[0][0]
        assert delta is not None  # it brings the value
        note = "" if shares else "all adapters bring this value, which is kept whatever their weights"
        return Settled(delta=delta, note=note)
    if not shares:
        return None
    total = torch.zeros_like(first, dtype=torch.float64)
    for value, (_, weight) in zip(known, counting, strict=True):
        total += weight * value.double()
    return Settled(delta=Replace(total.to(first.dtype)), note="the weighted mean of the adapters' values")
