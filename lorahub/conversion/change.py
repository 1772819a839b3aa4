"""What an adapter does to one parameter while it is converted, and where that came from.

A conversion starts with the source's own changes and ends with those that are written; the origins of each say which
part of which source lands where in it, so that ``verify`` can hold the two against each other without knowing how one
became the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lorahub.bases.layout import Region, Target
from lorahub.deltas.delta import Delta
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Change", "Origin", "Weight", "by_module", "target_of"]

Weight = Callable[[Target], "torch.Tensor | None"]
"""The untouched parameter of a source's target, in float64; None where no base is at hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A region of a source's change, and the region of the written change that it is.

    Attributes:
        target: as the source has it.
        of_delta: which part of the source's change.
        of_parameter: which part of the written change.
    """

    target: Target
    of_delta: Region = field(default_factory=Region)
    of_parameter: Region = field(default_factory=Region)

    @property
    def whole(self) -> bool:
        """Whether it is all of the one and all of the other."""
        return self.of_delta.whole and self.of_parameter.whole


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Change:
    """One parameter's change.

    Attributes:
        target: under the name that is written.
        delta: what is written.
        origins: where it comes from; what none of them covers is zero.
        shape: of the parameter, where a base or the delta tells.
        rules: which rewritings were applied, in order; none: it is as it was.
        error: relative error of an approximation; None where the rewritings are exact.
    """

    target: Target
    delta: Delta
    origins: tuple[Origin, ...]
    shape: tuple[int, ...] | None = None
    rules: tuple[str, ...] = ()
    error: float | None = None

    def become(self, delta: Delta, rule: str, *, error: float | None = None) -> Self:
        """The same change in another form."""
        return replace(self, delta=delta, rules=(*self.rules, rule), error=self.error if error is None else error)

    @property
    def extent(self) -> tuple[int, ...] | None:
        """The parameter's shape as far as it is known."""
        return self.shape or self.delta.shape()


def by_module(changes: Iterable[Change]) -> dict[tuple[str, str], list[Change]]:
    """(component, module) -> its changes."""
    result: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        result.setdefault((change.target.component, change.target.module), []).append(change)
    return result


def target_of(name: str) -> Target:
    """A parameter's name as a target."""
    component, colon, path = name.partition(":")
    module, _, parameter = (path if colon else component).rpartition(".")
    return Target(component if colon else "", module, parameter)
