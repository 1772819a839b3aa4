"""Element-wise methods under the name of the basis they work in, as papers and people call them: KnOTS, Core Space.

``knots`` with ``inner = "ties"`` is ``ties`` with ``basis = "knots"``, and is recorded with all its parameters.
Methods that come with a plugin are no ``inner`` here, but take a ``basis`` like the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from lorahub.composition.method import Basis, Change, ElementMethod, Method, Terms
from lorahub.composition.methods.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from lorahub.composition.methods.dare import DareLinear, DareTies
from lorahub.composition.methods.della import Della, DellaLinear
from lorahub.composition.methods.magnitude_prune import MagnitudePrune
from lorahub.composition.methods.sce import Sce
from lorahub.composition.methods.ties import Ties
from lorahub.errors import UsageError
from lorahub.names import did_you_mean

if TYPE_CHECKING:
    from typing import Self

__all__ = ["INNER", "Preset"]

INNER: Mapping[str, type[ElementMethod]] = MappingProxyType(
    {
        each.name: each
        for each in (
            Ties,
            DareTies,
            DareLinear,
            Della,
            DellaLinear,
            Breadcrumbs,
            BreadcrumbsTies,
            MagnitudePrune,
            Sce,
        )
    }
)
"""The methods that a preset takes, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset(Method):
    """An element-wise method in one basis; a vector has only its own elements.

    Its parameters are ``inner``, the name of that method, and those of the method but ``basis``.

    Attributes:
        inner: the method; whatever its basis was, it is the preset's.

    Raises:
        UsageError: a value is out of its range.
    """

    inner: ElementMethod = field(default_factory=Ties)

    basis: ClassVar[Basis]
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "inner", replace(self.inner, basis=self.basis))  # type: ignore[type-var]  # a dataclass

    @classmethod
    def made(cls, parameters: Mapping[str, Any]) -> Self:
        """The preset with these parameters.

        Raises:
            UsageError: there is no such inner method, it has no such parameter, or a value is out of its range.
        """
        rest = dict(parameters)
        name = rest.pop("inner", Ties.name)
        if name not in INNER:
            raise UsageError(
                f"the method '{cls.name}' has no inner method '{name}'.{did_you_mean(str(name), INNER)}",
                f"choose one of {', '.join(INNER)}; a weighted sum is the same in every basis: linear",
            )
        if "basis" in rest:
            raise UsageError(
                f"the method '{cls.name}' is a basis, and has no parameter 'basis'",
                f"name the inner method itself to choose: method '{name}' with a basis",
            )
        return cls(inner=INNER[name].made(rest))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The inner method that it is where nobody says; what the others are follows from that."""
        return {"inner": Ties.name}

    def parameters(self) -> dict[str, Any]:
        """``inner`` and its parameters."""
        return {"inner": self.inner.name, **{k: v for k, v in self.inner.parameters().items() if k != "basis"}}

    def combine(self, terms: Terms) -> Change:
        """As the inner method does."""
        return self.inner.combine(terms)
