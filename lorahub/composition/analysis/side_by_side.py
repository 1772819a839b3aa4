"""What several adapters do to one target, side by side: as factors where they have them, and element by element.

Elements are given a few lines at a time in float64, so that a change of low rank is never multiplied out as a whole.
A change without factors is computed in windows of rows where its kind can be cut, else once.  What nobody can compute
here is said in words.  Knows no adapters and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TypeAlias, final

from lorahub.bases.layout import Target
from lorahub.deltas.delta import ALL, Delta, LowRank
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.errors import Incompatible, NotLocal
from lorahub.lazy import torch

__all__ = ["Found", "Side", "Unknown", "Weights", "line_up", "misfit", "tiles"]

Weights: TypeAlias = "Callable[[Target], torch.Tensor | None]"
"""The base's weight of a target, [out, in, *k], float64; None where the base has none."""

TILE = 1 << 16
"""Elements of one change that are looked at together: as many as a core's cache holds of a few changes."""

WINDOW = 1 << 21
"""Elements of a change without factors that are computed together, where its kind can be cut."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Side:
    """One adapter's change to the target.

    Attributes:
        kind: of the change.
        shape: of the parameter, or of the matrix its factors make.
        fits: changes with equal ones go together, element by element.
        lines: how many lines of ``width`` elements the parameter has, in the order it is stored.
        width: see there.
        blocks: its factors, ``up`` and ``down`` as they are for the module, one pair for each matrix of a stack; None
            where there are none.
        way: how the stack's matrices are stored; factors of equal ones can be taken together.
        read: lines from one number up to another, [lines, width] float64; not to be written to.
    """

    kind: str
    shape: tuple[int, ...]
    fits: tuple[int, ...]
    lines: int
    width: int
    read: Callable[[int, int], torch.Tensor]
    blocks: tuple[LowRank, ...] | None = None
    way: bool | None = False

    def beside(self, other: Side) -> bool:
        """Whether factors alone tell how the two lie to each other."""
        return self.blocks is not None and other.blocks is not None and self.way == other.way


@dataclass(frozen=True, slots=True)
class Unknown:
    """A change that cannot be computed here, and why."""

    kind: str
    reason: str


Found: TypeAlias = "Side | Unknown | None"
"""A change, or why there is no telling; None where an adapter leaves the target alone."""


def line_up(
    target: Target, deltas: Sequence[Delta | None], factors: Sequence[float], base: Weights | None = None
) -> tuple[Found, ...]:
    """The changes of one target, each times its factor.

    Args:
        target: for what the base has of it.
        deltas: of each adapter; None where it leaves the target alone.
        factors: of each.
        base: the base's weights, for changes that look at them.
    """
    there = [delta for delta in deltas if delta is not None]
    stacked = any(isinstance(delta, ExpertLoRA) for delta in there)
    known = next((shape for delta in there if (shape := _shape(delta)) is not None), None)
    return tuple(
        None if delta is None else _side(target, delta, factor, known, stacked, base)
        for delta, factor in zip(deltas, factors, strict=True)
    )


def tiles(sides: Sequence[Side]) -> Iterator[torch.Tensor]:
    """All elements of changes that fit each other, [n, elements] float64, a tile at a time."""
    step = max(1, TILE // max(sides[0].width, 1))
    for start in range(0, sides[0].lines, step):
        stop = min(start + step, sides[0].lines)
        yield torch.stack([side.read(start, stop).flatten() for side in sides])


def misfit(names: Sequence[str], sides: Sequence[Side]) -> str:
    """Why changes do not go together."""
    unsaid = [name for name, side in zip(names, sides, strict=True) if side.way is None]
    if len(unsaid) == 1 and len({side.shape for side in sides}) == 1:
        return f"nothing says which way round the matrices of {unsaid[0]} are stored"
    told = [f"{name} changes a weight {list(side.shape)}" for name, side in zip(names, sides, strict=True)]
    return f"{', and '.join(told)}: they are for different bases"


def _shape(delta: Delta) -> tuple[int, ...] | None:
    shape = delta.shape()
    if shape is None and (low := delta.low_rank()) is not None:
        return low.up.shape[0], low.down.shape[1]
    return shape


def _side(
    target: Target,
    delta: Delta,
    factor: float,
    known: tuple[int, ...] | None,
    stacked: bool,
    base: Weights | None,
) -> Side | Unknown:
    if isinstance(delta, ExpertLoRA):
        if delta.transposed is None and known is None and base is not None and (weight := base(target)) is not None:
            known = tuple(weight.shape)
        return _stack(delta, factor, known)
    low = delta.low_rank()
    if low is not None:
        shape = delta.shape() or (low.up.shape[0], low.down.shape[1])
        low = LowRank(low.up, low.down, low.scale * factor)
        lines, width = _lines(shape, stacked)
        if (low.up.shape[0], low.down.shape[1]) == (lines, width):
            return Side(
                kind=delta.kind,
                shape=shape,
                fits=(lines, width),
                lines=lines,
                width=width,
                read=_Product((low,), turned=False).read,
                blocks=(low,),
            )
    return _dense(target, delta, factor, known, stacked, base)


def _lines(shape: Sequence[int], stacked: bool) -> tuple[int, int]:
    """How a parameter's elements are cut: by rows; those of a stack of matrices by all their rows."""
    if stacked and len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    return (shape[0], prod(shape[1:])) if shape else (1, 1)


