"""Iso-C: the weighted sum with all its singular values made equal (https://arxiv.org/abs/2502.04959).

``mean(S) U V^T`` over the singular values that exist.  The paper's formula takes the mean over min(out, in) of them,
for changes of full rank; on adapters that would fill the directions that nothing was learned for, and put most of the
result there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.algebra.spectral import singular
from lorahub.composition.algebra.truncate import one_thread
from lorahub.composition.method import Change, FactorMethod, Method, Terms
from lorahub.composition.methods.thinning import expect_number
from lorahub.deltas.delta import LowRank
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["IsoC"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class IsoC(FactorMethod):
    """Of the rank of the sum.

    Attributes:
        lambda_: multiplies the result; recipes spell it ``lambda``.

    Raises:
        UsageError: a value is out of its range.
    """

    lambda_: float = 1.0

    name: ClassVar[str] = "iso_c"
    title: ClassVar[str] = "isotropic merging in the common subspace (Iso-C)"
    source: ClassVar[str] = "https://arxiv.org/abs/2502.04959"

    def __post_init__(self) -> None:
        expect_number("lambda", self.lambda_)

    def combine(self, terms: Terms) -> Change:
        """A vector has no singular values: there the changes are added."""
        if len(terms.shape) == 1:
            return terms.sum([self.lambda_ * weight for weight in terms.weights])
        return self.factors(terms)

    def factors(self, terms: Terms) -> LowRank:
        """Of the factors side by side."""
        terms.factors()
        total = terms.sum(terms.weights)
        assert isinstance(total, LowRank)  # all changes have factors
        with one_thread():
            found = singular(total.up, total.down, total.scale)
            if not len(found):
                return LowRank(torch.zeros(terms.shape[0], 1), torch.zeros(1, terms.shape[1]), 1.0)
            return LowRank(found.u, found.v.mT.contiguous(), self.lambda_ * float(found.values.mean()))


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """Iso-C."""
    return [IsoC]
