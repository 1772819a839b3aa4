"""A merge into a live model that only needs doing, once or many times, and the folds that do it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self, final

from lorahub.bases.layout import Piece
from lorahub.engine.folding.bind import Bound, HasDeltas
from lorahub.engine.folding.fold import Fold
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.steps import Step
from lorahub.engine.rounding.table import read_mode
from lorahub.lazy import torch
from lorahub.storages.storage import Held

__all__ = ["Arranged", "Folds", "Prepared"]


class Folds:
    """A plan with its deltas, which folds are made of when they are asked for."""

    def __init__(self, plan: Plan, adapters: Mapping[str, HasDeltas]) -> None:
        """Find every delta; see ``Bound`` for what is raised."""
        self.plan, self.bound = plan, Bound(plan, adapters)
        self._mode = read_mode(plan.mode)

    @cached_property
    def digest(self) -> str:
        """The plan's."""
        return self.plan.digest()

    def of(self, step: Step, device: torch.device, sibling: Callable[[Piece], torch.Tensor]) -> Fold:
        """The fold of a step.

        Args:
            step: of the plan.
            device: where it is computed.
            sibling: gives the untouched parameter that a piece lies in, as stored.
        """
        return Fold(step, self.bound.ingredients(step, sibling), device, self._mode)

    def reverse(self, step: Step, device: torch.device) -> Fold:
        """The fold that takes a step of additive changes off again.

        It is in mode "fast", whichever the merge was in: what it gets wrong is recorded, so it only has to be the same
        each time.
        """
        items = [replace(item, weight=-item.weight) for item in self.bound.ingredients(step, _unread)]
        return Fold(step, items, device)


@final
class _Kept(Folds):
    """The same, and each is made once: with what its recipes remember of the factors."""

    def __init__(self, plan: Plan, adapters: Mapping[str, HasDeltas]) -> None:
        super().__init__(plan, adapters)
        self._made: dict[tuple[str, torch.device], Fold] = {}
        self._reverses: dict[tuple[str, torch.device], Fold] = {}

    def of(self, step: Step, device: torch.device, sibling: Callable[[Piece], torch.Tensor]) -> Fold:
        """See ``Folds``; what looks at other parameters is made anew, since these change."""
        if any(term.siblings for term in step.terms):
            return super().of(step, device, sibling)
        found = self._made.get((step.out, device))
        if found is None:
            found = self._made[step.out, device] = super().of(step, device, sibling)
        return found

    def reverse(self, step: Step, device: torch.device) -> Fold:
        """See ``Folds``."""
        found = self._reverses.get((step.out, device))
        if found is None:
            found = self._reverses[step.out, device] = super().reverse(step, device)
        return found


def _unread(piece: Piece) -> torch.Tensor:
    raise AssertionError(piece)  # a change that reads siblings has no journal


@dataclass(frozen=True, kw_only=True)
class Arranged:
    """A merge that only needs doing.

    Attributes:
        parameters: canonical name -> the live tensor.
        plan: made for exactly these.
        adapters: name -> adapter, as in the plan.
        held: canonical name -> what is held there, for parameters that are quantised.
    """

    parameters: Mapping[str, torch.Tensor]
    plan: Plan
    adapters: Mapping[str, HasDeltas]
    held: Mapping[str, Held] = field(default_factory=lambda: MappingProxyType({}))

    def folds(self) -> Folds:
        """What does it."""
        return Folds(self.plan, self.adapters)


@final
@dataclass(frozen=True, kw_only=True)
class Prepared(Arranged):
    """A merge that is done more than once: what can be made ready for it is made once.

    Attributes:
        given: the adapters as ``Merged.prepare`` was given them.
    """

    given: Any = None

    @classmethod
    def of(cls, arranged: Arranged, given: Any) -> Self:
        """The same merge, prepared."""
        return cls(
            parameters=arranged.parameters,
            plan=arranged.plan,
            adapters=arranged.adapters,
            held=arranged.held,
            given=given,
        )

    @cached_property
    def _kept(self) -> Folds:
        return _Kept(self.plan, self.adapters)

    def folds(self) -> Folds:
        """See ``Arranged``."""
        return self._kept
