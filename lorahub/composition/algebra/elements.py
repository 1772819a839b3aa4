"""Rules for single elements of changes: which to keep, which signs win, and how what is kept is added.

Everything works on tensors of any shape and float dtype, in place where a name says so by returning None.  Sums are
made in float64, a piece of the tensors at a time, and rounded once to the dtype of the changes: besides its result no
function holds more than one tensor of the size of one change, for the magnitudes that it selects among.  Nothing is
sorted whole: a bound is found by partition.  Results do not depend on the number of threads.

Knows no adapters, no bases of coordinates and no methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal, TypeAlias

from lorahub.errors import NotFinite, UsageError
from lorahub.lazy import torch

__all__ = [
    "Divisor",
    "SignMethod",
    "drop",
    "drop_by_rank",
    "elected_mean",
    "expect_finite",
    "keep_between",
    "kept_count",
    "largest",
    "match_l1",
    "normalised",
    "pieces",
    "trim",
    "weighted_sum",
]

SignMethod: TypeAlias = Literal["total", "frequency"]
"""What a sign's votes are, as PEFT's ``majority_sign_method``: the values themselves, or one for each of them."""

Divisor: TypeAlias = Literal["count", "weights", "one"]
"""What a sum over agreeing elements is divided by: how many agree, the sum of their weights, or nothing."""

PIECE = 1 << 16
"""Elements of one change that are worked on at a time, in float64: as many as stay in a core's cache."""


# --------------------------------------------------------------------------------------------------- which are kept


def kept_count(density: float, length: int) -> int:
    """How many of ``length`` elements a density keeps: rounded down, but never to none.

    The density is read as it is written: 0.29 of 100 are 29, although 0.29 * 100 is less in binary.  PEFT, which
    rounds the binary product down, keeps one less there, and none of a tensor smaller than 1 / density.
    """
    return min(length, max(1, int(Fraction(str(density)) * length)))


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Which ``count`` elements have the largest magnitude; of equal ones the first.

    Args:
        values: contiguous and without NaN; not written to.
        count: how many, 0 to all.

    Returns:
        Booleans in the shape of ``values``, exactly ``count`` of them true.  Holds one copy of ``values`` meanwhile.
    """
    length = values.numel()
    kept = torch.zeros(values.shape, dtype=torch.bool)
    if count <= 0:
        return kept
    if count >= length:
        return kept.fill_(True)
    magnitudes = values.abs().view(-1).numpy()
    magnitudes.partition(length - count)  # linear, and in place; torch's kthvalue and topk carry indices along
    bound = float(magnitudes[length - count])
    del magnitudes
    flat, marks = values.view(-1), kept.view(-1)
    for cells in pieces(length):
        marks[cells] = flat[cells].abs() > bound
    missing = count - int(kept.sum())
    for cells in pieces(length):
        level = flat[cells].abs() == bound
        level &= level.cumsum(0) <= missing
        marks[cells] |= level
        missing -= int(level.sum())
        if not missing:
            break
    return kept


def trim(change: torch.Tensor, density: float) -> None:
    """Set all but the share ``density`` of the elements of largest magnitude to zero."""
    if density < 1:
        change.masked_fill_(largest(change, kept_count(density, change.numel())).logical_not_(), 0.0)


def keep_between(change: torch.Tensor, density: float, gamma: float) -> None:
    """Set to zero the share ``gamma`` of largest magnitude, and the smallest, such that the share ``density`` stays.

    Where both do not fit into the whole, ``density`` holds and fewer of the largest go.
    """
    length = change.numel()
    if density >= 1 or not length:
        return
    count = kept_count(density, length)
    outliers = min(int(Fraction(str(gamma)) * length), length - count)
    kept = largest(change, count + outliers)
    kept &= largest(change, outliers).logical_not_()
    change.masked_fill_(kept.logical_not_(), 0.0)


def drop(change: torch.Tensor, density: float, generator: torch.Generator, *, rescale: bool) -> None:
    """Keep each element with probability ``density``, divided by that where ``rescale`` asks for it.

    One uniform number is drawn for each element, in the order of memory.
    """
    if density >= 1:
        return
    flat = change.view(-1)
    for cells in pieces(len(flat)):
        piece = flat[cells]
        piece.masked_fill_(torch.rand(len(piece), generator=generator) >= density, 0.0)
        if rescale:
            piece.div_(density)


def drop_by_rank(
    change: torch.Tensor, density: float, epsilon: float, generator: torch.Generator, *, rescale: bool
) -> None:
    """Keep elements with a probability that rises with their magnitude's rank in their row; a vector is one row.

    It rises evenly from ``density - epsilon`` for the smallest to ``density + epsilon`` for the largest of a row, of
    equal ones in their order.  Rows are sorted a few at a time.

    Args:
        change: [rows, columns] or [length].
        density: the mean probability.
        epsilon: half the width of the window of probabilities.
        generator: drawn from once for each element, in the order of memory.
        rescale: divide what is kept by its probability.
    """
    if density >= 1 or not change.numel():
        return
    rows = change.view(1, -1) if change.dim() == 1 else change
    length = rows.shape[1]
    rising = torch.linspace(density - epsilon, density + epsilon, length, dtype=torch.float64)
    if length == 1:
        rising.fill_(density)
    step = max(1, PIECE // length)
    for start in range(0, rows.shape[0], step):
        band = rows[start : start + step]
        order = band.abs().sort(dim=1, stable=True).indices
        chance = torch.empty(band.shape, dtype=torch.float64).scatter_(1, order, rising.expand(band.shape))
        band.masked_fill_(torch.rand(band.shape, generator=generator) >= chance, 0.0)
        if rescale:
            band.div_(chance)


def match_l1(change: torch.Tensor, norm: float) -> None:
    """Scale a change to the L1 norm that it had; one of which nothing is left stays zero."""
    left = l1_norm(change)
    if left:
        change.mul_(norm / left)


def l1_norm(change: torch.Tensor) -> float:
    """The sum of magnitudes, in float64."""
    return float(torch.linalg.vector_norm(change, 1, dtype=torch.float64))


# -------------------------------------------------------------------------------------------------- how they are added


def weighted_sum(stack: torch.Tensor, coefficients: Sequence[float]) -> torch.Tensor:
    """``sum of c_i * stack[i]``; a new tensor of the stack's dtype."""
    result = torch.empty_like(stack[0])
    flat, sums = stack.view(len(stack), -1), result.view(-1)
    for cells in pieces(len(sums)):
        total = torch.zeros(len(sums[cells]), dtype=torch.float64)
        for change, coefficient in zip(flat, coefficients, strict=True):
            total.add_(change[cells], alpha=coefficient)
        sums[cells] = total
    return result


