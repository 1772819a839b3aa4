"""Model Stock: the mean of the changes, as far from the base as their angles say (https://arxiv.org/abs/2403.19522).

``t * mean of d_i`` with ``t = n c / (1 + (n - 1) c)`` and the mean ``c`` of the cosines between any two of n changes:
parallel ones are averaged, orthogonal ones are taken for noise around the base.  A change of zero is orthogonal to all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.algebra.angles import Scope, cosines, known_scope, weighted
from lorahub.composition.algebra.rows import line_grams, line_sum
from lorahub.composition.method import Change, GramMethod, Method, Terms
from lorahub.composition.methods.thinning import expect_choice
from lorahub.errors import UsageError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["ModelStock"]

SINGULAR = 1e-6
"""Where the denominator is no further from zero than this there is no estimate; t is 0, as in mergekit."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStock(GramMethod):
    """``t * mean of w_i * d_i``; the weights multiply the changes, and are 1 in the paper.

    Attributes:
        filter_wise: a t for each row of the matrix, which is one output.
        scope: whose angles: each target's own, or those of the whole adapters.

    Raises:
        UsageError: values that do not go together.
    """

    filter_wise: bool = False
    scope: Scope = "target"

    name: ClassVar[str] = "model_stock"
    title: ClassVar[str] = "Model Stock"
    source: ClassVar[str] = "https://arxiv.org/abs/2403.19522"
    count: ClassVar[tuple[int, int | None]] = (2, None)

    def __post_init__(self) -> None:
        known_scope(self.name, self.scope)
        expect_choice("filter_wise", self.filter_wise, (True, False))
        if self.filter_wise and self.scope == "adapter":
            raise UsageError("model_stock: whole adapters have no rows", 'scope = "adapter" goes without filter_wise')

    def combine(self, terms: Terms) -> Change:
        """One t, or one for each row; a vector has one."""
        if not self.filter_wise or len(terms.shape) == 1:
            gram = terms.gram() if terms.whole is None else terms.whole
            return terms.sum(self.coefficients(gram, terms.weights))
        rows = _ratio(weighted(line_grams(terms, "rows"), terms.weights))
        shared = torch.tensor(terms.weights, dtype=torch.float64) / len(terms.weights)
        return line_sum(terms, torch.outer(shared, rows), "rows")

    def coefficients(self, gram: torch.Tensor, weights: Sequence[float]) -> list[float]:
        """``t w_i / n`` each."""
        ratio = float(_ratio(weighted(gram, weights)))
        return [ratio * weight / len(weights) for weight in weights]


def _ratio(gram: torch.Tensor) -> torch.Tensor:
    """t, [...], from inner products [..., n, n]."""
    _, cosine = cosines(gram)
    count = cosine.shape[-1]
    pairs = cosine.triu(1).sum((-2, -1))
    mean = pairs / (count * (count - 1) / 2)
    below = 1 + (count - 1) * mean
    estimated = below.abs() >= SINGULAR
    return torch.where(estimated, count * mean / torch.where(estimated, below, 1.0), 0.0)


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """Model Stock."""
    return [ModelStock]
