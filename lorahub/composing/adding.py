"""What a method makes of several adapters, as an adapter that lies in no file: what a merge wants to know of it.

Everything but its values: those are made when they are added (``composition.uncut``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from lorahub import __version__, checks
from lorahub.adapter import AdapterHeader
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.composition.combining import Part
from lorahub.composition.uncut import Pending
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, TensorRef
from lorahub.engine.planning.place import logical_shape
from lorahub.engine.planning.plan import plan
from lorahub.errors import UnsupportedKind
from lorahub.files.dtypes import from_torch
from lorahub.formats.assembly import touches
from lorahub.formats.format import AdapterFiles, Reading
from lorahub.merging.job import Job
from lorahub.opening import Base
from lorahub.records import AdapterRecord
from lorahub.registry import Registry

__all__ = ["content_of", "header_of_uncut", "job_of", "shapes_of"]


def shapes_of(base: Base, parts: Sequence[Part], targets: Collection[Target]) -> dict[Target, tuple[int, ...]]:
    """The shapes of parameters, [out, in, *k]; where the base has none, what an adapter says."""
    layouts = base.framework.layouts(base.index, targets)
    found = {}
    for target in targets:
        if target in layouts:
            found[target] = logical_shape(layouts[target], base.index)
            continue
        deltas = (delta for part in parts if (delta := part.delta(target)) is not None)
        found[target] = next((shape for delta in deltas if (shape := delta.shape()) is not None), ())
    return found


def content_of(record: AdapterRecord) -> str:
    """``sha256:`` over the recipe and what went in, and the version that makes something of these."""
    assert record.recipe is not None  # it is recorded for what was composed
    return f"sha256:{hashlib.sha256(f'{record.recipe.digest} {__version__}'.encode()).hexdigest()}"


def header_of_uncut(
    name: str,
    shapes: Mapping[Target, tuple[int, ...]],
    rest: Mapping[Target, Delta],
    record: AdapterRecord,
    index: BaseIndex,
    hints: Mapping[str, JSON],
    kinds: Mapping[str, Kind],
) -> AdapterHeader:
    """The header of what a method makes.

    Args:
        name: what to call it.
        shapes: target -> shape of the parameter that a full difference is added to.
        rest: further changes.
        record: what is recorded of it.
        index: the base, whose names the targets have.
        hints: see ``Adapter``.
        kinds: every registered kind, by name.

    Raises:
        UnsupportedKind: a further change is of a kind that goes together with that of another parameter.
    """
    groups = [
        _group(target, Pending.kind, {"diff": TensorRef(key=target.name, shape=shape, dtype="F32")})
        for target, shape in shapes.items()
    ]
    groups += [_group_of(target, delta, hints, kinds) for target, delta in rest.items()]
    changed, twice = touches(groups, kinds)
    return AdapterHeader(
        label=name,
        folder=Path(),
        files=AdapterFiles(folder=Path(), headers={}, configs={}),
        reading=Reading(format="", file="", groups=groups, hints=hints),
        touches=changed,
        record=record,
        findings=tuple(twice),
        index=index,
    )


def _group_of(target: Target, delta: Delta, hints: Mapping[str, JSON], kinds: Mapping[str, Kind]) -> Group:
    """A delta as files would have it."""
    taken = kinds[delta.kind].dissolve({target.parameter: delta})
    if taken is None:
        raise UnsupportedKind(
            f"{target.name}: a change of kind {delta.kind} goes together with others, and cannot be merged by itself",
            "compose an adapter (-o FOLDER without --checkpoint), and merge that",
        )
    slots, options = taken
    listed = hints.get("transposed")
    turned = isinstance(listed, list) and target.name in listed  # new values lie in files as the base has them
    refs = {
        slot: TensorRef(
            key=f"{target.name} {slot}",
            shape=tuple(tensor.shape[1::-1] if turned and tensor.dim() > 1 else tensor.shape),
            dtype=from_torch(tensor.dtype),
        )
        for slot, tensor in slots.items()
    }
    return _group(target, delta.kind, refs, options)


def _group(
    target: Target, kind: str, slots: Mapping[str, TensorRef], options: Mapping[str, JSON] = MappingProxyType({})
) -> Group:
    return Group(
        component=target.component,
        module=target.module,
        parameter=target.parameter,
        kind=kind,
        slots=slots,
        options=options,
    )


def job_of(base: Base, header: AdapterHeader, registry: Registry, *, allow: Collection[str]) -> Job:
    """A merge of one adapter at weight 1, planned and judged; see ``merging.preparing.prepare``."""
    planned = plan(base.index, base.framework, {header.label: (header, 1.0)}, registry.kinds, allow=tuple(allow))
    return Job(
        base=base,
        headers={header.label: header},
        weights={header.label: 1.0},
        plan=planned,
        findings=checks.findings(header, base.index, base.framework, planned),
        allowed=tuple(allow),
    )
