"""How alike several adapters are: cosines of the whole adapters, target by target and over all of them.

A target that an adapter leaves alone counts as zero; one that nobody can
compute here is left out of the pairs it would be in, and named.

The overlap of two adapters says how far they write to, or read from, the same directions, each counted by its energy:
the cosine between the operators ``D D^T`` (out) or ``D^T D`` (in) of the two, with all targets as one block matrix.  It
is 1 for equal directions of equal strengths and 0 for orthogonal spaces.  Float64, the same for any number of threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TypeAlias, TypeVar

from lorahub.bases.index import natural
from lorahub.bases.layout import Target
from lorahub.composition.analysis.measuring import LeftOut, Matrix, Space, TargetRow, cosine, left_out, target_row
from lorahub.composition.analysis.side_by_side import Weights, line_up
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON
from lorahub.engine.crew import Job, Workspace, run_jobs

__all__ = ["Progress", "Similarity", "measure", "similarity"]

Row = TypeVar("Row")

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (targets done, in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarity:
    """Several adapters beside each other.

    Attributes:
        names: of the adapters, each its own.
        factors: what each was multiplied with.
        rows: every target of any, in natural order.
        left_out: what could not be compared.
        tolerance: the relative difference up to which changes count as the same.
        apart: pairs that differ in what is no weight change, by number.
    """

    names: tuple[str, ...]
    factors: tuple[float, ...]
    rows: tuple[TargetRow, ...]
    left_out: tuple[LeftOut, ...] = ()
    tolerance: float = 0.0
    apart: frozenset[tuple[int, int]] = field(default_factory=frozenset)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All pairs of adapters, by number."""
        return list(combinations(range(len(self.names)), 2))

    @property
    def norms(self) -> tuple[float | None, ...]:
        """Frobenius norm of each adapter, over all targets that could be computed; None where none could."""
        squares = [
            _known(row.gram[each][each] for row in self.rows if row.kinds[each]) for each in range(len(self.names))
        ]
        targets = [sum(bool(row.kinds[each]) for row in self.rows) for each in range(len(self.names))]
        return tuple(
            math.sqrt(max(math.fsum(each), 0.0)) if each or not count else None
            for each, count in zip(squares, targets, strict=True)
        )

    def gram(self, one: int, other: int) -> tuple[float, float, float]:
        """(inner product, squared norm of the one, of the other), over all targets where both are known."""
        return _whole([row.gram for row in self.rows], one, other)

    def cosine(self, one: int, other: int) -> float | None:
        """Of the angle between two whole adapters; None where one of them is zero or nothing could be compared."""
        return cosine(*self.gram(one, other))

    def overlap(self, one: int, other: int, space: Space) -> float | None:
        """How far two whole adapters use the same directions, 0 to 1; None where they have no factors."""
        return cosine(*_whole([row.operators[space] for row in self.rows], one, other))

    def chance(self, one: int, other: int, space: Space) -> float | None:
        """The overlap that directions drawn at random, with these energies, would come to on average."""
        _, square, other_square = _whole([row.operators[space] for row in self.rows], one, other)
        expected = math.fsum(_known(row.chance[space][one][other] for row in self.rows))
        return cosine(expected, square, other_square)

    def difference(self, one: int, other: int) -> float | None:
        """The norm of the one minus the other as a share of the larger norm, over targets where both are known."""
        known = _known(row.distances[one][other] for row in self.rows if row.kinds[one] or row.kinds[other])
        _, square, other_square = self.gram(one, other)
        larger = math.sqrt(max(square, other_square, 0.0))
        apart = math.sqrt(math.fsum(value**2 for value in known))
        return None if self.rows and not known else apart / larger if larger else 0.0

    def shared(self, one: int, other: int) -> int:
        """How many targets both change."""
        return sum(bool(row.kinds[one] and row.kinds[other]) for row in self.rows)

    def same(self, one: int, other: int) -> bool:
        """Whether two adapters are the same within the tolerance in every target, and in what is no weight change."""
        return (one, other) not in self.apart and all(_same(row, one, other, self.tolerance) for row in self.rows)

    @property
    def equal(self) -> bool:
        """Whether all adapters are the same: nothing differs, is missing or was left uncompared."""
        return all(self.same(one, other) for one, other in self.pairs)

    def matrix(self, of: Callable[[int, int], float | None], diagonal: float | None) -> list[JSON]:
        """A number for each pair as a symmetric matrix."""
        count = range(len(self.names))
        found = {pair: of(*pair) for pair in self.pairs}
        return [
            [diagonal if one == other else found[min(one, other), max(one, other)] for other in count] for one in count
        ]

    def document(self) -> dict[str, JSON]:
        """The comparison as JSON-ready values."""
        return {
            "equal": self.equal,
            "tolerance": self.tolerance,
            "norms": list(self.norms),
            "cosines": self.matrix(self.cosine, 1.0),
            "relative_differences": self.matrix(self.difference, 0.0),
            "overlaps_out": self.matrix(lambda one, other: self.overlap(one, other, "out"), 1.0),
            "overlaps_in": self.matrix(lambda one, other: self.overlap(one, other, "in"), 1.0),
            "chance_out": self.matrix(lambda one, other: self.chance(one, other, "out"), None),
            "chance_in": self.matrix(lambda one, other: self.chance(one, other, "in"), None),
            "shared": self.matrix(self.shared, None),
            "targets": len(self.rows),
            "left_out": [each.document() for each in self.left_out],
            "rows": [row.document() for row in self.rows],
        }


