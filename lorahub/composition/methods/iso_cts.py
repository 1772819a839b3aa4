"""Iso-CTS: equal singular values in a common subspace and in one for each task (https://arxiv.org/abs/2502.04959).

The weak directions of the weighted sum give way to the strongest ones of each change that lie outside the rest of it;
all are made orthogonal, as in TSV-M, and get the mean of their singular values.  The paper shares out min(out, in)
directions, for changes of full rank; here it is those R that the sum has, and no others are made up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.algebra.spectral import Singular, polar, singular
from lorahub.composition.algebra.truncate import one_thread
from lorahub.composition.method import Change, FactorMethod, Method, Terms
from lorahub.composition.methods.thinning import expect_number
from lorahub.deltas.delta import LowRank
from lorahub.errors import UsageError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["IsoCts"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class IsoCts(FactorMethod):
    """Of rank at most that of the sum.

    Attributes:
        common_space_fraction: the share of the directions that are the sum's own; the rest is divided among the
            changes evenly, what is left over being the sum's.
        lambda_: multiplies the result; recipes spell it ``lambda``.

    Raises:
        UsageError: a value is out of its range.
    """

    common_space_fraction: float = 0.8
    lambda_: float = 1.0

    name: ClassVar[str] = "iso_cts"
    title: ClassVar[str] = "isotropic merging in common and task-specific subspaces (Iso-CTS)"
    source: ClassVar[str] = "https://arxiv.org/abs/2502.04959"

    def __post_init__(self) -> None:
        expect_number("common_space_fraction", self.common_space_fraction)
        if not 0 <= self.common_space_fraction <= 1:
            raise UsageError(f"common_space_fraction is {self.common_space_fraction}", "give a share from 0 to 1")
        expect_number("lambda", self.lambda_)

    def combine(self, terms: Terms) -> Change:
        """A vector has no singular values: there the changes are added."""
        if len(terms.shape) == 1:
            return terms.sum([self.lambda_ * weight for weight in terms.weights])
        return self.factors(terms)

    def factors(self, terms: Terms) -> LowRank:
        """The common directions, each change's own, and one length for all."""
        changes = [
            LowRank(change.up.double(), change.down.double(), change.scale * weight)
            for change, weight in zip(terms.factors(), terms.weights, strict=True)
            if change.up.shape[1] and change.scale * weight
        ]
        total = terms.sum(terms.weights)
        assert isinstance(total, LowRank)  # all changes have factors
        with one_thread():
            found = singular(total.up, total.down, total.scale)
            if not len(found):
                return LowRank(torch.zeros(terms.shape[0], 1), torch.zeros(1, terms.shape[1]), 1.0)
            own = self._own(len(found), len(changes))
            common = found.cut(len(found) - own * len(changes))
            parts = [_outside(change, common, own) for change in changes] if own else []
            parts.append(common)
            values = torch.cat([part.values for part in parts])
            left, right = (polar(torch.cat(side, dim=1)) for side in ([p.u for p in parts], [p.v for p in parts]))
            return LowRank(left, right.mT.contiguous(), self.lambda_ * float(values.mean()))

    def _own(self, rank: int, count: int) -> int:
        """Directions for each of ``count`` changes out of ``rank``: to the nearest, and no more than there are."""
        return min(round((rank - int(self.common_space_fraction * rank)) / count), rank // count)


def _outside(change: LowRank, common: Singular, count: int) -> Singular:
    """The largest singular values of a change whose outputs are projected away from the common ones."""
    largest = singular(change.up, change.down, change.scale).values[:1]
    rest = change.up - common.u @ (common.u.mT @ change.up)
    beside = float(largest[0]) if len(largest) else 0.0
    return singular(rest, change.down, change.scale, beside=beside).cut(count)


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """Iso-CTS."""
    return [IsoCts]
