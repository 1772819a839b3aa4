"""Inner products row by row or column by column, and sums whose weights differ from row to row or column to column.

A row of ``up @ down`` is a row of ``up`` times ``down``, so that scaling rows leaves a change its rank.  Changes
without factors are taken as the tensors they are.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from lorahub.composition.algebra.truncate import one_thread
from lorahub.composition.method import Change, Terms
from lorahub.deltas.delta import LowRank
from lorahub.lazy import torch

__all__ = ["Along", "line_grams", "line_sum"]

Along: TypeAlias = Literal["rows", "columns"]
"""Which vectors of a matrix [out, in] are looked at: its rows, one for each output, or its columns."""


def line_grams(terms: Terms, along: Along) -> torch.Tensor:
    """Inner products of the changes for each row or column: [lines, n, n], float64."""
    count, lines = len(terms.changes), terms.shape[0 if along == "rows" else 1]
    grams = torch.zeros(lines, count, count, dtype=torch.float64)
    with one_thread():
        for one in range(count):
            for other in range(one + 1):
                grams[:, one, other] = grams[:, other, one] = _products(terms, one, other, along)
    return grams


def line_sum(terms: Terms, coefficients: torch.Tensor, along: Along) -> Change:
    """The changes added, each row or column times a number of its own.

    Args:
        terms: the changes, of a matrix.
        coefficients: [n, lines], float64.
        along: what the lines are.

    Returns:
        Factors where all changes have them, else a float32 tensor.
    """
    with one_thread():
        if not terms.factored:
            total = torch.zeros(terms.shape, dtype=torch.float64)
            for number, each in enumerate(coefficients):
                total += (each[:, None] if along == "rows" else each[None, :]) * terms.dense(number).double()
            return total.float()
        ups, downs = [], []
        for change, each in zip(terms.factors(), coefficients, strict=True):
            up, down = change.up.double() * change.scale, change.down.double()
            ups.append(each[:, None] * up if along == "rows" else up)
            downs.append(down if along == "rows" else down * each[None, :])
        return LowRank(torch.cat(ups, dim=1), torch.cat(downs), 1.0)


def _products(terms: Terms, one: int, other: int, along: Along) -> torch.Tensor:
    """One inner product for each line."""
    first, second = terms.changes[one], terms.changes[other]
    if not (isinstance(first, LowRank) and isinstance(second, LowRank)):
        return (terms.dense(one).double() * terms.dense(other).double()).sum(1 if along == "rows" else 0)
    sides = [(each.up.double(), each.down.double()) for each in (first, second)]
    (up, down), (other_up, other_down) = sides if along == "rows" else [(down.mT, up.mT) for up, down in sides]
    products: torch.Tensor = ((up @ (down @ other_down.mT)) * other_up).sum(1) * (first.scale * second.scale)
    return products
