"""What would get in each other's way if adapters were added: opposite signs and magnitude that cancels.

Every element of every target that two or more adapters change is looked at, none is sampled: a tile at a time in
float64, so that no change of low rank is ever there as a whole.  With ``a`` and ``b`` the elements of two changes,

    conflict   sum of |a b| where the signs are opposite, over the sum of |a b|: 0 where all signs agree, 1 where none
               does, and one half for changes that have nothing to do with each other
    count      the plain share of elements with opposite signs, of those where neither is zero
    cancelled  1 - sum |a + b + ...| / sum (|a| + |b| + ...): what the sum loses of all magnitude

Pairs come from two products of a tile with itself, one with signs and one without, so that their cost hardly grows with
the number of adapters.  The same for any number of threads.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lorahub.bases.layout import Target
from lorahub.composition.analysis.side_by_side import Side, Weights, line_up, tiles
from lorahub.composition.analysis.similarity import Progress, measure
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON
from lorahub.lazy import torch

__all__ = ["Interference", "Signs", "interference"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Signs:
    """One target's sums over all elements, for each pair of adapters [n][n]; 0 where a pair does not share it.

    Attributes:
        target: its name.
        elements: how many there are.
        agreeing: sum of |a b| where the signs agree.
        opposite: the same where they are opposite.
        agree: how many elements have the same sign.
        differ: how many have opposite signs.
        magnitude: sum of |a| + |b| + ... over the adapters that change it.
        left: sum of |a + b + ...|.
        expected: about what would be left if the changes had nothing to do with each other.
    """

    target: str
    elements: int
    agreeing: tuple[tuple[float, ...], ...]
    opposite: tuple[tuple[float, ...], ...]
    agree: tuple[tuple[float, ...], ...]
    differ: tuple[tuple[float, ...], ...]
    magnitude: float
    left: float
    expected: float

    def document(self) -> dict[str, JSON]:
        """The target as JSON-ready values."""
        count = range(len(self.agreeing))

        def shares(opposite: tuple[tuple[float, ...], ...], agreeing: tuple[tuple[float, ...], ...]) -> list[JSON]:
            return [
                [
                    None if one == other else _share(opposite[one][other], agreeing[one][other] + opposite[one][other])
                    for other in count
                ]
                for one in count
            ]

        return {
            "target": self.target,
            "elements": self.elements,
            "conflicts": shares(self.opposite, self.agreeing),
            "counts": shares(self.differ, self.agree),
            "cancelled": _share(self.magnitude - self.left, self.magnitude),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Interference:
    """What adapters would do to each other in a sum.

    Attributes:
        names: of the adapters, each its own.
        rows: targets that two or more change, and whose changes could be computed and fit each other.
    """

    names: tuple[str, ...]
    rows: tuple[Signs, ...]

    @property
    def elements(self) -> int:
        """How many elements were looked at."""
        return sum(row.elements for row in self.rows)

    def conflict(self, one: int, other: int) -> float | None:
        """The share of opposite signs, each element counted by the product of magnitudes; None without any."""
        return self._of(one, other, lambda row: row.opposite, lambda row: row.agreeing)

    def count(self, one: int, other: int) -> float | None:
        """The plain share of opposite signs; None where no element is changed by both."""
        return self._of(one, other, lambda row: row.differ, lambda row: row.agree)

    @property
    def cancelled(self) -> float | None:
        """The share of all magnitude that the sum of all adapters loses in the targets they share."""
        total = math.fsum(row.magnitude for row in self.rows)
        return _share(total - math.fsum(row.left for row in self.rows), total)

    @property
    def expected(self) -> float | None:
        """About what the sum would lose if these changes had nothing to do with each other: no less is to be had."""
        total = math.fsum(row.magnitude for row in self.rows)
        return _share(total - math.fsum(row.expected for row in self.rows), total)

    def _of(
        self,
        one: int,
        other: int,
        share: Callable[[Signs], tuple[tuple[float, ...], ...]],
        rest: Callable[[Signs], tuple[tuple[float, ...], ...]],
    ) -> float | None:
        found = math.fsum(share(row)[one][other] for row in self.rows)
        return _share(found, found + math.fsum(rest(row)[one][other] for row in self.rows))


def interference(
    names: Sequence[str],
    adapters: Sequence[Mapping[Target, Delta]],
    *,
    factors: Sequence[float],
    threads: int,
    base: Weights | None = None,
    progress: Progress | None = None,
) -> Interference:
    """Look at every element that two or more adapters change.

    Args:
        names: of the adapters, each its own.
        adapters: target -> change, under the same names; asked from several threads.
        factors: what each adapter is multiplied with.
        threads: how many; the result does not depend on it.
        base: the base's weights, for changes that look at them; asked from several threads.
        progress: called with (targets done, in all).
    """

    def row(target: Target) -> Signs | None:
        found = line_up(target, [adapter.get(target) for adapter in adapters], factors, base)
        return _signs(target.name, {number: each for number, each in enumerate(found) if isinstance(each, Side)}, found)

    counts = Counter(target for each in adapters for target in each)
    rows = measure([target for target, count in counts.items() if count > 1], row, threads, progress)
    return Interference(names=tuple(names), rows=tuple(each for each in rows if each is not None))


def _signs(target: str, sides: Mapping[int, Side], every: Sequence[object]) -> Signs | None:
    """The sums of one target, over those changes that fit each other; None where no two do."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, side in sides.items():
        groups.setdefault(side.fits, []).append(number)
    count = len(every)
    plain, absolute, signs, both = (torch.zeros(count, count, dtype=torch.float64) for _ in range(4))
    elements, magnitude, left, expected = 0, 0.0, 0.0, 0.0
    for members in groups.values():
        if len(members) < 2:
            continue
        chosen = [sides[each] for each in members]
        sums = [torch.zeros(len(members), len(members), dtype=torch.float64) for _ in range(4)]
        sizes = torch.zeros(len(members), dtype=torch.float64)
        for tile in tiles(chosen):
            sums[0] += tile @ tile.mT
            sign = tile.sign()
            sums[2] += sign @ sign.mT
            left += float(tile.sum(0).abs_().sum())
            size = tile.abs_()
            sums[1] += size @ size.mT
            sizes += size.sum(1)
            sign = sign.abs_()
            sums[3] += sign @ sign.mT
        elements += chosen[0].lines * chosen[0].width
        magnitude += float(sizes.sum())
        expected += float(sizes.norm())  # as norms of orthogonal vectors add up
        place = torch.tensor(members)
        for into, each in zip((plain, absolute, signs, both), sums, strict=True):
            into[place[:, None], place[None, :]] = each
    if not elements:
        return None
    return Signs(
        target=target,
        elements=elements,
        agreeing=_pairs((absolute + plain) / 2),
        opposite=_pairs((absolute - plain) / 2),
        agree=_pairs((both + signs) / 2),
        differ=_pairs((both - signs) / 2),
        magnitude=magnitude,
        left=left,
        expected=expected,
    )


def _pairs(matrix: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    """Sums of pairs, of which both orders are rounded alike."""
    return tuple(tuple(row) for row in ((matrix + matrix.mT) / 2).clamp_min(0).tolist())


def _share(part: float, whole: float) -> float | None:
    return min(1.0, max(0.0, part / whole)) if whole else None
