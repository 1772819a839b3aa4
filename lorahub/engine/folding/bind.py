"""A plan brought together with the adapters' tensors: every term finds its delta, and each delta fits.

Knows no weights of the base; whoever executes the plan reads those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Protocol, final, runtime_checkable

from lorahub.bases.layout import Piece, Target
from lorahub.deltas.delta import Delta
from lorahub.engine.folding.sums import Ingredient
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.steps import Step, Term
from lorahub.errors import IntegrityError, UsageError
from lorahub.files.tensors import DictSource
from lorahub.formats.on_demand import OnDemand
from lorahub.formats.pages import Paged
from lorahub.lazy import torch

__all__ = ["Bound", "HasDeltas"]


class HasDeltas(Protocol):
    """What is needed of an adapter: its changes by target."""

    @property
    def deltas(self) -> Mapping[Target, Delta]:
        """Target -> change."""


@runtime_checkable
class HasContent(Protocol):
    """An adapter that knows a digest of its tensors."""

    @property
    def content(self) -> str:
        """``sha256:`` over them."""


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
        self._numbers = hashlib.sha256()
        faults = []
        for step, term in terms:  # once through: each delta may be read for it
            self._demand_one_change(term)
            delta = paged.delta if (paged := self._paged(term)) else adapters[term.adapter].deltas.get(term.target)
            if fault := self._fault(step, term, delta):
                faults.append(fault)
            elif delta is not None:
                self._numbers.update(f"{term.adapter}/{term.target.name} {delta.kind} {_numbers(delta)}\n".encode())
        if faults:
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise UsageError(f"the plan was made for another adapter: {faults[0]}{more}", "plan again with this one")

    def _demand_one_change(self, term: Term) -> None:
        for twin in term.twins:
            deltas = self._adapters[term.adapter].deltas
            one, other = deltas[term.target], deltas[twin]
            values, others = one.tensors(), other.tensors()
            if _numbers(one) != _numbers(other) or not all(torch.equal(values[name], others[name]) for name in values):
                raise IntegrityError(
                    f"'{term.adapter}' changes {term.target.name} and {twin.name} in different ways, and they share "
                    "one parameter",
                    "use a base that has them apart",
                )

    def _fault(self, step: Step, term: Term, delta: Delta | None) -> str:
        if delta is None:
            return f"'{term.adapter}' has no change for {term.target.name}"
        expected = term.piece.of_parameter.shape(step.after.shape)
        if term.piece.of_delta.whole and delta.shape() not in (None, expected):
            return f"'{term.adapter}' changes {term.target.name} as {list(delta.shape() or ())}, not {list(expected)}"
        return ""

    def paged(self, step: Step) -> Paged | None:
        """The one delta of a step that is as large as its parameter, where it can be read row by row."""
        if len(step.terms) != 1 or not step.terms[0].windowed or step.terms[0].strength != 1:
            return None
        (term,) = step.terms
        return self._paged(term) if term.piece.of_delta.whole and term.piece.of_parameter.whole else None

    def _paged(self, term: Term) -> Paged | None:
        deltas = self._adapters[term.adapter].deltas
        return deltas.paged(term.target) if isinstance(deltas, OnDemand) else None

    def ingredients(
        self, step: Step, sibling: Callable[[Piece], torch.Tensor], paged: Paged | None = None
    ) -> list[Ingredient]:
        """What is added in one step.

        Args:
            step: of the plan.
            sibling: gives the untouched parameter that a piece lies in, as stored.
            paged: its delta, where that is read row by row.
        """
        return [
            Ingredient(
                weight=term.weight,
                delta=paged.delta if paged else self._delta(term),
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
        whole = self._numbers.copy()
        for step in plan.steps:
            for term in step.terms:
                adapter = self._adapters[term.adapter]
                if not isinstance(adapter, HasContent):
                    slots = adapter.deltas[term.target].tensors()
                    tensors |= {f"{term.adapter}/{term.target.name}/{slot}": tensor for slot, tensor in slots.items()}
        contents = {name: each.content for name, each in self._adapters.items() if isinstance(each, HasContent)}
        whole.update(f"{sorted(contents.items())} {DictSource(tensors).digest()}".encode())
        return f"sha256:{whole.hexdigest()}"


def _within_expert(piece: Piece) -> Piece:
    """The piece of the one expert's change that its delta is then."""
    of = piece.of_delta
    return piece if of.expert is None else replace(piece, of_delta=replace(of, expert=None))


def _numbers(delta: Delta) -> dict[str, object]:
    """The fields of a delta that are no tensors."""
    values = {each.name: getattr(delta, each.name) for each in fields(delta)}  # type: ignore[arg-type]  # every delta is a dataclass
    return {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
