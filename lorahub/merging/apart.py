"""Weights that are not one number an adapter: of components of a pipeline, of blocks, layers, or whatever a rule says.

A plan is made with each adapter at one weight; here each of its changes is multiplied besides.  What people write is
what recipes take, and what diffusers' ``set_adapters`` does.  Names and numbers alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError

from lorahub.bases.index import natural
from lorahub.bases.layout import Target
from lorahub.composition.weights.rules import resolve
from lorahub.deltas.kind import JSON
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.steps import Step, Term
from lorahub.errors import UsageError
from lorahub.recipe_fields import RULE_KEYS, Components, Rule

__all__ = ["Weight", "Weights", "factors", "is_number", "plain", "targets_of", "weighted"]

Weight: TypeAlias = "float | Mapping[str, Any] | list[Any] | tuple[Any, ...]"
"""A number; {component: number}, with blocks in one; or any rule of a recipe."""

Weights: TypeAlias = "float | Sequence[Weight] | Mapping[str, Weight]"
"""One number for all adapters; one weight for each, in order; or by name."""

_RULE: TypeAdapter[Any] = TypeAdapter(Rule)


def is_number(weight: object) -> bool:
    """Whether a weight is one number, and no rule."""
    return not isinstance(weight, Mapping | list | tuple)


def plain(weight: Weight) -> JSON:
    """A weight as a document has it."""
    if isinstance(weight, Mapping):
        return {str(key): plain(value) for key, value in weight.items()}
    if isinstance(weight, list | tuple):
        return [plain(each) for each in weight]
    return weight if isinstance(weight, str | bool | int) or weight is None else float(weight)


def factors(weight: Weight, targets: Collection[Target], *, name: str) -> dict[Target, float]:
    """The number of each target.  A component that is not spoken of gets 1, as in diffusers.

    Args:
        weight: as people write it.
        targets: those of one adapter.
        name: of the adapter, for messages.

    Raises:
        UsageError: it is no weight.
        RecipeError: it speaks of components or blocks that the adapter does not change.
    """
    if isinstance(weight, bool | str):
        raise UsageError(f"the weight of '{name}' is {weight!r}, which is no number", "give a number: 0.8")
    try:
        rule = _RULE.validate_python(weight)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith("<"))
        raise UsageError(
            f"the weight of '{name}'{f' at {place}' if place else ''}: {first['msg']}",
            "give a number, {component: number}, or a rule as in a recipe, such as "
            + ", ".join(f"{{{key!r}: ...}}" for key in RULE_KEYS[:3]),
        ) from None
    if isinstance(rule, Components) and rule.default is None:
        rule = rule.model_copy(update={"default": 1.0})
    return resolve(rule, targets, where=f"weights[{name!r}]")


def targets_of(plan: Plan) -> dict[str, set[Target]]:
    """Adapter -> what it changes, as the plan places it."""
    found: dict[str, set[Target]] = {}
    for step in plan.steps:
        for term in step.terms:
            found.setdefault(term.adapter, set()).add(term.target)
    return found


def weighted(plan: Plan, numbers: Mapping[str, Mapping[Target, float]]) -> Plan:
    """A plan with each change multiplied besides; a parameter that nothing changes then is copied as it is.

    What is taken whole, because the base has nothing to blend it with, has no weight.

    Args:
        plan: made with each adapter at one weight.
        numbers: adapter -> target -> number.
    """
    steps: list[Step] = []
    spared: list[Step] = []
    for step in plan.steps:
        if step.made_whole:
            steps.append(step)
            continue
        terms = _terms(step, numbers)
        own = step.out == step.source and not step.widened
        (spared if own and step.terms and not terms else steps).append(replace(step, terms=terms))
    untouched = sorted((*plan.untouched, *(step.out for step in spared)), key=natural) if spared else plan.untouched
    size = sum(step.before.nbytes for step in spared if step.before)
    return replace(plan, steps=tuple(steps), untouched=tuple(untouched), untouched_bytes=plan.untouched_bytes + size)


def _terms(step: Step, numbers: Mapping[str, Mapping[Target, float]]) -> tuple[Term, ...]:
    """The changes with their numbers; those of 0 are left out, where they do not say how wide a layer becomes."""
    terms = ((term, numbers[term.adapter][term.target]) for term in step.terms)
    return tuple(replace(term, weight=term.weight * number) for term, number in terms if number or step.widened)
