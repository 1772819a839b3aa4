"""TSV-M: singular vectors of all changes side by side, turned until they are orthogonal, at their own singular values.

https://arxiv.org/abs/2412.00081
``P([U_1 ... U_n]) diag(S_1 ... S_n) P([V_1 ... V_n])^T`` with the polar factor P, which is the nearest orthonormal
matrix: what one change does no longer lies in the way of another.  The paper keeps one n-th of each full spectrum to
make room; changes of low rank leave room as they are, so that all of theirs is kept unless asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.algebra.spectral import polar, singular
from lorahub.composition.algebra.truncate import one_thread
from lorahub.composition.method import Change, FactorMethod, Method, Terms
from lorahub.composition.methods.thinning import expect_number, expect_share
from lorahub.deltas.delta import LowRank
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["Tsv"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tsv(FactorMethod):
    """Of rank at most the sum of the ranks.

    Attributes:
        keep: the share of each change's singular values that is kept, rounded down to at least one.
        lambda_: multiplies the result; recipes spell it ``lambda``.

    Raises:
        UsageError: a value is out of its range.
    """

    keep: float = 1.0
    lambda_: float = 1.0

    name: ClassVar[str] = "tsv"
    title: ClassVar[str] = "task singular vectors (TSV-M)"
    source: ClassVar[str] = "https://arxiv.org/abs/2412.00081"

    def __post_init__(self) -> None:
        expect_share("keep", self.keep)
        expect_number("lambda", self.lambda_)

    def combine(self, terms: Terms) -> Change:
        """A vector has no singular vectors: there the changes are added."""
        if len(terms.shape) == 1:
            return terms.sum([self.lambda_ * weight for weight in terms.weights])
        return self.factors(terms)

    def factors(self, terms: Terms) -> LowRank:
        """Both sides made orthogonal."""
        with one_thread():
            found = [
                singular(change.up, change.down, change.scale * weight)
                for change, weight in zip(terms.factors(), terms.weights, strict=True)
            ]
            kept = [each.cut(max(1, int(self.keep * len(each)))) for each in found if len(each)]
            if not kept:
                return LowRank(torch.zeros(terms.shape[0], 1), torch.zeros(1, terms.shape[1]), 1.0)
            values = torch.cat([each.values for each in kept])
            left, right = (polar(torch.cat(side, dim=1)) for side in ([e.u for e in kept], [e.v for e in kept]))
            return LowRank(left * values, right.mT.contiguous(), self.lambda_)


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """TSV-M."""
    return [Tsv]
