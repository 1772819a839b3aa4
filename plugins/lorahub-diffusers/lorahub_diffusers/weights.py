"""What people write as the weight of an adapter in a pipeline, as a number for each of its targets.

A number; a dictionary over components, and over blocks in one, as diffusers' ``set_adapters`` takes it; or any rule of
a recipe: kohya's block weights (``{"blocks": [1, 0, ...]}``), layers, patterns, B-LoRA's presets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from pydantic import TypeAdapter, ValidationError

from lorahub.bases.layout import Piece, Target
from lorahub.composition.weights.rules import resolve
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.steps import Step, Term
from lorahub.errors import UsageError
from lorahub.recipe_fields import RULE_KEYS, Components, Rule

__all__ = ["Weight", "factors", "placed_in", "targets_of", "weighted"]

Weight: TypeAlias = "float | Mapping[str, Any] | list[Any] | tuple[Any, ...]"

_RULE: TypeAdapter[Any] = TypeAdapter(Rule)


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


def placed_in(plan: Plan, component: str) -> Plan:
    """The plan for one model as that for a pipeline which has the model as a component."""

    def there(piece: Piece) -> Piece:
        return replace(piece, parameter=f"{component}:{piece.parameter}")

    steps = tuple(
        replace(
            step,
            out=f"{component}:{step.out}",
            source=f"{component}:{step.source}" if step.source else None,
            stored_as=f"{component}.{step.stored_as}" if step.stored_as else "",
            terms=tuple(
                replace(
                    term,
                    piece=there(term.piece),
                    siblings={name: there(piece) for name, piece in term.siblings.items()},
                )
                for term in step.terms
            ),
        )
        for step in plan.steps
    )
    return replace(plan, steps=steps)


def weighted(plan: Plan, numbers: Mapping[str, Mapping[Target, float]]) -> Plan:
    """A plan with each change multiplied besides: adapter -> target -> number."""
    steps = tuple(step if step.made_whole else replace(step, terms=_terms(step, numbers)) for step in plan.steps)
    return replace(plan, steps=tuple(step for step in steps if step.terms))


def _terms(step: Step, numbers: Mapping[str, Mapping[Target, float]]) -> tuple[Term, ...]:
    terms = ((term, numbers[term.adapter][term.target]) for term in step.terms)
    return tuple(replace(term, weight=term.weight * number) for term, number in terms if number)
