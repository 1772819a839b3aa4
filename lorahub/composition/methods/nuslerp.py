"""NuSLERP: mergekit's SLERP of task vectors, its place given by the weights; flattened, or row by row.

Rows of different changes lie at different angles, but scaling rows of ``up`` or columns of ``down`` leaves a change its
rank, so that this is exact on factors as well.  A convolution's kernel is flattened into the columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.algebra.angles import PARALLEL, Scope, between, cosines, known_scope, shares
from lorahub.composition.algebra.rows import Along, line_grams, line_sum
from lorahub.composition.method import Change, Method, Terms
from lorahub.composition.methods.thinning import expect_choice
from lorahub.errors import UsageError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["Nuslerp"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Nuslerp(Method):
    """SLERP at ``w_2 / (w_1 + w_2)`` of the way from the first change to the second.

    Attributes:
        nuslerp_flatten: one angle for the whole matrix; else one for each of its vectors.
        nuslerp_row_wise: with ``nuslerp_flatten`` off: mergekit's name for one angle for each column of [out, in],
            where off is one for each row.
        scope: whose angle, if flattened: each target's own, or that of the whole adapters.

    Raises:
        UsageError: values that do not go together; at use, weights that sum to zero.
    """

    nuslerp_flatten: bool = True
    nuslerp_row_wise: bool = False
    scope: Scope = "target"

    name: ClassVar[str] = "nuslerp"
    title: ClassVar[str] = "spherical interpolation by weight"
    source: ClassVar[str] = "mergekit, merge_method: nuslerp"
    count: ClassVar[tuple[int, int | None]] = (2, 2)

    def __post_init__(self) -> None:
        known_scope(self.name, self.scope)
        expect_choice("nuslerp_flatten", self.nuslerp_flatten, (True, False))
        expect_choice("nuslerp_row_wise", self.nuslerp_row_wise, (True, False))
        if self.nuslerp_flatten and self.nuslerp_row_wise:
            raise UsageError(
                "nuslerp: a flattened matrix has no rows", "nuslerp_row_wise goes with nuslerp_flatten = false"
            )
        if not self.nuslerp_flatten and self.scope == "adapter":
            raise UsageError("nuslerp: whole adapters have no rows", 'scope = "adapter" goes with nuslerp_flatten')

    def combine(self, terms: Terms) -> Change:
        """One angle, or one for each row or column; a vector has one."""
        first, second = shares(self.name, terms.weights)
        if not (first or second):
            return terms.sum((0.0, 0.0))
        if self.nuslerp_flatten or len(terms.shape) == 1:
            gram = terms.gram() if terms.whole is None else terms.whole
            _, cosine = cosines(gram)
            return terms.sum([float(each) for each in between(second, cosine[0, 1], parallel=PARALLEL)])
        along: Along = "columns" if self.nuslerp_row_wise else "rows"
        _, cosine = cosines(line_grams(terms, along))
        return line_sum(terms, torch.stack(between(second, cosine[:, 0, 1], parallel=PARALLEL)), along)


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """NuSLERP."""
    return [Nuslerp]