def similarity(
    names: Sequence[str],
    adapters: Sequence[Mapping[Target, Delta]],
    *,
    factors: Sequence[float],
    tolerance: float,
    threads: int,
    base: Weights | None = None,
    progress: Progress | None = None,
) -> Similarity:
    """Compare several adapters.

    Args:
        names: of the adapters, each its own.
        adapters: target -> change, under the same names; asked from several threads.
        factors: what each adapter is multiplied with.
        tolerance: the relative difference up to which changes count as the same.
        threads: how many; the result does not depend on it.
        base: the base's weights, for changes that look at them; asked from several threads.
        progress: called with (targets done, in all).
    """

    def one(target: Target) -> tuple[TargetRow, tuple[LeftOut, ...]]:
        deltas = [adapter.get(target) for adapter in adapters]
        found = line_up(target, deltas, factors, base)
        kinds = tuple(delta.kind if delta is not None else "" for delta in deltas)
        return target_row(target.name, kinds, found, deltas, factors), left_out(target.name, names, found)

    rows = measure({target for each in adapters for target in each}, one, threads, progress)
    return Similarity(
        names=tuple(names),
        factors=tuple(factors),
        rows=tuple(row for row, _ in rows),
        left_out=tuple(each for _, some in rows for each in some),
        tolerance=tolerance,
    )


def measure(
    targets: Collection[Target],
    one: Callable[[Target], Row],
    threads: int,
    progress: Progress | None = None,
) -> list[Row]:
    """A row for every target, in natural order, on several threads."""
    order = sorted(targets, key=lambda target: natural(target.name))
    done: dict[Target, Row] = {}
    lock = threading.Lock()

    def job(target: Target) -> Job:
        def run(_: Workspace) -> None:
            row = one(target)
            with lock:
                done[target] = row

        return run

    def tick() -> None:
        if progress:
            progress(len(done), len(order))

    run_jobs([job(target) for target in order], threads, tick=tick)
    return [done[target] for target in order]


def _same(row: TargetRow, one: int, other: int, tolerance: float) -> bool:
    apart = row.distances[one][other]
    larger = math.sqrt(max(row.gram[one][one], row.gram[other][other], 0.0)) if apart else 0.0
    return bool(row.kinds[one]) == bool(row.kinds[other]) and apart <= tolerance * larger


def _whole(matrices: Sequence[Matrix], one: int, other: int) -> tuple[float, float, float]:
    """Sums over all targets where a pair is known: of the pair, of the one with itself, of the other with itself."""
    places = ((one, other), (one, one), (other, other))
    values = [[each[row][column] for row, column in places] for each in matrices]
    known = [each for each in values if not any(map(math.isnan, each))]
    inner, square, other_square = (math.fsum(each[place] for each in known) for place in range(3))
    return inner, square, other_square


def _known(values: Iterable[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]
