"""An adapter that is on a pipeline: where it is from, what merging it would do, and the parts it is attached in.

An adapter whose targets have several weights is attached in parts, one for each weight.  Knows no pipelines.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from lorahub.attaching import Policy
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.live.attached import Planned
from lorahub.sources import Given

__all__ = ["Held", "within"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """An adapter on the pipeline.

    Attributes:
        source: where it is from.
        component: the one that it was put on, whatever it is called in its file; or "".
        planned: what merging it at weight 1 would do, and it.
        policy: what was allowed.
        rule: its weight, as people wrote it.
        groups: name of an attached part -> its weight; the targets of each have that one in common.
        parts: the targets of each part, as they are attached.
    """

    source: Given
    component: str
    planned: Planned
    policy: Policy
    rule: Any
    groups: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    parts: frozenset[frozenset[Target]] = frozenset()

    @property
    def components(self) -> tuple[str, ...]:
        """The components of the pipeline that it changes, sorted."""
        return tuple(sorted({target.component for targets in self.parts for target in targets}))

    def acts(self, attached: Collection[str]) -> bool:
        """Whether one of its parts is among these."""
        return any(group in attached for group in self.groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Some:
    """Some of an adapter's changes, under the name by which they are attached."""

    deltas: Mapping[Target, Delta]


def within(planned: Planned, targets: Collection[Target]) -> Planned:
    """What merging some of an adapter's changes would do."""
    plan, adapter = planned
    steps = tuple(
        replace(step, terms=terms)
        for step in plan.steps
        if (terms := tuple(term for term in step.terms if term.target in targets))
    )
    deltas = {target: adapter.deltas[target] for target in targets}
    return replace(plan, steps=steps), _Some(deltas=MappingProxyType(deltas))
