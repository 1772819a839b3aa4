"""Several changes to one target beside each other: inner products, distances, and how far they use the same directions.

What has factors is measured by these (``<s B A, t D C> = s t sum((B^T D) * (A C^T))``), the rest by its elements, a few
lines at a time.  Float64, on whatever one thread this runs on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, TypeAlias

from lorahub.composition.algebra.truncate import singular_values
from lorahub.composition.analysis.comparing import identical
from lorahub.composition.analysis.side_by_side import Found, Side, Unknown, misfit, tiles
from lorahub.deltas.delta import Delta, LowRank
from lorahub.deltas.kind import JSON
from lorahub.lazy import torch

__all__ = ["LeftOut", "Matrix", "Space", "TargetRow", "cosine", "left_out", "target_row"]

Space: TypeAlias = Literal["out", "in"]
"""What a change writes to, or what it reads from."""

Matrix: TypeAlias = tuple[tuple[float, ...], ...]
"""[n, n], symmetric; NaN where nobody can say."""

_CLOSE = 1e-8
"""Squared relative distance below which it is computed from the difference itself: a difference of sums says less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """What was not compared: a target, whose changes, and why."""

    target: str
    adapters: tuple[str, ...]
    reason: str

    def document(self) -> dict[str, JSON]:
        """JSON-ready values."""
        return {"target": self.target, "adapters": list(self.adapters), "reason": self.reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetRow:
    """One target.

    Attributes:
        target: its name.
        kinds: what changes it in each adapter; "" where nothing does.
        gram: inner products of the changes.
        distances: Frobenius norms of their differences; 0 for the same tensors, whatever they come to.
        operators: inner products of ``D D^T`` (out) and ``D^T D`` (in); NaN where a change has no factors.
        chance: what these would come to on average if one of the two were turned at random.
    """

    target: str
    kinds: tuple[str, ...]
    gram: Matrix
    distances: Matrix
    operators: Mapping[Space, Matrix]
    chance: Mapping[Space, Matrix]

    @property
    def shared(self) -> int:
        """How many adapters change it."""
        return sum(bool(kind) for kind in self.kinds)

    def document(self) -> dict[str, JSON]:
        """The row as JSON-ready values."""
        count = range(len(self.kinds))
        return {
            "target": self.target,
            "kinds": list(self.kinds),
            "norms": [
                None if math.isnan(square := self.gram[each][each]) else math.sqrt(max(square, 0.0)) for each in count
            ],
            "cosines": _square(self.gram),
            "overlaps_out": _square(self.operators["out"]),
            "overlaps_in": _square(self.operators["in"]),
        }


def cosine(inner: float, square: float, other: float) -> float | None:
    """From an inner product and two squared norms; None where one of them is zero."""
    product = math.sqrt(max(square, 0.0)) * math.sqrt(max(other, 0.0))
    return max(-1.0, min(1.0, inner / product)) if product else None


def target_row(
    target: str,
    kinds: tuple[str, ...],
    found: Sequence[Found],
    deltas: Sequence[Delta | None],
    factors: Sequence[float],
) -> TargetRow:
    """Measure the changes of one target.

    Args:
        target: its name.
        kinds: what changes it in each adapter; "" where nothing does.
        found: the changes.
        deltas: the same as they came, to tell equal tensors by.
        factors: what each was multiplied with.
    """
    count = len(found)
    gram, out, inner, by_chance, within = (torch.full((count, count), math.nan, dtype=torch.float64) for _ in range(5))
    for one in range(count):
        for other in range(one + 1):
            first, second = found[one], found[other]
            if isinstance(first, Unknown) or isinstance(second, Unknown):
                continue
            if first is None or second is None:
                numbers: Sequence[float] = (0.0,) * 5
            elif first.beside(second) and first.fits == second.fits:
                numbers = _products(first.blocks or (), second.blocks or ())
            else:
                continue
            for matrix, value in zip((gram, out, inner, by_chance, within), numbers, strict=True):
                matrix[one, other] = matrix[other, one] = value
    _elements(gram, found)
    distances = _distances(gram, found)
    for one, other in combinations(range(count), 2):
        first_delta, second_delta = deltas[one], deltas[other]
        if first_delta is None or second_delta is None or factors[one] != factors[other]:
            continue
        if identical(first_delta, second_delta):
            distances[one, other] = distances[other, one] = 0.0
    return TargetRow(
        target=target,
        kinds=kinds,
        gram=_tuples(gram),
        distances=_tuples(distances),
        operators={"out": _tuples(out), "in": _tuples(inner)},
        chance={"out": _tuples(by_chance), "in": _tuples(within)},
    )


def _products(one: Sequence[LowRank], other: Sequence[LowRank]) -> list[float]:
    """Inner products of two changes, of what they write to, and of what they read from, by their factors alone.

    Behind these the last two again as they would be on average with one of the changes turned at random: the product
    of the traces over the dimension.
    """
    total = [0.0] * 5
    for left, right in zip(one, other, strict=True):
        up, other_up = left.up.double() * left.scale, right.up.double() * right.scale
        down, other_down = left.down.double(), right.down.double()
        ups, downs = up.mT @ other_up, down @ other_down.mT
        own = [(up.mT @ up, down @ down.mT), (other_up.mT @ other_up, other_down @ other_down.mT)]
        traces = math.prod(float((each * across).sum()) for each, across in own)
        total[0] += float((ups * downs).sum())
        total[1] += float((own[0][1] @ ups @ own[1][1] * ups).sum())
        total[2] += float((own[0][0] @ downs @ own[1][0] * downs).sum())
        total[3] += traces / up.shape[0]
        total[4] += traces / down.shape[1]
    return total


def _elements(gram: torch.Tensor, found: Sequence[Found]) -> None:
    """Fill in inner products that factors do not tell, from the elements of changes that fit each other."""
    for members in _groups(found):
        sides = [found[each] for each in members]
        missing = [
            (row, column)
            for row, one in enumerate(members)
            for column, other in enumerate(members[: row + 1])
            if math.isnan(float(gram[one, other]))
        ]
        if not missing:
            continue
        needed = sorted({each for pair in missing for each in pair})
        total = torch.zeros(len(needed), len(needed), dtype=torch.float64)
        for tile in tiles([side for each in needed if isinstance(side := sides[each], Side)]):
            total += tile @ tile.mT
        for row, column in missing:
            value = total[needed.index(row), needed.index(column)]
            gram[members[row], members[column]] = gram[members[column], members[row]] = value


def _groups(found: Sequence[Found]) -> list[list[int]]:
    """Numbers of the adapters whose changes fit each other."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, each in enumerate(found):
        if isinstance(each, Side):
            groups.setdefault(each.fits, []).append(number)
    return list(groups.values())


def _distances(gram: torch.Tensor, found: Sequence[Found]) -> torch.Tensor:
    """Norms of all differences; where two changes are almost equal, from the difference itself."""
    squares = gram.diagonal()
    result = (squares[:, None] + squares[None, :] - 2 * gram).clamp_min(0)
    for one, other in combinations(range(len(found)), 2):
        first, second = found[one], found[other]
        near = float(result[one, other]) <= _CLOSE * float(max(squares[one], squares[other]))
        if near and isinstance(first, Side) and isinstance(second, Side):
            result[one, other] = result[other, one] = _apart(first, second)
    return result.sqrt()


def _apart(one: Side, other: Side) -> float:
    """The squared norm of a difference."""
    if not one.beside(other):
        return sum(float((tile[0] - tile[1]).square().sum()) for tile in tiles([one, other]))
    total = 0.0
    for left, right in zip(one.blocks or (), other.blocks or (), strict=True):
        up = torch.cat([left.up.double() * left.scale, right.up.double() * -right.scale], dim=1)
        down = torch.cat([left.down.double(), right.down.double()])
        total += float(singular_values(up, down, 1.0).square().sum())
    return total


def left_out(target: str, names: Sequence[str], found: Sequence[Found]) -> tuple[LeftOut, ...]:
    """What could not be compared: single changes, and pairs that do not fit each other."""
    alone = [
        LeftOut(target=target, adapters=(name,), reason=each.reason)
        for name, each in zip(names, found, strict=True)
        if isinstance(each, Unknown)
    ]
    firsts = [members[0] for members in _groups(found)]
    pairs = [
        LeftOut(
            target=target,
            adapters=(names[one], names[other]),
            reason=misfit([names[one], names[other]], [first, second]),
        )
        for one, other in combinations(firsts, 2)
        if isinstance(first := found[one], Side) and isinstance(second := found[other], Side)
    ]
    return (*alone, *pairs)


def _square(matrix: Matrix) -> list[JSON]:
    """Cosines out of inner products."""
    count = range(len(matrix))
    return [
        [
            None
            if math.isnan(matrix[one][other])
            else cosine(matrix[one][other], matrix[one][one], matrix[other][other])
            for other in count
        ]
        for one in count
    ]


def _tuples(matrix: torch.Tensor) -> Matrix:
    return tuple(tuple(row) for row in matrix.tolist())
