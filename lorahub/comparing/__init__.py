"""Comparing adapters, for scripts: read them, against their base where it is given, then ask ``composition``.

Two are compared target by target by ``diff``.  ``similarity`` takes any number, ``interference`` says what they would
do to each other in a sum, and ``subspace_overlap`` holds the strongest directions of two against each other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from lorahub.adapter import Adapter
from lorahub.adapter import load as load_tensors
from lorahub.bases.layout import Target
from lorahub.comparing.opened import (
    DIRECTIONS,
    TOLERANCE,
    Beside,
    about_names,
    base_weights,
    beside,
    expect_tolerance,
    parts_of,
    read_beside,
)
from lorahub.composition.analysis.comparing import Comparison, compare, compare_parts
from lorahub.composition.analysis.interference_report import InterferenceReport
from lorahub.composition.analysis.similarity import Similarity
from lorahub.composition.analysis.subspaces import Subspaces
from lorahub.deltas.delta import Delta
from lorahub.fetching import Progress, Source, quiet
from lorahub.opening import Base, open_base
from lorahub.plugins import load_registry
from lorahub.registry import Registry
from lorahub.sources import Given

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "DIRECTIONS",
    "TOLERANCE",
    "Beside",
    "Comparison",
    "InterferenceReport",
    "Similarity",
    "Subspaces",
    "beside",
    "diff",
    "interference",
    "similarity",
    "subspace_overlap",
]


def diff(
    one: Given,
    other: Given,
    *,
    base: Source | nn.Module | Base | None = None,
    tolerance: float = TOLERANCE,
    allow: Collection[str] = (),
    hub: str | None = None,
    progress: Progress = quiet,
) -> Comparison:
    """Compare two adapters target by target: norms, relative difference, cosine, principal angles.

    Changes with factors are compared by these, without the matrix they stand for.

    Args:
        one: a folder, a file, a reference, or an open adapter.
        other: likewise.
        base: the base of both, where their formats name modules differently, or a kind looks at the weights.
        tolerance: changes whose difference is at most this share of the larger one count as the same.
        allow: finding codes to accept: what an adapter's reading leaves out is not compared.
        hub: path of a folder hub.
        progress: called with (bytes fetched, in all).

    Raises:
        Degraded, Incompatible, IntegrityError: part of an adapter cannot be read, and so cannot be compared.
    """
    expect_tolerance(tolerance)
    registry = load_registry()
    opened = open_base(base, hub=hub) if base is not None else None
    first, second = (_loaded(each, registry, opened, allow, hub, progress) for each in (one, other))
    with ExitStack() as held:
        targets = {*first.deltas, *second.deltas}
        reads = _reads(each.deltas for each in (first, second))
        weights = held.enter_context(base_weights(opened, targets, reads)) if opened else None
        found = compare(first.deltas, second.deltas, tolerance=tolerance, weights=weights)
    rows = (*found.rows, *compare_parts(*(parts_of(each) for each in (first, second))))
    return replace(found, rows=rows, findings=about_names([first.header, second.header]))


def similarity(
    adapters: Sequence[Given],
    *,
    weights: Sequence[float] | None = None,
    base: Source | nn.Module | Base | None = None,
    tolerance: float = TOLERANCE,
    allow: Collection[str] = (),
    hub: str | None = None,
    threads: int | None = None,
    progress: Progress = quiet,
) -> Similarity:
    """Compare any number of adapters: norms, the cosine of every two, and how far they use the same directions.

    A target that an adapter leaves alone counts as zero.  Nothing of a weight's size is made of changes with factors.

    Args:
        adapters: two or more: folders, files, references, or open adapters.
        weights: of each; those in the references by default, else 1.
        base: the base of all, where their formats name modules differently, or a kind looks at the weights.
        tolerance: changes whose difference is at most this share of the larger one count as the same.
        allow: finding codes to accept: what an adapter's reading leaves out is not compared.
        hub: path of a folder hub.
        threads: how many; the result does not depend on it.
        progress: called with (bytes fetched, in all), then with (targets done, in all).

    Raises:
        Degraded, Incompatible, IntegrityError: part of an adapter cannot be read, and so cannot be compared.
        UsageError: fewer than two adapters, or another number of weights.
    """
    with beside(adapters, weights=weights, base=base, allow=allow, hub=hub, progress=progress) as opened:
        return opened.similarity(tolerance=tolerance, threads=threads, progress=progress)


def interference(
    adapters: Sequence[Given],
    *,
    weights: Sequence[float] | None = None,
    base: Source | nn.Module | Base | None = None,
    tolerance: float = TOLERANCE,
    allow: Collection[str] = (),
    hub: str | None = None,
    threads: int | None = None,
    progress: Progress = quiet,
) -> InterferenceReport:
    """Say what adapters would do to each other in a sum, and which method of composing them suits.

    Every element that two or more of them change is looked at, a tile at a time; none is sampled.

    Args:
        adapters: two or more: folders, files, references, or open adapters.
        weights: as they are to be composed; those in the references by default, else 1.
        base: see ``similarity``.
        tolerance: see ``similarity``.
        allow: finding codes to accept.
        hub: path of a folder hub.
        threads: how many; the result does not depend on it.
        progress: called with (bytes fetched, in all), then with (targets done, in all).

    Raises:
        Degraded, Incompatible, IntegrityError, UsageError: as ``similarity``.
    """
    with beside(adapters, weights=weights, base=base, allow=allow, hub=hub, progress=progress) as opened:
        return opened.interference(tolerance=tolerance, threads=threads, progress=progress)


def subspace_overlap(
    one: Given,
    other: Given,
    *,
    target: str = "*",
    directions: int = DIRECTIONS,
    base: Source | nn.Module | Base | None = None,
    allow: Collection[str] = (),
    hub: str | None = None,
    threads: int | None = None,
    progress: Progress = quiet,
) -> Subspaces:
    """How far the strongest directions of two adapters agree: phi of https://arxiv.org/abs/2106.09685, section 7.2.

    Args:
        one: a folder, a file, a reference, or an open adapter.
        other: likewise.
        target: a target's name, or a pattern with ``*``: the mean over those that match.
        directions: of either adapter, at most.
        base: the base of both, where their formats name modules differently.
        allow: finding codes to accept.
        hub: path of a folder hub.
        threads: how many; the result does not depend on it.
        progress: called with (bytes fetched, in all), then with (targets done, in all).

    Raises:
        Degraded, Incompatible, IntegrityError: part of an adapter cannot be read, and so cannot be compared.
        UsageError: no target matches, or no directions are asked for.
    """
    with beside([one, other], base=base, allow=allow, hub=hub, progress=progress) as opened:
        return opened.subspaces(target=target, directions=directions, threads=threads, progress=progress)


def _loaded(
    source: Given,
    registry: Registry,
    base: Base | None,
    allow: Collection[str],
    hub: str | None,
    progress: Progress,
) -> Adapter:
    if isinstance(source, Adapter) and (base is None or source.header is None):
        return source
    header, deltas = read_beside(source, registry, base, allow, hub, progress)
    adapter = load_tensors(header, registry)
    return replace(adapter, deltas=deltas(adapter.deltas))


def _reads(adapters: Iterable[Mapping[Target, Delta]]) -> set[Target]:
    """Siblings that changes look at."""
    return {
        replace(target, parameter=name)
        for deltas in adapters
        for target, delta in deltas.items()
        for name in delta.reads
    }
