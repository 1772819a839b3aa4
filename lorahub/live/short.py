"""How training avoids making changed weights: what changes a weight acts before, behind or beside its module instead.

Only while an adapter trains; at all other times the changed weight is made once and kept, and nothing is shorter.
``W' x`` is what ``Delta.around`` says of it, so the module keeps its own weight, no copy as large as that is held for
the way back, and the sum is neither made in float64 nor rounded to the weight's dtype at each step.  A part of a fused
weight acts on its own share of the outputs.  Knows spots and outputs; no selections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from lorahub.deltas.delta import ALL, Around, Index, Route, take
from lorahub.lazy import torch
from lorahub.live.effective import writable
from lorahub.live.spots import Loaded, Part, Spot, Way

if TYPE_CHECKING:
    from lorahub.bases.site import Site

__all__ = ["Short", "Step", "dropped", "short_at"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One part that goes around the weight.

    Attributes:
        part: the part.
        strength: its adapter's weight.
        dropout: the chance of an input of its path to be dropped.
        route: what ``Delta.around`` gave.
        rows: which of the weight's rows it changes, and so which of the outputs; ``ALL``, or their positions.
    """

    part: Part
    strength: float
    dropout: float
    route: Route
    rows: Index

    @property
    def whole(self) -> bool:
        """Whether it changes all of the weight."""
        return self.rows == ALL


