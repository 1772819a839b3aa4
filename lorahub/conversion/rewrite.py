"""The table of exact rewritings: which kinds are LoRA in another dress, and how the factors follow.

A kind whose change is a product of low rank has a closed form: the face-splitting product for LoHa, the Kronecker
product of both sides' factors for LoKr, the core multiplied out for LoCon, diagonals taken into the factors for AdaLoRA
and VeRA, a repeated block times repeated unit vectors for MiSS.  Where that rank would be no lower than the parameter's
own, the change itself beside a unit matrix is as exact and no larger.  Products are computed in float64 and stored in
float32, or in float64 where all of the source is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Any

from lorahub.composition.algebra.truncate import Budget, truncate
from lorahub.conversion.change import Change, Weight
from lorahub.conversion.folding import fold, narrowed
from lorahub.deltas.adalora import AdaLoRA
from lorahub.deltas.decomposed import Decomposed
from lorahub.deltas.delta import ALL, Delta, LowRank
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.loha import LoHa
from lorahub.deltas.lokr import LoKr
from lorahub.deltas.lora import LoRA
from lorahub.deltas.miss import MiSS
from lorahub.deltas.plain import plain_lora
from lorahub.deltas.replace import Replace
from lorahub.deltas.vera import VeRA
from lorahub.lazy import torch

__all__ = [
    "FROM_THE_WEIGHT",
    "REWRITINGS",
    "Obstacle",
    "Rewriting",
    "as_difference",
    "as_factors",
    "as_replacement",
    "rewrite",
    "unscaled",
]

Shape = tuple[int, ...]


class Obstacle(Exception):
    """Why a change has no exact form as LoRA, as the end of "because ..."; ``remedy`` is what would help."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewriting:
    """How one kind becomes LoRA.

    Attributes:
        rule: what reports call it.
        factors: (delta, shape of the parameter or None) -> exact factors; None where they are not low, or not told.
        needs_shape: the delta alone does not say how large the parameter is.
        dense: where the rank is not low, the change beside a unit matrix is taken.
    """

    rule: str
    factors: Callable[[Delta, Shape | None], LowRank | None]
    needs_shape: bool = False
    dense: bool = False


def _own(delta: Delta, _shape: Shape | None) -> LowRank | None:
    return delta.low_rank()


def _vera(delta: Delta, shape: Shape | None) -> LowRank | None:
    """Gains and mixes into the first rows and columns of the shared projections."""
    if not isinstance(delta, VeRA) or shape is None:
        return None
    up = delta.gain.double()[:, None] * delta.up[: shape[0]].double()
    return LowRank(up, delta.mix.double()[:, None] * delta.down[:, : shape[1]].double(), 1.0)


def _miss(delta: Delta, shape: Shape | None) -> LowRank | None:
    """The block's columns for the rows, and for each input the unit vector of the row of the block that it meets."""
    if not isinstance(delta, MiSS) or shape is None or delta.rows or delta.cols:
        return None
    r, m = delta.block.shape
    rows, cols = torch.arange(shape[0]) % m, torch.arange(shape[1]) % r
    down = torch.nn.functional.one_hot(cols, r).T.to(delta.block.dtype)
    return LowRank(delta.block.T[rows], down, 1.0)


REWRITINGS: Mapping[str, Rewriting] = MappingProxyType(
    {
        "adalora": Rewriting(rule="adalora-to-lora", factors=_own, dense=True),
        "bdlora": Rewriting(rule="bdlora-to-lora", factors=_own),
        "delora": Rewriting(rule="delora-to-lora", factors=_own),
        "gralora": Rewriting(rule="gralora-to-lora", factors=_own, dense=True),
        "locon": Rewriting(rule="tucker-to-lora", factors=_own),
        "loha": Rewriting(rule="loha-to-lora", factors=_own, dense=True),
        "lokr": Rewriting(rule="lokr-to-lora", factors=_own, dense=True),
        "miss": Rewriting(rule="miss-to-lora", factors=_miss, needs_shape=True),
        "vblora": Rewriting(rule="vblora-to-lora", factors=_own),
        "vera": Rewriting(rule="vera-to-lora", factors=_vera, needs_shape=True),
    }
)
"""Kind -> how it becomes LoRA.  A kind that is not here and says ``low_rank`` itself is rewritten by that."""

FROM_THE_WEIGHT = frozenset({"kasa", "osf", "pissa", "psoft"})
"""Kinds whose change is of low rank once the weight is known: see ``lorahub.deltas.plain``."""

_ROUNDING = 1e-13  # relative; what is below is the rounding of a decomposition in float64

_TOLD = 5e-7  # of a difference's norm; where float32 loses more of it beside the weight, float64 is kept

_OTHER = Rewriting(rule="low-rank-to-lora", factors=_own)


def rewrite(change: Change, weight: Weight) -> Change:
    """The change as plain LoRA; a decomposed one as DoRA.

    Args:
        change: what it is now.
        weight: the base's weights, for kinds that took a part of low rank away from them.

    Raises:
        Obstacle: it has no such form, or what it needs is not known.
    """
    delta, shape = change.delta, change.extent
    row = REWRITINGS.get(delta.kind, _OTHER)
    if isinstance(delta, Decomposed):
        return _undressed(change, delta, weight)
    if not delta.additive:
        return _moved(change, weight)
    if row.needs_shape and shape is None:
        raise Obstacle(f"{delta.kind} does not say how large its parameter is", "--base BASE")
    factors = row.factors(delta, shape)
    if factors is None and row.dense:
        factors = _dense(delta, shape)
    if factors is None:
        needs = "--approximate --rank 32" if shape else "--approximate --rank 32 --base BASE"
        raise Obstacle(f"{delta.kind} has no exact form of low rank", needs)
    return change.become(as_factors(factors, shape, tuple(delta.tensors().values())), row.rule)


