"""An adapter that is to be trained, before the model knows of it: where it lands, and what there is to say of that.

Knows bases and plans; nothing acts here yet.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import final

from lorahub.deltas.kind import JSON
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.plan import plan as plan_merge
from lorahub.findings import Finding, Verdict
from lorahub.opening import Base
from lorahub.recording import describe_base
from lorahub.records import SCHEMA_VERSION, AdapterRecord
from lorahub.registry import Registry
from lorahub.training.seats import Seats

__all__ = ["Made", "described", "planned", "too_wide"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """An adapter that is to be trained, before the model knows of it.

    Attributes:
        base: the live base.
        seats: its tensors.
        name: what it is called.
        dropout: the chance of an input of its own path to be dropped.
        hints: as ``Adapter.hints``.
        record: what is known of its base, as a record has it.
        allow: finding codes to accept.
    """

    base: Base
    seats: Seats
    name: str
    dropout: float = 0.0
    hints: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))
    record: AdapterRecord
    allow: Collection[str] = ()


def planned(made: Made, registry: Registry) -> Plan:
    """Where it lands in its base.

    Raises:
        LorahubError: as merging it would.
    """
    heading = made.seats.heading()
    found = plan_merge(
        made.base.index, made.base.framework, {made.name: (heading, 1.0)}, registry.kinds, allow=tuple(made.allow)
    )
    found.check()
    return found


def too_wide(plan: Plan) -> tuple[Finding, ...]:
    """What there is to say of ranks that no change of the weight can have."""
    above = {
        step.out: side
        for step in plan.steps
        if step.before is not None and len(step.before.shape) > 1
        for side in (min(step.before.shape[0], math.prod(step.before.shape[1:])),)
        if any((term.rank or 0) > side for term in step.terms)
    }
    if not above:
        return ()
    name, side = next(iter(above.items()))
    return (
        Finding(
            code="rank-above-side",
            axis="placement",
            level=Verdict.COMPATIBLE,
            message=f"the rank is above the smaller side of {len(above)} weights, {side} of {name}: more parameters "
            "are trained than are of use",
            where=tuple(above),
            remedy="a smaller r, or rank_pattern={...} for these",
        ),
    )


def described(base: Base, kinds: Collection[str], touched: Collection[str], **named: str | None) -> AdapterRecord:
    """A record that says which base it is for, as far as that is known."""
    about = describe_base(base.index, base.framework, touched, repo=named.get("repo"), revision=named.get("revision"))
    return AdapterRecord(schema_version=SCHEMA_VERSION, kinds=tuple(sorted(kinds))).changed(base=about)