def elected_mean(
    stack: torch.Tensor,
    weights: Sequence[float],
    *,
    by: SignMethod = "total",
    weigh_votes: bool = True,
    undecided: Literal["none", "positive"] = "none",
    divisor: Divisor = "count",
    factor: float = 1.0,
) -> torch.Tensor:
    """The mean over those changes that have the elected sign, element by element.

    A zero votes for no sign and agrees with none, so that a change that leaves an element alone is not counted.

    Args:
        stack: [n, ...]; not written to.
        weights: one for each change; its elements are added at that weight.
        by: what counts for a sign.
        weigh_votes: changes vote at their weight, by which one of negative weight votes for the opposite.
        undecided: the sign where the votes cancel; with "none" nothing agrees, and the result there is zero.
        divisor: what the sum is divided by; a sum of weights that is zero divides by one.
        factor: multiplies the result.
    """
    result = torch.empty_like(stack[0])
    flat, means = stack.view(len(stack), -1), result.view(-1)
    scale = torch.tensor(list(weights), dtype=torch.float64)[:, None]
    for cells in pieces(len(means)):
        values = flat[:, cells].double()
        weighted = values * scale
        voters = weighted if weigh_votes else values
        votes = (voters if by == "total" else voters.sign()).sum(0)
        elected = votes.sign() if undecided == "none" else torch.where(votes >= 0, 1.0, -1.0)
        agreeing = (voters.sign() * elected > 0).double()
        mean = weighted.mul_(agreeing).sum(0)
        if divisor != "one":
            by_what = (agreeing if divisor == "count" else agreeing * scale).sum(0)
            mean.div_(by_what.masked_fill_(by_what == 0, 1.0))
        means[cells] = mean.mul_(factor)
    return result


def normalised(weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum.

    Raises:
        UsageError: they sum to zero.
    """
    total = sum(weights)
    if not total:
        raise UsageError("weights that sum to zero cannot be normalised", "leave normalize out, or change the weights")
    return [weight / total for weight in weights]


# ------------------------------------------------------------------------------------------------------------- passing


def expect_finite(change: torch.Tensor) -> None:
    """Refuse NaN and infinity, which a mask could hide.

    Raises:
        NotFinite: there are some.
    """
    if change.numel() and not math.isfinite(float(torch.linalg.vector_norm(change, math.inf))):
        raise NotFinite("an adapter holds NaN or infinity", "look: lorahub inspect --weights ADAPTER")


def pieces(length: int) -> Iterator[slice]:
    """Slices of at most ``PIECE`` elements that cover ``length``."""
    for start in range(0, length, PIECE):
        yield slice(start, min(start + PIECE, length))
