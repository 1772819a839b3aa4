"""Comparing two adapters, for scripts: read both, against their base where it is given, then ask ``composition``."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from lorahub import checks
from lorahub.adapter import Adapter
from lorahub.adapter import load as load_tensors
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.composition.comparing import Comparison, Weights, compare, compare_parts
from lorahub.conversion.weights import BaseWeights
from lorahub.errors import UsageError
from lorahub.files.tensors import DictSource, FileSource
from lorahub.plugins import load_registry
from lorahub.registry import Registry
from lorahub.sources import Base, Given, Progress, Source, header_of, open_base, quiet

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Comparison", "diff"]


def diff(
    one: Given,
    other: Given,
    *,
    base: Source | nn.Module | Base | None = None,
    tolerance: float = 1e-6,
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
    if not 0 <= tolerance < 1:
        raise UsageError(f"a tolerance of {tolerance} makes no sense", "give 0 or more, less than 1")
    registry = load_registry()
    opened = open_base(base) if base is not None else None
    index = opened.index if opened else None
    first, second = (_loaded(each, registry, index, allow, hub, progress) for each in (one, other))
    with ExitStack() as held:
        targets = {*first.deltas, *second.deltas}
        weights = held.enter_context(_weights(opened, targets, (first, second))) if opened else None
        found = compare(first.deltas, second.deltas, tolerance=tolerance, weights=weights)
    return replace(found, rows=(*found.rows, *compare_parts(*(_parts(each) for each in (first, second)))))


def _parts(adapter: Adapter) -> dict[str, tuple[str, str | None]]:
    """What is no weight change: name -> (kind, digest of its tensors, or None where they cannot be read)."""
    header = adapter.header
    if header is None:
        return {name: (part.kind, None) for name, part in adapter.parts.items()}
    with FileSource(header.folder / header.reading.file) as source:
        return {
            name: (part.kind, DictSource({key: source.read(key) for key in part.tensors}).digest())
            for name, part in adapter.parts.items()
        }


def _loaded(
    source: Given,
    registry: Registry,
    index: BaseIndex | None,
    allow: Collection[str],
    hub: str | None,
    progress: Progress,
) -> Adapter:
    if isinstance(source, Adapter) and (index is None or source.header is None):
        return source
    header = header_of(source, registry, hub=hub, progress=progress, index=index)
    checks.refuse(header.findings, allowed=allow, subject=header.label)
    return load_tensors(header, registry)


@contextmanager
def _weights(base: Base, targets: Collection[Target], adapters: Collection[Adapter]) -> Iterator[Weights]:
    """The base's weights by target, and those of siblings that changes look at."""
    reads = {
        replace(target, parameter=name)
        for adapter in adapters
        for target, delta in adapter.deltas.items()
        for name in delta.reads
    }
    layouts = base.framework.layouts(base.index, {*targets, *reads})
    with base.tensors() as read:
        yield BaseWeights(base.index, layouts, read).weight
