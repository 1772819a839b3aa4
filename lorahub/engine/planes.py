"""``W' = W0 + sum of weight * delta(W0)`` over one matrix or vector, rounded once: where the numbers are made.

Two ways: ``Rows`` goes through the matrix in windows of rows and never forms a low-rank change as a whole; ``Whole``
takes any delta and any region, at the price of a few copies of the matrix.  Knows no plans, files or models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol, Self, final

from lorahub.bases.layout import Region
from lorahub.deltas.delta import ALL, Delta, Index
from lorahub.engine.crew import Workspace
from lorahub.engine.sums import Change, Ingredient, NotFiniteHere, Sums, all_finite, squares
from lorahub.engine.windows import cut
from lorahub.errors import NotLocal
from lorahub.lazy import torch

__all__ = ["Plane", "Rows", "Whole"]


class Plane(Protocol):
    """A matrix or vector, logical or stored orientation alike, and what is added to it."""

    @property
    def windows(self) -> tuple[slice, ...]:
        """The slices of rows that can be folded each by itself; together all of them."""

    def run(self, windows: Sequence[slice], before: torch.Tensor | None, out: torch.Tensor, space: Workspace) -> Change:
        """Fold some consecutive ``windows``.

        Args:
            windows: some of ``self.windows``.
            before: those rows of the untouched weight, or None where the result does not depend on it.
            out: where they go, in storage dtype; may be the memory of ``before``.
            space: scratch memory.

        Raises:
            NotFiniteHere: a result is not finite; ``out`` is then undefined.
        """


@dataclass(frozen=True, slots=True)
class _Part:
    """An ingredient over rows ``start`` to ``stop``: a new value, or with a weight two factors or some other delta."""

    start: int
    stop: int
    value: torch.Tensor | None = None
    factors: tuple[torch.Tensor, torch.Tensor] | None = None
    delta: Delta | None = None
    weight: float = 1.0

    def cut(self, start: int, stop: int) -> Self:
        """The same over fewer rows."""
        rows = slice(start - self.start, stop - self.start)
        return replace(
            self,
            start=start,
            stop=stop,
            value=None if self.value is None else self.value[rows],
            factors=None if self.factors is None else (self.factors[0][rows], self.factors[1]),
            delta=None if self.delta is None else self.delta.region(rows, ALL),
        )


class _Recipe(Protocol):
    """What happens to rows over which the same ingredients are active; ``rows`` counts from the first of them."""

    def fold(
        self, rows: slice, before: torch.Tensor | None, out: torch.Tensor, space: Workspace, sums: Sums
    ) -> Change: ...


@final
@dataclass(frozen=True, slots=True)
class _Keep:
    """Nothing happens."""

    def fold(self, rows: slice, before: torch.Tensor | None, out: torch.Tensor, space: Workspace, sums: Sums) -> Change:
        assert before is not None
        out.copy_(before)
        if not before.is_floating_point():
            return Change()
        return Change(squares(space.take("total", before.shape, sums.dtype, out.device).copy_(before)))


@final
@dataclass(frozen=True, slots=True)
class _Put:
    """A replacement alone: its value is copied, with one rounding where it is stored wider."""

    value: torch.Tensor

    def fold(self, rows: slice, before: torch.Tensor | None, out: torch.Tensor, space: Workspace, sums: Sums) -> Change:
        change = Change()
        if before is not None and out.is_floating_point():
            total = space.take("total", before.shape, sums.dtype, out.device).copy_(before)
            change = Change(squares(total), squares(total.sub_(sums.cast(self.value[rows]))))
        out.copy_(self.value[rows])
        if not all_finite(out):
            raise NotFiniteHere(before=False)
        return change


@final
@dataclass(frozen=True, slots=True)
class _Product:
    """Low-rank changes alone, as one product with the sum of its squares; weights and scales are within ``up``."""

    up: torch.Tensor
    down: torch.Tensor
    squares: float

    @classmethod
    def of(
        cls, factors: Sequence[tuple[torch.Tensor, torch.Tensor, float]], device: torch.device, dtype: torch.dtype
    ) -> Self:
        """One product out of several (up, down, weight)."""
        up = torch.cat([up.to(device, dtype) * weight for up, _, weight in factors], 1)
        down = torch.cat([down.to(device, dtype) for _, down, _ in factors])
        wide, long = up.double(), down.double()
        size = float((wide.T @ wide * (long @ long.T)).sum())
        return cls(up, down, max(size, 0.0))  # rounding can take a vanishing product below zero

    def fold(self, rows: slice, before: torch.Tensor | None, out: torch.Tensor, space: Workspace, sums: Sums) -> Change:
        assert before is not None
        total = space.take("total", before.shape, self.up.dtype, out.device).copy_(before)
        size = squares(total)
        self.add(rows, total)
        sums.finish(total, out, size, self.squares)
        return Change(size, 0.0 if rows.start else self.squares)  # counted once, with the first window

    def add(self, rows: slice, total: torch.Tensor) -> None:
        total.view(total.shape[0], -1).addmm_(self.up[rows], self.down)


@final
@dataclass(frozen=True, slots=True)
class _Sum:
    """Anything: a value or the weights as they were, and all that is added to them."""

    value: torch.Tensor | None
    product: _Product | None
    deltas: tuple[tuple[float, Delta], ...]

    def fold(self, rows: slice, before: torch.Tensor | None, out: torch.Tensor, space: Workspace, sums: Sums) -> Change:
        assert before is not None
        untouched = space.take("untouched", before.shape, sums.dtype, out.device).copy_(before)
        total = space.take("total", before.shape, sums.dtype, out.device)
        total.copy_(untouched if self.value is None else self.value[rows])
        if self.product is not None:
            self.product.add(rows, total)
        for weight, delta in self.deltas:
            total.add_(delta.region(rows, ALL).delta(untouched), alpha=weight)
        change = Change(squares(untouched), squares(untouched.sub_(total)))
        sums.finish(total, out, change.before, change.added)
        return change


def _recipe(parts: Sequence[_Part], sums: Sums) -> _Recipe:
    """What parts over the same rows come to."""
    value = next((part.value for part in parts if part.value is not None), None)
    deltas = tuple((part.weight, part.delta) for part in parts if part.delta is not None)
    factors = [(*part.factors, part.weight) for part in parts if part.factors is not None]
    if not factors and not deltas:
        return _Keep() if value is None else _Put(value)
    product = _Product.of(factors, sums.device, sums.dtype) if factors else None
    return product if product and value is None and not deltas else _Sum(value, product, deltas)


@final
class Rows:
    """A plane that is folded in windows of rows, each by itself."""

    def __init__(self, shape: Sequence[int], parts: Sequence[_Part], sums: Sums) -> None:
        self._sums = sums
        self._recipes: dict[int, tuple[int, _Recipe]] = {}  # first row of a window -> first row of its recipe, and it
        row_bytes = math.prod(shape[1:]) * sums.dtype.itemsize
        edges = sorted({0, shape[0], *(edge for part in parts for edge in (part.start, part.stop))})
        windows: list[slice] = []
        for start, stop in pairwise(edges):
            active = [part.cut(start, stop) for part in parts if part.start <= start and stop <= part.stop]
            recipe = _recipe(active, sums)
            for window in cut(start, stop, row_bytes, window=sums.window):
                self._recipes[window.start] = start, recipe
                windows.append(window)
        self.windows = tuple(windows)

    @classmethod
    def of(cls, shape: Sequence[int], items: Sequence[Ingredient], sums: Sums) -> Self | None:
        """The plane, or None where an ingredient needs more than a window of rows."""
        parts = [_part(shape, item) for item in items]
        return None if None in parts else cls(shape, [part for part in parts if part is not None], sums)

    def run(self, windows: Sequence[slice], before: torch.Tensor | None, out: torch.Tensor, space: Workspace) -> Change:
        """Fold some consecutive windows; see ``Plane``."""
        first, change = windows[0].start, Change()
        for window in windows:
            here = slice(window.start - first, window.stop - first)
            start, recipe = self._recipes[window.start]
            rows = slice(window.start - start, window.stop - start)
            part = None if before is None else before[here]
            change += recipe.fold(rows, part, out[here], space, self._sums)
        return change


def _span(index: Index, size: int) -> range | None:
    """The positions of a slice in steps of one, or None."""
    found = range(*index.indices(size)) if isinstance(index, slice) else None
    return found if found is not None and found.step == 1 else None


def _part(shape: Sequence[int], item: Ingredient) -> _Part | None:
    """The ingredient as something that windows of a plane's rows can be folded with, or None."""
    to, of = item.piece.of_parameter, item.piece.of_delta
    turned = to.transposed  # rows of the plane are columns of the delta
    if (turned and len(shape) != 2) or of.expert is not None or of.transposed or item.siblings:
        return None
    along, across = (to.cols, to.rows) if turned else (to.rows, to.cols)
    of_along, of_across = (of.cols, of.rows) if turned else (of.rows, of.cols)
    span = _span(along, shape[0])
    if across != ALL or of_across != ALL or span is None or _span(of_along, shape[0]) is None:
        return None
    assert isinstance(of_along, slice)

    def turn(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(0, 1) if turned else tensor

    value = item.delta.replacement() if item.weight == 1 else None
    if value is not None:
        return _Part(span.start, span.stop, value=turn(value)[of_along])
    low = item.delta.low_rank() if len(shape) > 1 else None
    if low is not None:
        up, down = (low.down.T, low.up.T) if turned else (low.up, low.down)
        return _Part(span.start, span.stop, factors=(up[of_along], down), weight=item.weight * low.scale)
    if turned or not item.local:
        return None
    return _Part(span.start, span.stop, delta=item.delta.region(of_along, ALL), weight=item.weight)


@final
class Whole:
    """A plane that is folded as a whole, for deltas and regions of every sort."""

    def __init__(self, shape: Sequence[int], items: Sequence[Ingredient], sums: Sums) -> None:
        self._items, self._sums = items, sums
        self.windows: tuple[slice, ...] = (slice(0, shape[0] if shape else 1),)

    def run(self, windows: Sequence[slice], before: torch.Tensor | None, out: torch.Tensor, space: Workspace) -> Change:
        """Fold the plane; see ``Plane``.

        Raises:
            NotLocal: a delta would have to be cut in a way it cannot be.
        """
        untouched = self._sums.cast(torch.zeros_like(out) if before is None else before.clone())
        total = untouched.clone()
        rest = []
        for item in self._items:
            if item.weight == 1 and (value := item.delta.replacement()) is not None:
                item.piece.of_parameter.put(total, self._sums.cast(item.piece.of_delta.of(value)))
            else:
                rest.append(item)
        for item in rest:
            self._add(item, untouched, total)
        change = Change(squares(untouched), squares(untouched.sub_(total)))
        self._sums.finish(total, out, change.before, change.added)
        return change

    def _add(self, item: Ingredient, untouched: torch.Tensor, total: torch.Tensor) -> None:
        region = item.piece.of_parameter
        siblings = {name: self._sums.cast(value) for name, value in item.siblings.items()}
        added = _cut(item.delta, item.piece.of_delta).delta(region.of(untouched).contiguous(), **siblings)
        region.put(total, region.of(total) + added * item.weight)


def _cut(delta: Delta, region: Region) -> Delta:
    if region.whole:
        return delta
    if region.expert is not None or region.transposed:
        raise NotLocal(f"a {delta.kind} delta cannot be turned around, or cut to one expert of many")
    return delta.region(region.rows, region.cols)
