"""A merge into a live model that only needs doing, once or many times, and the folds that do it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, Self, TypeVar, final

from lorahub.bases.layout import Piece
from lorahub.engine.folding.bind import Bound, HasDeltas
from lorahub.engine.folding.fold import Fold
from lorahub.engine.planning.plan import Plan
from lorahub.engine.planning.steps import Step
from lorahub.engine.rounding.table import read_mode
from lorahub.lazy import torch
from lorahub.storages.storage import Held

__all__ = ["Arranged", "Folds", "Prepared"]

_T = TypeVar("_T")


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

    def remember(self, what: Hashable, stamp: object, make: Callable[[], _T]) -> _T:
        """What ``make`` gives: here that is forgotten.

        Args:
            what: is made.
            stamp: what it was made for; for another one it is made anew.
            make: makes it.
        """
        return make()

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
        self._made: dict[Hashable, tuple[object, Any]] = {}

    def of(self, step: Step, device: torch.device, sibling: Callable[[Piece], torch.Tensor]) -> Fold:
        """See ``Folds``; what looks at other parameters is made anew, since these change."""
        make = partial(super().of, step, device, sibling)
        return make() if any(term.siblings for term in step.terms) else self.remember(("fold", step.out), device, make)

    def reverse(self, step: Step, device: torch.device) -> Fold:
        """See ``Folds``."""
        return self.remember(("reverse", step.out), device, partial(super().reverse, step, device))

    def remember(self, what: Hashable, stamp: object, make: Callable[[], _T]) -> _T:
        """See ``Folds``; here it is kept."""
        found = self._made.get(what)
        if found is None or found[0] != stamp:
            found = self._made[what] = stamp, make()
        made: _T = found[1]
        return made


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
