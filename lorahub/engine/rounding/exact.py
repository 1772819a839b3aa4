"""``exact``: every element is the exact sum, nearest once; one result on every machine, device, thread and shard.

What is summed is real arithmetic on the stored numbers: the weight, and of each adapter the factors' product times one
float64 number, its weight times its scale.  A sum in float32, or in float64 for float32 storage, comes with a bound on
its error; where no number within that bound rounds differently, its rounding is the exact sum's.  The few other
elements are summed again in float64 with its bound, and the very few left, among them all exact ties, without any
error: each product is split into float64 parts that lose nothing (Dekker 1971), and ``math.fsum`` adds them.

Holds for changes of low rank.  Other kinds are summed in float64 and nearest once; their own arithmetic (norms,
inverses) is PyTorch's in float64, so results may differ between machines where a sum is within its error of a tie.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lorahub.engine.folding.recipes import Factors, Recipe, Stretch
from lorahub.engine.folding.sums import Change, Sums
from lorahub.engine.folding.windows import sample
from lorahub.engine.planning.steps import Step
from lorahub.engine.rounding.fast import float32_is_float32
from lorahub.engine.rounding.nearest import nearest, round_into
from lorahub.lazy import torch

__all__ = ["Exact"]

_SLACK = 16  # roundings beyond those of the products and sums themselves, and for the bound's own arithmetic
_SPLIT = 2.0**27 + 1  # Veltkamp's constant for float64
_AT_ONCE = 1 << 20  # products of elements summed again that are held at a time


@final
@dataclass(frozen=True, slots=True)
class Exact:
    """Correct rounding."""

    @property
    def spelled(self) -> str:
        """Its name."""
        return "exact"

    def fault(self, step: Step, role: str) -> str:
        """Float64 has nothing finer to be summed in at an acceptable speed."""
        return "it is stored in float64, and nothing faster than exact sums tells how these round" * (
            step.after.dtype == "F64" and bool(step.terms)
        )

    def sums(self, storage: torch.dtype) -> torch.dtype:
        """Float64."""
        return torch.float64

    def round(self, total: torch.Tensor, out: torch.Tensor, name: str, first: int) -> None:
        """To the nearest, ties to even."""
        round_into(total, out)

    def product(self, factors: Sequence[Factors], sums: Sums) -> Recipe:
        """See ``_Exactly``."""
        return _Exactly(factors, sums)


@final
class _Exactly:
    """Low-rank changes alone, as one product whose scales stay beside it."""

    def __init__(self, factors: Sequence[Factors], sums: Sums) -> None:
        device = sums.device
        self._up = torch.cat([each.up.to(device).double() for each in factors], 1)
        self._down = torch.cat([each.down.to(device).double() for each in factors])
        weights = [torch.full((each.up.shape[1],), each.weight, dtype=torch.float64) for each in factors]
        self._weights = torch.cat(weights).to(device)
        self._scaled = self._up * self._weights
        short = sums.storage.itemsize < 4 and device.type == "cpu" and float32_is_float32()
        self._dtype = torch.float32 if short else torch.float64
        self._made = self._scaled.to(self._dtype).contiguous(), self._down.to(self._dtype).contiguous()
        self._long, self._high = self._scaled.norm(dim=1), self._down.norm(dim=0)

    def fold(self, at: Stretch, sums: Sums) -> Change:
        """See ``Recipe``."""
        pick, share = sample(at.out.shape)
        kept = at.start(pick, torch.float64).flatten(1)
        added = self._scaled[at.rows][pick] @ self._down
        for part in at.parts():
            self._window(part)
        return Change.of(kept, added, at.out[pick].double().flatten(1), share)

    def _window(self, at: Stretch) -> None:
        rows = at.out.shape[0]
        up, down = self._made
        before = at.untouched.reshape(rows, -1)
        total = at.scratch("total", self._dtype).view(rows, -1).copy_(before)
        total.addmm_(up[at.rows], down)
        spare = at.scratch("spare", self._dtype).view(rows, -1)
        margin = self._margin(total, at, spare)
        high = nearest(torch.add(total, margin, out=spare), at.out.dtype)
        low = nearest(torch.sub(total, margin, out=margin), at.out.dtype)
        doubtful = (_words(low) != _words(high)).nonzero()
        doubtful = doubtful[torch.isfinite(total[doubtful[:, 0], doubtful[:, 1]])]
        if not len(doubtful):
            round_into(total.view(at.out.shape), at.out)
            return
        place = doubtful[:, 0], doubtful[:, 1]
        known = _words(before)[place].view(before.dtype).double()
        result = nearest(total, at.out.dtype)
        _words(result)[place] = _words(self._again(known, doubtful, at.rows.start, at.out.dtype))
        at.out.copy_(result.view(at.out.shape))

    def _margin(self, total: torch.Tensor, at: Stretch, spare: torch.Tensor) -> torch.Tensor:
        """More than what each sum can be off by.

        With n roundings on any path and unit roundoff u, a sum of products in any order is off by at most g = n*u/(1 -
        n*u) times the sum of the absolute summands (Higham 2002, section 3.1): here |w| and at most the product of the
        norms of row and column, and |w| is at most the absolute sum plus the change.
        """
        g = _gamma(self._up.shape[1] + _SLACK, self._dtype)
        margin = at.scratch("margin", self._dtype).view(total.shape)
        torch.outer((self._long[at.rows] * (2.0 * g)).to(self._dtype), self._high.to(self._dtype), out=margin)
        tiny = torch.finfo(self._dtype).smallest_normal * (self._up.shape[1] + _SLACK)  # where hardware flushes to zero
        return margin.add_(torch.abs(total, out=spare), alpha=g).add_(tiny)

    def _again(self, known: torch.Tensor, places: torch.Tensor, first: int, storage: torch.dtype) -> torch.Tensor:
        """Elements by (row, column): in float64, and exactly where that leaves doubt."""
        parts = []
        rank = max(self._up.shape[1], 1)
        for here in range(0, len(places), max(_AT_ONCE // rank, 1)):
            there = slice(here, here + max(_AT_ONCE // rank, 1))
            parts.append(self._few(known[there], places[there, 0] + first, places[there, 1], storage))
        return torch.cat(parts)

    def _few(self, known: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
        products = self._scaled[rows] * self._down[:, cols].T
        total = known + products.sum(1) + 0.0  # where nothing is left, it is left without a sign
        size = known.abs() + products.abs().sum(1)
        margin = size * _gamma(self._up.shape[1] + _SLACK, torch.float64) + torch.finfo(torch.float64).smallest_normal
        result = nearest(total, storage)
        low, high = nearest(total - margin, storage), nearest(total + margin, storage)
        doubtful = ((_words(low) != _words(high)) & (size > 0)).nonzero().flatten()
        if len(doubtful):
            terms = self._terms(known[doubtful], rows[doubtful], cols[doubtful])
            _words(result)[doubtful] = _words(_summed_exactly(terms, storage))
        return result

    def _terms(self, known: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor) -> torch.Tensor:
        """Float64 numbers whose exact sum is the element: [elements, 1 + 4 * rank]."""
        down = self._down[:, cols].T
        high, low = _exact_product(self._up[rows], self._weights.expand(len(rows), -1))
        parts = [*_exact_product(high, down), *_exact_product(low, down)]
        return torch.cat([known[:, None], *parts], 1)


def _gamma(roundings: int, dtype: torch.dtype) -> float:
    share = roundings * float(torch.finfo(dtype).eps) / 2
    return share / (1 - share)


def _exact_product(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The product and its rounding error (Dekker 1971), which are exact as long as neither over- nor underflows."""
    product = one * other
    a, b = _halves(one)
    c, d = _halves(other)
    return product, ((a * c - product) + a * d + b * c) + b * d


