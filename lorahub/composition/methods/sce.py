"""SCE: select the elements that differ most between the changes, weigh by what is left, erase minority signs.

https://arxiv.org/abs/2408.07990 (FuseChat).  The changes, each at its weight, are compared element by element: the
share ``select_topk`` of largest variance stays, for all of them.  Each then counts by its mean square, relative to the
others.  Elements whose sign is not that of their sum are erased, and what is left is divided by the coefficients of
those that agree, as the authors' code in mergekit has it.

mergekit knows no weights here, takes the share among elements of any variance at all, and for changes whose mean
squares sum to less than 1e-6, as those of adapters often do, weighs all alike; this does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final, get_args

from lorahub.composition.algebra.elements import elected_mean, expect_finite, kept_count, largest, pieces
from lorahub.composition.algebra.truncate import one_thread
from lorahub.composition.method import Basis, ElementMethod, Method, Terms
from lorahub.composition.methods.thinning import expect_choice, expect_share
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["Sce"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sce(ElementMethod):
    """Select, calculate, erase.  Peak memory: the stack, the variances, and as much again to select among them.

    An adapter that leaves the target alone is one that differs from the others: its zeros are part of the variance,
    and of nothing else.

    Attributes:
        select_topk: the share of elements that stays, over 0 and up to 1; one number for all adapters.
        basis: where elements are looked at.
    """

    select_topk: float = 1.0
    basis: Basis = "dense"

    name: ClassVar[str] = "sce"
    title: ClassVar[str] = "SCE: select, calculate, erase"
    source: ClassVar[str] = "https://arxiv.org/abs/2408.07990"
    count: ClassVar[tuple[int, int | None]] = (2, None)

    def __post_init__(self) -> None:
        expect_share("select_topk", self.select_topk)
        expect_choice("basis", self.basis, get_args(Basis))

    def elements(self, stack: torch.Tensor, terms: Terms) -> torch.Tensor:
        """Select, calculate, erase."""
        with one_thread():
            for change, weight in zip(stack, terms.weights, strict=True):
                expect_finite(change)
                change.mul_(weight)
            if self.select_topk < 1:
                erased = _most_varied(stack, self.select_topk).logical_not_()
                for change in stack:
                    change.masked_fill_(erased, 0.0)
            squares = [float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2 for change in stack]
            total = sum(squares) or 1.0  # nothing is left: any coefficient gives nothing
            return elected_mean(stack, [each / total for each in squares], weigh_votes=False, divisor="weights")


def _most_varied(stack: torch.Tensor, share: float) -> torch.Tensor:
    """Which elements vary most over the changes; booleans in the shape of one."""
    variances = torch.empty_like(stack[0])
    flat, marks = stack.view(len(stack), -1), variances.view(-1)
    for cells in pieces(len(marks)):
        marks[cells] = flat[:, cells].double().var(0, correction=0)
    return largest(variances, kept_count(share, variances.numel()))


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """SCE."""
    return [Sce]
