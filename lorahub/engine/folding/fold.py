"""One step of a plan, executed unit by unit: the same bits from every engine, in every order, on every thread.

Cuts a stored parameter into planes (one, or one for each expert) and units (what is read, folded and written at a
time), as follows from step and deltas alone.  The arithmetic is in ``planes``; knows no files and no models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

from lorahub.engine.crew import Workspace
from lorahub.engine.folding.planes import Noted, Plane, Rows, Whole
from lorahub.engine.folding.recipes import Launching
from lorahub.engine.folding.sums import Change, Ingredient, NotFiniteHere, Sums, all_finite
from lorahub.engine.folding.windows import UNIT, gather
from lorahub.engine.planning.steps import Step
from lorahub.engine.rounding.fast import FAST
from lorahub.engine.rounding.mode import Mode
from lorahub.errors import NotFinite
from lorahub.files.dtypes import to_torch, torch_shape
from lorahub.lazy import torch

__all__ = ["Change", "Fold", "Ingredient", "Unit", "with_rows"]


@dataclass(frozen=True, slots=True)
class Unit:
    """Some rows of a stored parameter (its axis 0), folded at a time.

    Attributes:
        rows: which.
        plane: what they belong to.
        windows: the part of the plane.
        inner: the plane lies within the one row: one expert of many, or a single number.
    """

    rows: slice
    plane: Plane
    windows: tuple[slice, ...]
    inner: bool = False


def with_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A view of ``tensor`` that has an axis 0, also where it is a single number."""
    return tensor if tensor.dim() else tensor.unsqueeze(0)


@final
class Fold:
    """One step, made ready: ``units`` cover the stored parameter's rows once, in order.

    Building a fold computes with factors, so it is done in the thread that runs it.
    """

    def __init__(
        self,
        step: Step,
        items: Sequence[Ingredient],
        device: torch.device | None = None,
        mode: Mode = FAST,
        *,
        streamed: bool = False,
    ) -> None:
        """Cut a step into units.

        Args:
            step: of a plan.
            items: what is added, in the step's order.
            device: where it is computed; the CPU by default.
            mode: how sums are made and rounded.
            streamed: units pass through the memory of the CPU, and are as large as they would be there.
        """
        self._step, self._items = step, items
        self._sums = Sums(to_torch(step.after.dtype), device or torch.device("cpu"), mode, step.out)
        if streamed:
            self._sums = replace(self._sums, at_most=UNIT)
        self.units = tuple(self._cut(torch_shape(step.after.dtype, step.after.shape)))

    def run(self, unit: Unit, before: torch.Tensor | None, out: torch.Tensor, space: Workspace) -> Change:
        """Fold the rows of one of ``units``.

        Args:
            unit: which.
            before: these rows of the untouched parameter, as stored; None where a parameter is created.
            out: where the result goes, as it will be stored; may be the memory of ``before``.
            space: scratch memory.

        Raises:
            NotFinite: the result would hold NaN or infinity; names parameter and adapter.  ``out`` is then undefined.
            NotLocal: a delta would have to be cut in a way it cannot be.
        """
        if unit.inner:
            before, out = None if before is None else before[0], out[0]
        try:
            return unit.plane.run(unit.windows, before, out, space)
        except NotFiniteHere as fault:
            raise self.not_finite(before=fault.before) from None

    def run_noting(self, unit: Unit, before: torch.Tensor, out: torch.Tensor, space: Workspace) -> Noted | None:
        """As ``run``, with the way back noted in the same pass; None, with nothing done, where that cannot be.

        Results that are not finite are written and noted like others: see ``Noted.finite`` and ``not_finite``.
        """
        if not isinstance(unit.plane, Rows):
            return None
        return unit.plane.run_noting(unit.windows, *_inside(unit, before, out), space)

    def launching(
        self, unit: Unit, before: torch.Tensor, out: torch.Tensor, saved: torch.Tensor | None
    ) -> list[Launching] | None:
        """A unit made ready for one launch of its device's kernel with others; see ``Rows.launching``."""
        if not isinstance(unit.plane, Rows):
            return None
        aside = None if saved is None else _inside(unit, saved, saved)[0]
        return unit.plane.launching(unit.windows, *_inside(unit, before, out), aside)

    def put(self, unit: Unit, before: torch.Tensor, out: torch.Tensor, space: Workspace, *, sign: float = 1.0) -> None:
        """Do ``sign`` times what ``run_noting`` did to a unit, as it did it, and look at nothing."""
        assert isinstance(unit.plane, Rows)
        unit.plane.put(unit.windows, *_inside(unit, before, out), space, sign)

    def operands(self, unit: Unit, rows: torch.Tensor, *, sign: float = 1.0) -> list[torch.Tensor]:
        """What ``put`` reads for a unit on the CPU besides its ``rows``: the same bits in both give the same bits."""
        assert isinstance(unit.plane, Rows)
        return unit.plane.operands(unit.windows, _inside(unit, rows, rows)[0], sign)

    def _cut(self, shape: tuple[int, ...]) -> Iterable[Unit]:
        if not shape:
            yield Unit(slice(0, 1), plane := Whole(shape, self._items, self._sums), plane.windows, inner=True)
            return
        if any(item.piece.of_parameter.expert is not None for item in self._items):
            yield from self._by_expert(shape)
            return
        rows = Rows.of(shape, self._items, self._sums)
        if rows is None:
            yield Unit(slice(0, shape[0]), plane := Whole(shape, self._items, self._sums), plane.windows)
            return
        for windows in gather(rows.windows, self._sums.storage.itemsize * math.prod(shape[1:]), unit=self._sums.unit):
            yield Unit(slice(windows[0].start, windows[-1].stop), rows, windows)

    def _by_expert(self, shape: tuple[int, ...]) -> Iterable[Unit]:
        of: dict[int | None, list[Ingredient]] = {}
        for item in self._items:
            of.setdefault(item.piece.of_parameter.expert, []).append(_within_expert(item))
        if None in of:  # something that touches all experts at once
            yield Unit(slice(0, shape[0]), plane := Whole(shape, self._items, self._sums), plane.windows)
            return
        for expert in range(shape[0]):
            items = of.get(expert, ())
            sums = replace(self._sums, first=expert * math.prod(shape[1:]))
            one: Plane = Rows.of(shape[1:], items, sums) or Whole(shape[1:], items, sums)
            yield Unit(slice(expert, expert + 1), one, one.windows, inner=True)

    def not_finite(self, *, before: bool) -> NotFinite:
        """The error that says whose fault NaN or infinity is; ``before``: the base had them."""
        name = self._step.out
        broken = [item.adapter for item in self._items if not all(map(all_finite, item.delta.tensors().values()))]
        if broken:
            return NotFinite(f"the tensors that adapter '{broken[0]}' brings for {name} hold NaN or infinity")
        if before:
            return NotFinite(f"{name} of the base holds NaN or infinity before anything is merged")
        who = " and ".join(dict.fromkeys(f"'{item.adapter}' at {item.weight:g}" for item in self._items))
        most = torch.finfo(self._sums.storage).max
        return NotFinite(
            f"merging {who} takes {name} beyond {most:g}, the largest number that {self._step.after.dtype} can hold",
            "merge with a smaller weight, or into a base stored as BF16 or F32",
        )


def _inside(unit: Unit, before: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (before[0], out[0]) if unit.inner else (before, out)


def _within_expert(item: Ingredient) -> Ingredient:
    return replace(item, piece=replace(item.piece, of_parameter=replace(item.piece.of_parameter, expert=None)))
