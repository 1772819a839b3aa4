"""Several adapters, open beside each other: read as they are asked for, against their base where it is given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, final

from lorahub import checks
from lorahub.adapter import Adapter, AdapterHeader, open_deltas
from lorahub.bases.layout import Target
from lorahub.comparing.naming import label_of, names_of
from lorahub.composition.analysis import interference as signs
from lorahub.composition.analysis import similarity as alike
from lorahub.composition.analysis import subspaces
from lorahub.composition.analysis.comparing import Weights, compare_parts
from lorahub.composition.analysis.interference_report import InterferenceReport
from lorahub.composition.analysis.similarity import Similarity
from lorahub.composition.analysis.subspaces import Subspaces
from lorahub.composition.together import together
from lorahub.conversion.settled import settled
from lorahub.conversion.translate import TRANSLATED
from lorahub.conversion.weights import BaseWeights
from lorahub.deltas.delta import Delta
from lorahub.engine.crew import crew_size
from lorahub.errors import UsageError
from lorahub.fetching import Progress, Source, as_ref, quiet
from lorahub.files.tensors import DictSource, FileSource
from lorahub.findings import Finding, Verdict
from lorahub.lazy import torch
from lorahub.names import did_you_mean, matches
from lorahub.opening import Base, open_base
from lorahub.plugins import load_registry
from lorahub.registry import Registry
from lorahub.sources import Given, header_of
from lorahub.weights import finite, for_each

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "DIRECTIONS",
    "TOLERANCE",
    "Beside",
    "about_names",
    "base_weights",
    "beside",
    "expect_tolerance",
    "parts_of",
    "read_beside",
]

TOLERANCE = 1e-6
"""Relative difference up to which changes count as the same."""

DIRECTIONS = 16
"""Directions of either adapter that are compared, at most."""


_SPELLING = "where their formats name modules differently, name the base, whose names count then: --base BASE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Several adapters, open beside each other.

    Attributes:
        names: each its own.
        labels: what they were asked for by.
        factors: their weights.
        deltas: of each, read when they are asked for.
        headers: of each; None for one that lies in no folder.
        apart: pairs that differ in what is no weight change.
        findings: what there is to say of them together; none of it stops a comparison.
        base: the base's weights, or None.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    factors: tuple[float, ...]
    deltas: tuple[Mapping[Target, Delta], ...]
    headers: tuple[AdapterHeader | None, ...]
    apart: frozenset[tuple[int, int]]
    findings: tuple[Finding, ...]
    base: Weights | None

    def similarity(self, *, tolerance: float = TOLERANCE, threads: int | None, progress: Progress) -> Similarity:
        """See ``lorahub.similarity``."""
        expect_tolerance(tolerance)
        found = alike.similarity(
            self.names,
            self.deltas,
            factors=self.factors,
            tolerance=tolerance,
            threads=crew_size(threads),
            base=self.base,
            progress=progress,
        )
        return replace(found, apart=self.apart)

    def interference(
        self, *, tolerance: float = TOLERANCE, threads: int | None, progress: Progress
    ) -> InterferenceReport:
        """See ``lorahub.interference``."""
        found = self.similarity(tolerance=tolerance, threads=threads, progress=quiet)
        elements = signs.interference(
            self.names,
            self.deltas,
            factors=self.factors,
            threads=crew_size(threads),
            base=self.base,
            progress=progress,
        )
        return InterferenceReport(similarity=found, signs=elements)

    def subspaces(self, *, target: str, directions: int, threads: int | None, progress: Progress) -> Subspaces:
        """See ``lorahub.subspace_overlap``."""
        if len(self.names) != 2:
            raise UsageError(f"directions are compared of two adapters, and these are {len(self.names)}")
        if directions < 1:
            raise UsageError(f"{directions} directions are none", "give 1 or more")
        wanted = [
            {each for each in deltas if matches(target, each.name) or target == each.name} for deltas in self.deltas
        ]
        if not wanted[0] & wanted[1]:
            known = {each.name for each in self.deltas[0]} & {each.name for each in self.deltas[1]}
            if not known:
                raise UsageError("the two change no target in common", _SPELLING)
            raise UsageError(
                f"no target that both change is called '{target}'.{did_you_mean(target, known)}",
                f"take one of {len(known)}, as {min(known)}, or a pattern: --target '*.q_proj.weight'",
            )
        return subspaces.subspaces(
            (self.names[0], self.names[1]),
            _Only(self.deltas[0], wanted[0]),
            _Only(self.deltas[1], wanted[1]),
            most=directions,
            threads=crew_size(threads),
            progress=progress,
        )


@final
class _Only(Mapping[Target, Delta]):
    """Some targets of an adapter, still read when they are asked for."""

    def __init__(self, deltas: Mapping[Target, Delta], targets: Collection[Target]) -> None:
        self._deltas, self._targets = deltas, targets

    def __getitem__(self, target: Target) -> Delta:
        if target not in self._targets:
            raise KeyError(target)
        return self._deltas[target]

    def __iter__(self) -> Iterator[Target]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


@contextmanager
def beside(
    adapters: Sequence[Given],
    *,
    weights: Sequence[float] | None = None,
    base: Source | nn.Module | Base | None = None,
    allow: Collection[str] = (),
    hub: str | None = None,
    progress: Progress = quiet,
) -> Iterator[Beside]:
    """Open adapters beside each other; their tensors are read as they are asked for.

    Args:
        adapters: two or more.
        weights: see ``similarity``.
        base: see ``similarity``.
        allow: finding codes to accept.
        hub: path of a folder hub.
        progress: called with (bytes fetched, in all).

    Raises:
        Degraded, Incompatible, IntegrityError: part of an adapter cannot be read.
        UsageError: fewer than two adapters, or another number of weights.
    """
    if len(adapters) < 2:
        raise UsageError(f"{len(adapters)} adapter cannot be compared", "give two or more")
    factors = _factors(adapters, weights)
    registry = load_registry()
    opened = open_base(base, hub=hub) if base is not None else None
    with ExitStack() as held:
        headers: list[AdapterHeader | None] = []
        parts: list[dict[str, tuple[str, str | None]]] = []
        deltas: list[Mapping[Target, Delta]] = []
        for each in adapters:
            if isinstance(each, Adapter) and (opened is None or each.header is None):
                headers.append(each.header)
                deltas.append(each.deltas)
                parts.append(parts_of(each))
                continue
            header, there = read_beside(each, registry, opened, allow, hub, progress)
            headers.append(header)
            parts.append(parts_of_header(header))
            deltas.append(there(held.enter_context(open_deltas(header, registry)).deltas))
        targets = {target for each in deltas for target in each}
        around = {replace(target, parameter=name) for target in targets for name in ("weight", "bias")}
        yield Beside(
            names=names_of(adapters),
            labels=tuple(label_of(each, number) for number, each in enumerate(adapters)),
            factors=factors,
            deltas=tuple(deltas),
            headers=tuple(headers),
            apart=frozenset(
                (one, other)
                for one, other in combinations(range(len(parts)), 2)
                if not _alike(parts[one], parts[other])
            ),
            findings=(*_together([header for header in headers if header is not None]), *about_names(headers)),
            base=_locked(held.enter_context(base_weights(opened, targets, around))) if opened else None,
        )


def read_beside(
    source: Given,
    registry: Registry,
    base: Base | None,
    allow: Collection[str],
    hub: str | None,
    progress: Progress,
) -> tuple[AdapterHeader, Callable[[Mapping[Target, Delta]], Mapping[Target, Delta]]]:
    """An adapter's header, under the base's names where there is one, and what brings its deltas under them.

    Raises:
        Degraded, Incompatible, IntegrityError: part of it cannot be read.
    """
    header = header_of(source, registry, hub=hub, progress=progress, index=base.index if base else None)
    if base is None:
        checks.refuse(header.findings, allowed=allow, subject=header.label)
        return header, lambda deltas: deltas
    home = settled(header, base.index, base.framework, registry.kinds)
    checks.refuse(home.header.findings, allowed=allow, subject=header.label)
    return home.header, home.deltas


def about_names(headers: Sequence[AdapterHeader | None]) -> tuple[Finding, ...]:
    """What there is to say of modules that adapters call otherwise than their base does."""
    noted = (each for header in headers if header for each in header.findings if each.code == TRANSLATED)
    return tuple(dict.fromkeys(noted))


def _factors(adapters: Sequence[Given], weights: float | Sequence[float] | None) -> tuple[float, ...]:
    """What each adapter is multiplied with."""
    if weights is not None:
        found = for_each(weights, len(adapters))
        if isinstance(found, Mapping):
            raise UsageError("adapters have no names here", "give a number for all, or a list with one for each")
        return tuple(finite(weight, whose=f"adapter {place}") for place, weight in enumerate(found, start=1))
    given = [None if isinstance(each, Adapter | AdapterHeader) else as_ref(each).weight for each in adapters]
    return tuple(1.0 if weight is None else weight for weight in given)


def _together(headers: Sequence[AdapterHeader]) -> tuple[Finding, ...]:
    """What makes a comparison say less than it seems to; it stops nothing."""
    remedies = {"bases-differ": "numbers between them mean little", "nothing-shared": _SPELLING}
    return tuple(
        replace(each, level=Verdict.UNVERIFIED, remedy=remedies[each.code], allowable=False)
        for each in together(headers)
        if each.code in remedies
    )


def _alike(one: Mapping[str, tuple[str, str | None]], other: Mapping[str, tuple[str, str | None]]) -> bool:
    return all(row.state == "equal" for row in compare_parts(one, other))


def expect_tolerance(tolerance: float) -> None:
    """Refuse a tolerance that is no share.

    Raises:
        UsageError: it is below 0, or not below 1.
    """
    if not 0 <= tolerance < 1:
        raise UsageError(f"a tolerance of {tolerance} makes no sense", "give 0 or more, less than 1")


def parts_of(adapter: Adapter) -> dict[str, tuple[str, str | None]]:
    """What is no weight change: name -> (kind, digest of its tensors, or None where they cannot be read)."""
    if adapter.header is None:
        return {name: (part.kind, None) for name, part in adapter.parts.items()}
    return parts_of_header(adapter.header)


def parts_of_header(header: AdapterHeader) -> dict[str, tuple[str, str | None]]:
    """The same of an adapter that lies in a folder."""
    if not header.reading.parts:
        return {}
    with FileSource(header.folder / header.reading.file) as source:
        return {
            name: (part.kind, DictSource({key: source.read(key) for key in part.tensors}).digest())
            for name, part in header.reading.parts.items()
        }


@contextmanager
def base_weights(base: Base, targets: Collection[Target], reads: Collection[Target]) -> Iterator[Weights]:
    """The base's weights by target, and those of siblings that changes look at."""
    layouts = base.framework.layouts(base.index, {*targets, *reads})
    with base.tensors() as read:
        yield BaseWeights(base.index, layouts, read).weight


def _locked(weights: Weights) -> Weights:
    """The same for several threads: files are opened one at a time."""
    lock = threading.Lock()

    def weight(target: Target) -> torch.Tensor | None:
        with lock:
            return weights(target)

    return weight