def _stack(delta: ExpertLoRA, factor: float, known: tuple[int, ...] | None) -> Side:
    """Experts; where nothing says which way round they are stored, they go with others of the kind alone."""
    experts, out, _ = delta.up.shape
    inner = delta.down.shape[2]
    ways: dict[tuple[int, ...], bool] = (
        {(experts, out, inner): False, (experts, inner, out): True} if out != inner else {}
    )
    way = delta.transposed if delta.transposed is not None or known is None else ways.get(known)
    turned = way is True
    rows, width = (inner, out) if turned else (out, inner)
    scale = delta.scale * factor
    blocks = tuple(LowRank(delta.up[each], delta.down[each], scale) for each in range(experts))
    return Side(
        kind=delta.kind,
        shape=(experts, rows, width),
        fits=(experts * rows, width) if way is not None else (experts, rows, width),
        lines=experts * rows,
        width=width,
        read=_Product(blocks, turned=turned).read,
        blocks=blocks,
        way=way,
    )


@final
class _Product:
    """Lines of one product of factors, or of several below each other."""

    def __init__(self, blocks: Sequence[LowRank], *, turned: bool) -> None:
        self._blocks, self._turned = blocks, turned
        self._rows = blocks[0].down.shape[1] if turned else blocks[0].up.shape[0]
        self._wide: tuple[int, torch.Tensor, torch.Tensor] | None = None

    def read(self, start: int, stop: int) -> torch.Tensor:
        """See ``Side.read``."""
        found = []
        while start < stop:
            number, row = divmod(start, self._rows)
            end = min(row + stop - start, self._rows)
            up, down = self._factors(number)
            found.append(up[row:end] @ down)
            start += end - row
        return found[0] if len(found) == 1 else torch.cat(found)

    def _factors(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of one matrix in float64, kept until others are asked for."""
        if self._wide is None or self._wide[0] != number:
            each = self._blocks[number]
            up, down = each.up.double() * each.scale, each.down.double()
            self._wide = (number, down.mT, up.mT) if self._turned else (number, up, down)
        return self._wide[1], self._wide[2]


def _dense(
    target: Target,
    delta: Delta,
    factor: float,
    known: tuple[int, ...] | None,
    stacked: bool,
    base: Weights | None,
) -> Side | Unknown:
    """A change without factors, against the base's weight where it looks at that."""
    shape = delta.shape() or known
    looking = not delta.additive or bool(delta.reads)
    weight = base(target) if base is not None and (looking or shape is None) else None
    if weight is None and looking:
        missing = "the base has none of that name" if base is not None else "name the base"
        return Unknown(delta.kind, f"a change of kind {delta.kind} looks at the weight: {missing}")
    if weight is not None and delta.shape() not in (None, tuple(weight.shape)):
        return Unknown(
            delta.kind, f"it changes a weight {list(delta.shape() or ())}, and the base has {list(weight.shape)}"
        )
    shape = tuple(weight.shape) if weight is not None else shape
    if shape is None:
        return Unknown(delta.kind, "its tensors do not tell the weight's shape: name the base")
    siblings: dict[str, torch.Tensor] = {}
    for name in delta.reads:
        value = base(replace(target, parameter=name)) if base is not None else None
        if value is None:
            return Unknown(
                delta.kind, f"a change of kind {delta.kind} looks at the module's {name}, which the base does not have"
            )
        siblings[name] = value
    lines, width = _lines(shape, stacked)
    cut = _Cut(delta, factor, weight, siblings, shape, width)
    try:
        cut.read(0, min(1, lines))
    except Incompatible as error:
        return Unknown(delta.kind, error.message)
    return Side(kind=delta.kind, shape=shape, fits=(lines, width), lines=lines, width=width, read=cut.read)


@final
class _Cut:
    """Lines of a change that has no factors: a window of rows is computed at a time, or all of it at once."""

    def __init__(
        self,
        delta: Delta,
        factor: float,
        weight: torch.Tensor | None,
        siblings: Mapping[str, torch.Tensor],
        shape: tuple[int, ...],
        width: int,
    ) -> None:
        self._delta, self._factor, self._weight, self._siblings = delta, factor, weight, siblings
        self._shape, self._width = shape, width
        self._per = max(1, prod(shape[1:]) // max(width, 1))  # lines of one row
        self._whole = not shape or bool(siblings)
        self._first, self._last = 0, 0
        self._window: torch.Tensor | None = None

    def read(self, start: int, stop: int) -> torch.Tensor:
        """See ``Side.read``."""
        first, last = start // self._per, -(-stop // self._per)
        if self._window is None or first < self._first or last > self._last:
            self._compute(first, last)
        assert self._window is not None  # just computed
        return self._window[start - self._first * self._per : stop - self._first * self._per]

    def _compute(self, first: int, last: int) -> None:
        rows = self._shape[0] if self._shape else 1
        last = min(rows, max(last, first + WINDOW // max(prod(self._shape[1:]), 1)))
        change = None if self._whole else self._part(first, last)
        if change is None:
            self._whole, first, last = True, 0, rows
            weight = torch.zeros(self._shape, dtype=torch.float64) if self._weight is None else self._weight
            change = self._delta.delta(weight, **self._siblings)
        self._first, self._last = first, last
        self._window = (change * self._factor).reshape(-1, self._width)

    def _part(self, first: int, last: int) -> torch.Tensor | None:
        """Some rows of the change, or None where its kind cannot be cut."""
        rows = slice(first, last)
        try:
            part = self._delta.region(rows, ALL)
        except NotLocal:
            return None
        if self._weight is not None:
            return part.delta(self._weight[rows])
        return part.delta(torch.zeros(last - first, *self._shape[1:], dtype=torch.float64))