@final
@dataclass(frozen=True, slots=True, eq=False)
class Short:
    """The parts at one spot that go around its weight: all that would change it, or none.

    Attributes:
        spot: where.
        steps: the parts.
        alone: nothing else acts at the spot, and the one part has weight 1.
        bias: the same gain acts on the module's bias, so that it multiplies the whole output.
        silent: this is that bias, for which the weight's spot acts.
    """

    spot: Spot
    steps: tuple[Step, ...]
    alone: bool = False
    bias: bool = False
    silent: bool = False

    def trains(self) -> bool:
        """Whether it is of use now: gradients are wanted, or will be when this call is repeated with them."""
        if not any(step.part.trains for step in self.steps):
            return False
        return torch.is_grad_enabled() or self.spot.place.module.training

    def entering(self, x: torch.Tensor) -> torch.Tensor | None:
        """What the module is given instead of ``x``, where that is all there is to do; else None."""
        if not self.alone or self.silent or not self.steps[0].route.enters:
            return None
        inputs = self._around(self.steps[0]).inputs
        assert inputs is not None
        return inputs(x)

    def behind(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``y``, the fresh output of the module for ``x``, as the changed weights would give it.

        Where the one part is alone ``y`` may be written to; else it is left as it is.
        """
        if self.silent:
            return y
        training = self.spot.place.module.training
        if self.alone and not (training and self.steps[0].dropout and x.is_floating_point()):
            return self._alone(x, y)
        bias = self._bias()
        base = y if bias is None else y - bias
        total = y
        for step in self.steps:
            seen = dropped(x, step.dropout if training else 0.0)
            dropping = seen is not x
            if step.whole:
                total = total + (self._one(step, seen, base, dropping) * step.strength).to(y.dtype)
                continue
            axis = -1 - len(self._site.kernel)
            rows = torch.arange(y.shape[axis], device=y.device)[_positions(step.rows, y.device)]
            added = self._one(step, seen, base.index_select(axis, rows), dropping) * step.strength
            total = total.index_add(axis, rows, added.to(y.dtype))
        return total

    def _alone(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.steps[0].route.enters:
            return y
        around, y = self._around(self.steps[0]), writable(y)
        if around.low is not None:
            y = self._low(around, x, y)
        if around.change is not None:
            y = y.add_(self._beside(around.change, x, y, ALL))
        if around.factor is None:
            return y
        factor = self._along(around.factor)
        z = y * factor
        if not self.bias and (bias := self._bias()) is not None:
            z = z + bias * (1 - factor)
        return z.to(y.dtype)

    def _one(self, step: Step, x: torch.Tensor, base: torch.Tensor, dropping: bool) -> torch.Tensor:
        """What one part adds at weight 1 to ``base``, its share of the output without a bias."""
        around = self._around(step)
        own = self._again(x, base, step.rows) if dropping else base
        z = own if around.inputs is None else self._again(around.inputs(x), base, step.rows)
        if around.low is not None:
            z = self._low(around, x, z.clone())
        if around.change is not None:
            z = z + self._beside(around.change, x, z, step.rows)
        return (z if around.factor is None else z * self._along(around.factor)) - own

    def _low(self, around: Around, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``y`` with the low-rank part added, in place."""
        assert around.low is not None
        site, up, down = self._site, around.low.up.to(y), around.low.down.to(y)
        inner = site.inner(x if site.op == "embedding" else x.to(y.dtype), up, down)
        if site.op == "conv":
            return y.add_(site.outer(inner, up, down), alpha=around.low.scale)
        matrix = up.t() if site.op == "linear" else down
        flat = y.view(-1, y.shape[-1])
        flat.addmm_(inner.reshape(-1, inner.shape[-1]).to(y.dtype), matrix, alpha=around.low.scale)
        return y

    def _beside(
        self, change: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, y: torch.Tensor, rows: Index
    ) -> torch.Tensor:
        """What a change of some rows gives by itself; on the way back it is made once more, and nothing of it kept."""
        like = take(y.new_zeros(()).expand(self._shape), rows, 0)  # of the weight only shape, dtype and device count
        if torch.compiler.is_compiling():
            made = change(like)
        else:
            made = torch.utils.checkpoint.checkpoint(change, like, use_reentrant=False, preserve_rng_state=False)
        return self._site.call(x if self._site.op == "embedding" else x.to(y.dtype), made)

    def _again(self, x: torch.Tensor, base: torch.Tensor, rows: Index) -> torch.Tensor:
        """What the module gives for other inputs, without its bias: those outputs that ``rows`` make."""
        weight = take(self._weight(), rows, 0).to(base.dtype)
        return self._site.call(x if self._site.op == "embedding" else x.to(base.dtype), weight)

    def _around(self, step: Step) -> Around:
        return step.route.of(lambda: take(self._weight(), step.rows, 0))

    def _weight(self) -> torch.Tensor:
        numbers = self.spot.numbers()
        return numbers.transpose(0, 1) if self._site.transposed else numbers

    @property
    def _shape(self) -> tuple[int, ...]:
        """Of the logical weight, [out, in, *k]."""
        return (*reversed(self.spot.shape),) if self._site.transposed else self.spot.shape

    def _along(self, factor: torch.Tensor) -> torch.Tensor:
        """A factor against the module's output."""
        return factor.reshape(-1, *(1 for _ in self._site.kernel))

    def _bias(self) -> torch.Tensor | None:
        bias: torch.Tensor | None = getattr(self.spot.place.module, "bias", None)
        return None if bias is None else self._along(bias)

    @property
    def _site(self) -> Site:
        assert self.spot.site is not None
        return self.spot.site


def dropped(x: torch.Tensor, chance: float) -> torch.Tensor:
    """``x`` with elements set to zero at random and all others enlarged to make up for it; ids stay as they are."""
    if not chance or not x.is_floating_point():
        return x
    return torch.nn.functional.dropout(x, chance, training=True)


def short_at(spot: Spot, spots: Iterable[Spot], adapters: Sequence[Loaded], strengths: Sequence[float]) -> Short | None:
    """The way around the weight of a spot among ``spots``, or None.

    A bias has one only where the same gain multiplies its module's outputs, so that it may multiply all of them.
    """
    short, bias = _short_of(spot, adapters, strengths), spot.place.leaf == "bias"
    if short is None:
        return None
    leaf = "weight" if bias else "bias"
    others = (each for each in spots if each.place.module is spot.place.module and each.place.leaf == leaf)
    other = next((_short_of(each, adapters, strengths) for each in others), None)
    if other is None or not _together(short, other):
        return None if bias else short
    return replace(short, bias=not bias, silent=bias)


def _short_of(spot: Spot, adapters: Sequence[Loaded], strengths: Sequence[float]) -> Short | None:
    """Where an adapter trains and everything that would change the weight has a way around it."""
    if spot.site is None:
        return None
    changing = [
        (part, strength, adapter.dropout)
        for adapter, strength in zip(adapters, strengths, strict=True)
        for part in adapter.takes(spot.key, Way.WEIGHT, Way.CHANGE)
    ]
    if not changing or not any(part.trains for part, _, _ in changing):
        return None
    steps = [
        Step(part, strength, dropout, part.route, part.piece.of_parameter.rows)
        for part, strength, dropout in changing
        if part.route is not None and not (part.inside and strength != 1)
    ]
    if len(steps) < len(changing):
        return None
    others = any(adapter.takes(spot.key, Way.LOW_RANK, Way.OWN) for adapter in adapters)
    return Short(spot, tuple(steps), alone=_alone(steps) and not others)


def _alone(steps: Sequence[Step]) -> bool:
    return len(steps) == 1 and steps[0].strength == 1 and steps[0].whole


def _positions(rows: Index, device: torch.device) -> slice | torch.Tensor:
    return rows if isinstance(rows, slice) else torch.tensor(rows, device=device)


def _together(one: Short, other: Short) -> bool:
    """Whether one tensor, and nothing else, acts on both, with a weight of 1."""
    if not (one.alone and other.alone):
        return False
    mine, its = (list(each.steps[0].part.delta.tensors().values()) for each in (one, other))
    return len(mine) == len(its) == 1 and mine[0].numel() == its[0].numel() and _same(mine[0], its[0])


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are views of the same numbers."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() and one.stride(0) == other.stride(0)
