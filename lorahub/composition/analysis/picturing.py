"""What comparing adapters found, as heat maps: a number for each pair, for each target, or for each two directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

from lorahub.bases.index import natural
from lorahub.composition.analysis.interference import Interference
from lorahub.composition.analysis.measuring import Space, cosine
from lorahub.composition.analysis.similarity import Similarity
from lorahub.composition.analysis.subspaces import Subspaces
from lorahub.pictures.grid import arrange
from lorahub.pictures.heat_map import HeatMap
from lorahub.pictures.scale import shortened

__all__ = ["PAIRS", "SHOWS", "Show", "conflict_map", "pair_map", "subspace_map", "target_map"]

Show: TypeAlias = Literal["cosine", "overlap-out", "overlap-in", "conflict", "targets", "subspace-out", "subspace-in"]
SHOWS: tuple[Show, ...] = get_args(Show)
"""What a picture can show; the last three are of two adapters."""

PAIRS: tuple[Show, ...] = ("cosine", "overlap-out", "overlap-in", "conflict")
"""Those with a number for each pair."""

_SPACES: dict[Space, str] = {"out": "the spaces written to", "in": "the spaces read from"}


def pair_map(found: Similarity, show: Show) -> HeatMap:
    """Cosines or overlaps of whole adapters."""
    if show == "cosine":
        title = f"cosine of whole adapters, {len(found.rows)} targets"
        return _square(found.names, found.cosine, [1.0 if norm else None for norm in found.norms], "cosine", title)
    space: Space = "out" if show == "overlap-out" else "in"
    title = f"overlap of {_SPACES[space]}, directions counted by their energy"
    own = [
        1.0 if any(row.operators[space][each][each] > 0 for row in found.rows) else None
        for each in range(len(found.names))
    ]
    return _square(found.names, lambda one, other: found.overlap(one, other, space), own, "overlap", title)


def conflict_map(found: Interference) -> HeatMap:
    """The weighted share of opposite signs, which is one half for changes that have nothing to do with each other."""
    title = f"opposite signs, counted by magnitude, {found.elements:,} elements"
    return _square(found.names, found.conflict, [None] * len(found.names), "opposite signs", title)


def subspace_map(found: Subspaces, space: Space) -> HeatMap:
    """The overlap of the strongest directions of two adapters, as in figures 3 and 4 of the LoRA paper."""
    grid = found.grids[space]
    rows = [str(number + 1) for number in range(len(grid.phi))]
    columns = [str(number + 1) for number in range(len(grid.phi[0]) if grid.phi else 0)]
    count = len(found.targets)
    where = f"mean of {count} targets" if count != 1 else found.targets[0]
    return HeatMap(
        title=f"{found.names[0]} and {found.names[1]}",
        subtitle=f"phi: how far {_SPACES[space]} agree, strongest directions first; {where}",
        rows=rows,
        columns=columns,
        values={
            (row, column): value
            for row, line in zip(rows, grid.phi, strict=True)
            for column, value in zip(columns, line, strict=True)
            if not math.isnan(value)
        },
        measure="phi",
        row_title=shortened(found.names[0], 16),
        column_title=shortened(found.names[1], 40),
        low=0.0,
        high=1.0,
    )


def target_map(found: Similarity) -> HeatMap:
    """The cosine of two adapters in every target that both change: layers down, targets across."""
    known = {row.target: row.gram for row in found.rows if row.shared == len(row.kinds)}
    places = arrange([name.removesuffix(".weight") for name in known])
    values: dict[tuple[str, str], float] = {}
    for name, gram in known.items():
        place = places[name.removesuffix(".weight")]
        value = cosine(gram[0][1], gram[0][0], gram[1][1])
        if value is not None and not math.isnan(value):
            values[place.row, place.column] = value
    return HeatMap(
        title=f"{found.names[0]} and {found.names[1]}",
        subtitle=f"cosine of each target that both change; {len(known)} targets",
        rows=sorted({place.row for place in places.values()}, key=natural),
        columns=list(dict.fromkeys(place.column for place in places.values())),
        values=values,
        measure="cosine",
        high=1.0,
    )


def _square(
    names: tuple[str, ...],
    of: Callable[[int, int], float | None],
    diagonal: Sequence[float | None],
    measure: str,
    title: str,
) -> HeatMap:
    values: dict[tuple[str, str], float] = {}
    for one, name in enumerate(names):
        if (own := diagonal[one]) is not None:
            values[name, name] = own
        for other in range(one + 1, len(names)):
            value = of(one, other)
            if value is not None:
                values[name, names[other]] = values[names[other], name] = value
    return HeatMap(
        title=f"{len(names)} adapters",
        subtitle=title,
        rows=names,
        columns=names,
        values=values,
        measure=measure,
        row_title="adapter",
        column_title="adapter",
        dotted=False,
        high=1.0,
    )
