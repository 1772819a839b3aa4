"""A plan brought together with the adapters' tensors: every term finds its delta, and each delta fits.

Knows no weights of the base; whoever executes the plan reads those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Protocol, final

from lorahub.bases.layout import Piece, Target
from lorahub.deltas.delta import Delta
from lorahub.engine.plan import Plan
from lorahub.engine.steps import Step, Term
from lorahub.engine.sums import Ingredient
from lorahub.errors import IntegrityError, UsageError
from lorahub.files.tensors import DictSource
from lorahub.lazy import torch

__all__ = ["Bound", "HasDeltas"]


class HasDeltas(Protocol):
    """What is needed of an adapter: its changes by target."""

    @property
    def deltas(self) -> Mapping[Target, Delta]:
        """Target -> change."""


@final
class Bound:
    """A plan with its deltas."""

    def __init__(self, plan: Plan, adapters: Mapping[str, HasDeltas]) -> None:
        """Find every term's delta.

        Raises:
            UsageError: an adapter is missing, or is not the one the plan was made for.
            IntegrityError: an adapter changes names that share one parameter, in different ways.
        """
        terms = [(step, term) for step in plan.steps for term in step.terms]
        if absent := sorted({term.adapter for _, term in terms} - adapters.keys()):
            raise UsageError(
                f"the plan merges {', '.join(map(repr, absent))}, which was not given", "give every adapter"
            )
        self._adapters = adapters
        for _, term in terms:
            self._demand_one_change(term)
        faults = [fault for step, term in terms if (fault := self._fault(step, term))]
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise UsageError(f"the plan was made for another adapter: {faults[0]}{more}", "plan again with this one")

    def _demand_one_change(self, term: Term) -> None:
        deltas = self._adapters[term.adapter].deltas
        for twin in term.twins:
            one, other = deltas[term.target], deltas[twin]
            values, others = one.tensors(), other.tensors()
            if _numbers(one) != _numbers(other) or not all(torch.equal(values[name], others[name]) for name in values):
                raise IntegrityError(
                    f"'{term.adapter}' changes {term.target.name} and {twin.name} in different ways, and they share "
                    "one parameter",
                    "use a base that has them apart",
                )

    def _fault(self, step: Step, term: Term) -> str:
        delta = self._adapters[term.adapter].deltas.get(term.target)
        if delta is None:
            return f"'{term.adapter}' has no change for {term.target.name}"
        expected = term.piece.of_parameter.shape(step.after.shape)
        if term.piece.of_delta.whole and delta.shape() not in (None, expected):
            return f"'{term.adapter}' changes {term.target.name} as {list(delta.shape() or ())}, not {list(expected)}"
        return ""

    def ingredients(self, step: Step, sibling: Callable[[Piece], torch.Tensor]) -> list[Ingredient]:
        """What is added in one step.

        Args:
            step: of the plan.
            sibling: gives the untouched parameter that a piece lies in, as stored.
        """
        return [
            Ingredient(
                weight=term.weight,
                delta=self._delta(term),
                piece=_within_expert(term.piece),
                local=term.local,
                siblings={name: piece.of_parameter.of(sibling(piece)) for name, piece in term.siblings.items()},
                adapter=term.adapter,
            )
            for term in step.terms
        ]

    def _delta(self, term: Term) -> Delta:
        delta = self._adapters[term.adapter].deltas[term.target]
        if (expert := term.piece.of_delta.expert) is not None:
            delta = delta.expert(expert)
        return delta if term.strength == 1 else delta.strengthened(term.strength)

    def digest(self, plan: Plan) -> str:
        """``sha256:`` over all deltas of the plan: their tensors and, by ``repr``, what else they are made of."""
        tensors: dict[str, torch.Tensor] = {}
        numbers = hashlib.sha256()
        for step in plan.steps:
            for term in step.terms:
                delta, name = self._adapters[term.adapter].deltas[term.target], f"{term.adapter}/{term.target.name}"
                tensors |= {f"{name}/{slot}": tensor for slot, tensor in delta.tensors().items()}
                numbers.update(f"{name} {delta.kind} {_numbers(delta)}\n".encode())
        numbers.update(DictSource(tensors).digest().encode())
        return f"sha256:{numbers.hexdigest()}"


def _within_expert(piece: Piece) -> Piece:
    """The piece of the one expert's change that its delta is then."""
    of = piece.of_delta
    return piece if of.expert is None else replace(piece, of_delta=replace(of, expert=None))


def _numbers(delta: Delta) -> dict[str, object]:
    """The fields of a delta that are no tensors."""
    values = {each.name: getattr(delta, each.name) for each in fields(delta)}  # type: ignore[arg-type]  # every delta is a dataclass
    return {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
