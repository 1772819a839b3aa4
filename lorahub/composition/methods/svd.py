"""The weighted sum cut to a rank, which PEFT calls ``svd``: no other approximation of that rank is nearer.

The sum is exact; whatever a method gives is cut to the rank, the energy or the error asked for, by QR of the factors
where PEFT takes the SVD of the dense matrix.  So this is ``linear`` that asks for such a budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.method import Method, SumMethod
from lorahub.hookspecs import hookimpl

__all__ = ["Svd"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Svd(SumMethod):
    """``sum of w_i * delta_i``, to be cut."""

    name: ClassVar[str] = "svd"
    title: ClassVar[str] = "weighted sum, cut to a rank"
    source: ClassVar[str] = "PEFT, combination_type='svd'"
    cut: ClassVar[bool] = True

    def coefficients(self, weights: Sequence[float]) -> Sequence[float]:
        """The weights."""
        return weights


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """The sum under PEFT's name."""
    return [Svd]