def _undressed(change: Change, delta: Decomposed, weight: Weight) -> Change:
    """DoRA over another kind as DoRA over LoRA: the lengths stay, and what they are the lengths of is the same."""
    inner = rewrite(replace(change, delta=delta.inner()), weight).delta
    assert isinstance(inner, LoRA)  # what is decomposed is additive
    dora = DoRA(inner.up, inner.down, inner.scale, delta.kept(ALL, ALL), delta.axis)
    return change.become(dora, f"{delta.kind}-to-dora")


def _moved(change: Change, weight: Weight) -> Change:
    """PiSSA, OLoRA and their like: what was trained minus what was taken away, as one product in which nothing cancels.

    Raises:
        Obstacle: the change has no low rank, or the base is not at hand.
    """
    kind, (origin, *more) = change.delta.kind, change.origins
    if kind not in FROM_THE_WEIGHT or more or not origin.whole:
        raise Obstacle(f"{kind} depends on the weight it changes", "--approximate --rank 32 --base BASE")
    under = weight(origin.target)
    if under is None:
        raise Obstacle(f"{kind} takes a part of the weight away", "--base BASE")
    found = plain_lora(change.delta, under)
    if found is None:
        raise Obstacle(f"{kind} has no exact form of low rank", "--approximate --rank 32")
    core = truncate(found.up.flatten(1), found.down.flatten(1), found.scale, Budget(error=_ROUNDING))
    like = tuple(change.delta.tensors().values())
    return change.become(as_factors(LowRank(core.up, core.down, 1.0), change.extent, like), f"{kind}-to-lora")


def as_factors(found: LowRank, shape: Shape | None, like: tuple[torch.Tensor, ...]) -> LoRA:
    """Matrices as the factors of a parameter of ``shape``: a convolution's kernel goes into ``down``.

    Args:
        found: the factors; float64 is stored in float32 unless ``like`` is float64.
        shape: of the parameter; None, or a size that the factors do not have, leaves them matrices.
        like: the tensors they were made from.
    """
    up, down = narrowed(found.up, like), narrowed(found.down, like)
    dtype = torch.promote_types(up.dtype, down.dtype)
    up, down = up.to(dtype).contiguous(), down.to(dtype).contiguous()
    if shape and len(shape) > 2 and down.shape[1] == prod(shape[1:]):
        up, down = up.reshape(shape[0], -1, *(1,) * (len(shape) - 2)), down.reshape(-1, *shape[1:])
    return LoRA(up, down, found.scale)


def unscaled(change: Change) -> Change:
    """A difference or a Kronecker product with its scale multiplied in; anything else as it is."""
    delta = change.delta
    if isinstance(delta, Full) and delta.scale != 1.0:
        return change.become(Full(fold(delta.diff, delta.scale)), "scale-folded")
    if isinstance(delta, LoKr) and delta.scale != 1.0:
        name = "w1" if delta.w1 is not None else "w1_a"
        factor = delta.tensors()[name]
        folded: dict[str, Any] = {name: fold(factor, delta.scale)}
        return change.become(replace(delta, scale=1.0, **folded), "scale-folded")
    return change


def as_difference(change: Change, weight: Weight) -> Change:
    """A replaced parameter as its difference from the base's, where that is at hand and of the same shape."""
    delta, (origin, *more) = change.delta, change.origins
    if not isinstance(delta, Replace) or more or not origin.whole:
        return change
    under = weight(origin.target)
    if under is None or under.shape != delta.value.shape:
        return change
    moved = narrowed(delta.value.to(torch.float64) - under, (delta.value,))
    return change.become(Full(moved), "replacement-to-difference")


def as_replacement(change: Change, weight: Weight) -> Change:
    """A whole difference as the parameter that it makes of the base's: in float32 where that tells it apart."""
    delta, (origin, *more) = change.delta, change.origins
    if not isinstance(delta, Full) or more or not origin.whole:
        return change
    under = weight(origin.target)
    if under is None or under.shape != delta.diff.shape:
        return change
    moved = delta.diff.to(torch.float64) * delta.scale
    value = under + moved
    short = value.to(torch.float32)
    lost = (short.to(torch.float64) - value).norm()
    exact = float(lost) <= _TOLD * float(moved.norm())
    return change.become(Replace(short if exact else value), "difference-to-replacement")


def _dense(delta: Delta, shape: Shape | None) -> LowRank | None:
    """The change itself beside a unit matrix on its smaller side."""
    size = shape or _flat_size(delta)
    if size is None:
        return None
    matrix = delta.delta(torch.zeros(size, dtype=torch.float64)).flatten(1)
    out, flat = matrix.shape
    if not matrix.any():
        return LowRank(matrix.new_zeros(out, 1), matrix.new_zeros(1, flat), 1.0)
    unit = torch.eye(min(out, flat), dtype=torch.float64)
    return LowRank(matrix, unit, 1.0) if flat <= out else LowRank(unit, matrix, 1.0)


def _flat_size(delta: Delta) -> Shape | None:
    """The size of a change whose factors are flattened, whatever its kernel is."""
    if isinstance(delta, LoHa) and delta.t1 is None and not (delta.rows or delta.cols):
        return delta.w1_a.shape[0], delta.w1_b.shape[1]
    if isinstance(delta, AdaLoRA) and not (delta.rows or delta.cols):
        return delta.up.shape[0], delta.down.shape[1]
    return None