def _halves(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two numbers of at most 26 bits whose sum it is (Veltkamp)."""
    wide = value * _SPLIT
    high = wide - (wide - value)
    return high, value - high


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bits as integers, which every dtype can be compared and indexed by."""
    word: torch.dtype = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.view(word)


def _summed_exactly(terms: torch.Tensor, storage: torch.dtype) -> torch.Tensor:
    """The exact sum of each row, nearest once to ``storage``."""
    total, lossless = _summed(terms)
    left = (~lossless).nonzero().flatten()
    if len(left):
        odd = [_to_odd(row) for row in terms[left].tolist()]
        total[left] = torch.tensor(odd, dtype=torch.float64, device=terms.device)
    return nearest(total, storage)


def _summed(terms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of each row, and whether it is that without any rounding, by each sum's exact error (Knuth's TwoSum)."""
    total = terms[:, 0].clone()
    lossless = torch.ones_like(total, dtype=torch.bool)
    for column in terms[:, 1:].unbind(1):
        larger = total + column
        part = larger - total
        lossless &= ((total - (larger - part)) + (column - part)) == 0
        total = larger
    return total, lossless


def _to_odd(row: Sequence[float]) -> float:
    """A float64 number that rounds to any shorter format as the exact sum of a row does.

    ``fsum`` gives the nearest float64 number, which nearest again may be wrong.  Of that number and the one beyond the
    exact sum, the one with an odd last bit is taken instead: rounding it again is right (Boldo & Melquiond 2008).
    """
    total = math.fsum(row)
    rest = math.fsum((*row, -total))
    if rest and not struct.pack("<d", total)[0] & 1:
        return math.nextafter(total, math.copysign(math.inf, rest))
    return total
