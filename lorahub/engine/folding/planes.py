"""``W' = W0 + sum of weight * delta(W0)`` over one matrix or vector: in windows of rows, or as a whole.

Two ways: ``Rows`` goes through the matrix in windows of rows and never forms a low-rank change as a whole; ``Whole``
takes any delta and any region, at the price of a few copies of the matrix.  Knows no plans, files or models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Protocol, Self, final

from lorahub.bases.layout import Region
from lorahub.deltas.delta import ALL, Delta, Index
from lorahub.engine.crew import Workspace
from lorahub.engine.folding.recipes import (
    Factors,
    Keep,
    Launchable,
    Launching,
    Notable,
    Noting,
    Put,
    Recipe,
    Stretch,
    Sum,
)
from lorahub.engine.folding.sums import Change, Ingredient, NotFiniteHere, Sums, all_finite, is_finite
from lorahub.engine.folding.windows import cut
from lorahub.engine.kernels.choice import native
from lorahub.engine.kernels.merge_c import HIGHEST_RANK, Notes
from lorahub.engine.rounding.directed import directed
from lorahub.errors import NotLocal
from lorahub.lazy import torch

__all__ = ["Noted", "Plane", "Rows", "Whole"]


@final
@dataclass(frozen=True, slots=True)
class Noted:
    """What a pass did that noted the way back.

    Attributes:
        steps: of the pass.
        notes: of the way back.
        finite: whether every result is a finite number.
    """

    steps: tuple[Noting, ...]
    notes: Notes
    finite: bool

    def change(self) -> Change:
        """What became of the weights."""
        return sum((step.change() for step in self.steps), Change())


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


def _recipe(parts: Sequence[_Part], sums: Sums) -> Recipe:
    """What parts over the same rows come to."""
    value = next((part.value for part in parts if part.value is not None), None)
    deltas = [(part.weight, part.delta) for part in parts if part.delta is not None]
    factors = [Factors(*part.factors, part.weight) for part in parts if part.factors is not None]
    if not factors and not deltas:
        return Keep() if value is None else Put(value)
    if value is None and not deltas:
        return sums.mode.product(factors, sums)
    plain = Sum(value, factors, deltas, sums)
    if value is None and not factors and len(deltas) == 1:
        return directed(*deltas[0], sums, plain) or plain
    return plain


@final
class Rows:
    """A plane that is folded in windows of rows, each by itself."""

    def __init__(self, shape: Sequence[int], parts: Sequence[_Part], sums: Sums) -> None:
        self._sums = sums
        self._row = math.prod(shape[1:])
        self._recipes: dict[int, tuple[int, Recipe]] = {}  # first row of a window -> first row of its recipe, and it
        edges = sorted({0, shape[0], *(edge for part in parts for edge in (part.start, part.stop))})
        windows: list[slice] = []
        for start, stop in pairwise(edges):
            active = [part.cut(start, stop) for part in parts if part.start <= start and stop <= part.stop]
            recipe = _recipe(active, sums)
            for window in cut(start, stop, self._row * sums.dtype.itemsize, window=sums.window):
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
        change = Change()
        for recipe, at in self._stretches(windows, before, out, space):
            change += recipe.fold(at, self._sums)
            if not isinstance(recipe, Keep) or (at.before is not None and at.before.dtype != at.out.dtype):
                _demand_finite(at.before, at.out)
        return change

    def run_noting(
        self, windows: Sequence[slice], before: torch.Tensor, out: torch.Tensor, space: Workspace
    ) -> Noted | None:
        """As ``run``, with the way back noted in the same pass; None, with nothing done, where that cannot be.

        Results that are no numbers are written and noted like others.
        """
        if before.dtype != out.dtype or out.device.type != "cpu" or not out.is_contiguous():
            return None
        if (kernel := native().kernel) is None:
            return None
        steps: list[tuple[Noting, int]] = []
        for recipe, at in self._stretches(windows, before, out, space):
            step = recipe.noting(at, self._sums) if isinstance(recipe, Notable) else None
            if step is None:
                return None
            steps.append((step, at.out.numel()))
        notes, finite, first = Notes(kernel, out.dtype, out.numel(), self._row, space), True, 0
        for step, count in steps:
            finite = step.write(notes, first) and finite
            first += count
        return Noted(tuple(step for step, _ in steps), notes, finite=finite)

    def launching(
        self, windows: Sequence[slice], before: torch.Tensor, out: torch.Tensor, saved: torch.Tensor | None
    ) -> list[Launching] | None:
        """Some consecutive windows made ready for one launch of their device's kernel; None where it has none for them.

        Args:
            windows: some of ``self.windows``.
            before: those rows of the untouched weight.
            out: where they go; may be the memory of ``before``.
            saved: where the kernel puts what ``before`` holds aside; None where it need not.
        """
        ready: list[Launching] = []
        first = 0
        for recipe, at in self._stretches(windows, before, out, Workspace()):
            rows = slice(first, first := first + len(at.out))
            one = (
                recipe.launching(at, None if saved is None else saved[rows]) if isinstance(recipe, Launchable) else None
            )
            if one is None:
                return None
            ready.append(one)
        return ready

    def put(
        self, windows: Sequence[slice], before: torch.Tensor, out: torch.Tensor, space: Workspace, sign: float
    ) -> None:
        """Do ``sign`` times what ``run_noting`` did to these windows, as it did it, and note nothing."""
        for recipe, at in self._stretches(windows, before, out, space):
            assert isinstance(recipe, Notable)
            recipe.put(at, sign)

    def operands(self, windows: Sequence[slice], rows: torch.Tensor, sign: float) -> list[torch.Tensor]:
        """What ``put`` reads for these windows besides their rows; ``rows`` are these."""
        found: list[torch.Tensor] = []
        for recipe, at in self._stretches(windows, rows, rows, Workspace()):
            assert isinstance(recipe, Notable)
            found += recipe.operands(at, sign)
        return found

    def _stretches(
        self, windows: Sequence[slice], before: torch.Tensor | None, out: torch.Tensor, space: Workspace
    ) -> Iterator[tuple[Recipe, Stretch]]:
        """Consecutive windows, as far as one recipe goes at a time."""
        first = windows[0].start
        for start, group in groupby(windows, lambda window: self._recipes[window.start][0]):
            several = tuple(group)
            top, bottom = several[0].start, several[-1].stop
            here = slice(top - first, bottom - first)
            yield (
                self._recipes[top][1],
                Stretch(
                    rows=slice(top - start, bottom - start),
                    windows=tuple(slice(window.start - top, window.stop - top) for window in several),
                    before=None if before is None else before[here],
                    out=out[here],
                    first=self._sums.first + top * self._row,
                    space=space,
                ),
            )


def _demand_finite(before: torch.Tensor | None, out: torch.Tensor) -> None:
    """Raise where a result is not finite, and say whether that is the base's fault.

    Raises:
        NotFiniteHere: it is not.
    """
    if is_finite(out):
        return
    if before is None or before.data_ptr() != out.data_ptr():
        raise NotFiniteHere(before=before is not None and not all_finite(before))
    wide = out.double()  # the weights are gone: NaN comes of no sum of numbers, and overflow does not come from afar
    near = float(wide[torch.isfinite(wide)].abs().max()) if bool(torch.isfinite(wide).any()) else math.inf
    limit = float(torch.finfo(out.dtype).max)
    raise NotFiniteHere(before=bool(torch.isnan(wide).any()) or near < limit / 1024)


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
    windowed = item.local and not turned
    # a change that multiplies out to a high rank costs less than the product would
    thin = item.delta.multiplied_rank() <= HIGHEST_RANK or not windowed
    low = None
    if len(shape) > 1 and thin:
        low = item.delta.low_rank_for(shape[0 if turned else 1]) if len(shape) == 2 else item.delta.low_rank()
    if low is not None:
        up, down = (low.down.T, low.up.T) if turned else (low.up, low.down)
        return _Part(span.start, span.stop, factors=(up[of_along], down), weight=item.weight * low.scale)
    if not windowed:
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
        sums = self._sums
        untouched = torch.zeros_like(out, dtype=sums.dtype) if before is None else before.to(sums.dtype, copy=True)
        total = untouched.clone()
        rest = []
        for item in self._items:
            if item.weight == 1 and (value := item.delta.replacement()) is not None:
                item.piece.of_parameter.put(total, sums.cast(item.piece.of_delta.of(value)))
            else:
                rest.append(item)
        for item in rest:
            self._add(item, untouched, total)
        sums.mode.round(total, out, sums.name, sums.first)
        added = total.sub_(untouched)
        kept = untouched if before is None or before.dtype == out.dtype else sums.cast(before.to(out.dtype))
        change = Change.of(kept, added, sums.cast(out))
        if not is_finite(out):
            raise NotFiniteHere(before=not all_finite(untouched))
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
