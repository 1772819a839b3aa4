"""Where the changes of one adapter land in a model, so that something else can stand there in their stead.

Knows plans; no tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeAlias

from lorahub.bases.layout import Target
from lorahub.engine.planning.place import FLOATS
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.steps import Step, Term

__all__ = ["Terms", "narrowed", "standing_in", "terms_of", "weighable", "whole"]

Terms: TypeAlias = dict[Target, list[tuple[Step, Term]]]
"""What is changed -> each place where part of the change lands."""


def terms_of(plan: Plan) -> Terms:
    """A plan of one adapter by what it changes."""
    result: Terms = {}
    for step in plan.steps:
        for term in step.terms:
            result.setdefault(term.target, []).append((step, term))
    return result


def whole(found: Sequence[tuple[Step, Term]]) -> bool:
    """Whether the parameter holds no real numbers, and is taken as it is at any weight."""
    return any(step.after.dtype not in FLOATS for step, _ in found)


def weighable(plan: Plan) -> Terms:
    """The changes that a weight multiplies."""
    return {target: found for target, found in terms_of(plan).items() if not whole(found)}


def narrowed(plan: Plan, wanted: Collection[Target], **changes: Any) -> Plan:
    """The plan with these targets alone; what one name says counts for its twins, which were found equal.

    ``changes`` are fields of ``Term``.
    """
    steps = []
    for step in plan.steps:
        kept = tuple(replace(term, twins=(), **changes) for term in step.terms if term.target in wanted)
        if kept:
            steps.append(replace(step, terms=kept))
    return replace(plan, steps=tuple(steps))


def standing_in(plan: Plan, wanted: Collection[Target]) -> Plan:
    """The plan for plain changes in the places of others, whatever those were."""
    return narrowed(
        plan,
        wanted,
        kind="lora",
        additive=True,
        replaces=False,
        reads=(),
        siblings=MappingProxyType({}),
        strength=1.0,
    )
