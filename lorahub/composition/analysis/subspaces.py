"""How far the strongest directions of two adapters agree: the measure of the LoRA paper, for every pair of counts.

``phi(A, B, i, j) = ||U_A^i^T U_B^j||_F^2 / min(i, j)`` between the ``i`` strongest singular directions of one change
and the ``j`` strongest of the other (Hu et al., https://arxiv.org/abs/2106.09685, section 7.2, figures 3 and 4).  It is
1 where the smaller space lies in the larger and 0 where they are orthogonal; spaces drawn at random from ``n``
dimensions come to ``max(i, j) / n``.  The directions are those of the whole change, so that they do not depend on how
it is factored, and come from QR of the factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorahub.bases.layout import Target
from lorahub.composition.algebra.gram import directions
from lorahub.composition.analysis.measuring import LeftOut, Space
from lorahub.composition.analysis.side_by_side import Side, Unknown, line_up, misfit
from lorahub.composition.analysis.similarity import Progress, measure
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON
from lorahub.lazy import torch

__all__ = ["Grid", "Subspaces", "phi", "subspaces"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """One space, averaged over targets.

    Attributes:
        phi: [i][j] for the first i + 1 directions of the one and j + 1 of the other; NaN where no target has so many.
        chance: what directions drawn at random would come to.
        counts: how many matrices each is the mean of.
    """

    phi: tuple[tuple[float, ...], ...]
    chance: tuple[tuple[float, ...], ...]
    counts: tuple[tuple[int, ...], ...]

    def document(self) -> dict[str, JSON]:
        """JSON-ready values."""
        return {
            "phi": [[None if math.isnan(value) else value for value in row] for row in self.phi],
            "chance": [[None if math.isnan(value) else value for value in row] for row in self.chance],
            "matrices": [list(row) for row in self.counts],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Subspaces:
    """Two adapters' directions beside each other.

    Attributes:
        names: of the two.
        targets: those that count: both change them, by factors.
        grids: of what they write to, and of what they read from.
        left_out: targets that both change and that do not count.
    """

    names: tuple[str, str]
    targets: tuple[str, ...]
    grids: Mapping[Space, Grid]
    left_out: tuple[LeftOut, ...]

    def document(self) -> dict[str, JSON]:
        """JSON-ready values."""
        return {
            "adapters": list(self.names),
            "targets": list(self.targets),
            "out": self.grids["out"].document(),
            "in": self.grids["in"].document(),
            "left_out": [each.document() for each in self.left_out],
        }


def phi(one: torch.Tensor, other: torch.Tensor, most: int) -> torch.Tensor:
    """The measure for all counts up to ``most``: [i, j] float64.

    Args:
        one: orthonormal columns [n, r], the strongest first.
        other: likewise, of the same length.
        most: directions of either, at most.
    """
    inside = (one[:, :most].mT @ other[:, :most]).square().cumsum(0).cumsum(1)
    rows, columns = (torch.arange(1, size + 1, dtype=torch.float64) for size in inside.shape)
    found: torch.Tensor = (inside / torch.minimum(rows[:, None], columns[None, :])).clamp(max=1.0)
    return found


def subspaces(
    names: tuple[str, str],
    one: Mapping[Target, Delta],
    other: Mapping[Target, Delta],
    *,
    most: int,
    threads: int,
    progress: Progress | None = None,
) -> Subspaces:
    """Compare the directions of two adapters in every target that both change by factors.

    Args:
        names: of the two.
        one: target -> change; asked from several threads.
        other: likewise.
        most: directions of either, at most.
        threads: how many; the result does not depend on it.
        progress: called with (targets done, in all).
    """

    def row(target: Target) -> tuple[str, _Sums | LeftOut]:
        return target.name, _target(target, names, [one[target], other[target]], most)

    rows = measure(set(one) & set(other), row, threads, progress)
    total = _Sums.nothing(most)
    for _, each in rows:
        if isinstance(each, _Sums):
            total.add(each)
    return Subspaces(
        names=names,
        targets=tuple(name for name, each in rows if isinstance(each, _Sums)),
        grids={"out": total.grid(0), "in": total.grid(1)},
        left_out=tuple(each for _, each in rows if isinstance(each, LeftOut)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """Sums over matrices: [2, most, most] of phi, of what chance comes to, and of how many."""

    phi: torch.Tensor
    chance: torch.Tensor
    count: torch.Tensor

    @classmethod
    def nothing(cls, most: int) -> _Sums:
        return cls(*(torch.zeros(2, most, most, dtype=torch.float64) for _ in range(3)))

    def add(self, other: _Sums) -> None:
        self.phi.add_(other.phi)
        self.chance.add_(other.chance)
        self.count.add_(other.count)

    def grid(self, space: int) -> Grid:
        count = self.count[space]
        height, width = (int((count.sum(side) > 0).sum()) for side in (1, 0))
        phi, chance = ((each[space] / count)[:height, :width].tolist() for each in (self.phi, self.chance))
        return Grid(
            phi=tuple(map(tuple, phi)),
            chance=tuple(map(tuple, chance)),
            counts=tuple(tuple(map(int, row)) for row in count[:height, :width].tolist()),
        )


def _target(target: Target, names: tuple[str, str], deltas: Sequence[Delta], most: int) -> _Sums | LeftOut:
    """One target, or why it does not count."""
    first, second = line_up(target, deltas, (1.0, 1.0))
    for name, each in zip(names, (first, second), strict=True):
        if isinstance(each, Unknown) or (isinstance(each, Side) and each.blocks is None):
            kind = each.kind
            return LeftOut(target=target.name, adapters=(name,), reason=f"a change of kind {kind} has no factors here")
    assert isinstance(first, Side) and isinstance(second, Side)  # noqa: PT018 - both change it, see above
    if not first.beside(second) or first.fits != second.fits:
        return LeftOut(target=target.name, adapters=names, reason=misfit(names, (first, second)))
    total = _Sums.nothing(most)
    for left, right in zip(first.blocks or (), second.blocks or (), strict=True):
        for space, (one, other) in enumerate(zip(directions(left), directions(right), strict=True)):
            found = phi(one, other, most)
            rows, columns = found.shape
            place = (space, slice(rows), slice(columns))
            total.phi[place] += found
            larger = torch.maximum(torch.arange(1, rows + 1)[:, None], torch.arange(1, columns + 1)[None, :])
            total.chance[place] += larger.double() / one.shape[0]
            total.count[place] += 1
    return total
