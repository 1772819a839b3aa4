"""``stochastic(SEED)``: up or down at random, so that what a coarse storage cannot hold is kept on average.

A sum that lies a third of the way between two stored numbers becomes the upper one in one of three cases, and a sum
that can be stored is stored.  The random bits of an element follow from seed, parameter name and the element's place
in it alone: a counter through SplitMix64 (Steele, Lea & Flood 2014).  So the result depends on no cutting into windows,
threads, shards or devices, as far as the sums do not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lorahub.engine.folding.recipes import Factors, Recipe
from lorahub.engine.folding.sums import Sums
from lorahub.engine.planning.steps import Step
from lorahub.engine.rounding.fast import FAST, Product
from lorahub.engine.rounding.nearest import nearest
from lorahub.lazy import torch

__all__ = ["Stochastic", "uniform"]

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's constants


@final
@dataclass(frozen=True, slots=True)
class Stochastic:
    """Rounding at random; sums as in ``fast``."""

    seed: int

    @property
    def spelled(self) -> str:
        """The name with the seed."""
        return f"stochastic({self.seed})"

    def fault(self, step: Step, role: str) -> str:
        """Nothing is."""
        return ""

    def sums(self, storage: torch.dtype) -> torch.dtype:
        """As in ``fast``."""
        return FAST.sums(storage)

    def round(self, total: torch.Tensor, out: torch.Tensor, name: str, first: int) -> None:
        """To one of the two stored numbers around each sum; from below the largest one, to that."""
        if not out.is_floating_point():
            out.copy_(total)
            return
        near = nearest(total, out.dtype)
        wide = near.to(total.dtype)
        missing = total - wide
        other = _next(near, up=missing > 0)
        chance = missing.div_(other.to(total.dtype).sub_(wide))  # 0 where the other number is infinite, or none
        moved = uniform(self.seed, name, first, total) < chance
        word = _words(out.dtype)
        out.copy_(torch.where(moved, other.view(word), near.view(word)).view(out.dtype))

    def product(self, factors: Sequence[Factors], sums: Sums) -> Recipe:
        """As in ``fast``, nearest at random."""
        return Product(factors, sums)


def uniform(seed: int, name: str, first: int, like: torch.Tensor) -> torch.Tensor:
    """Random numbers in [0, 1) in the dtype of ``like``, for elements ``first`` and on of a parameter."""
    digest = hashlib.blake2b(f"{seed}\n{name}".encode(), digest_size=8).digest()
    start = int.from_bytes(digest, "little") + (first + 1) * _GOLDEN
    bits = torch.arange(like.numel(), dtype=torch.int64, device=like.device).mul_(_signed(_GOLDEN)).add_(_signed(start))
    bits = bits.bitwise_xor_(_shifted(bits, 30)).mul_(_signed(_FIRST))
    bits = bits.bitwise_xor_(_shifted(bits, 27)).mul_(_signed(_SECOND))
    bits = bits.bitwise_xor_(_shifted(bits, 31))
    kept = 24 if like.dtype == torch.float32 else 53
    return _shifted(bits, 64 - kept).to(like.dtype).mul_(2.0**-kept).view(like.shape)


def _shifted(bits: torch.Tensor, by: int) -> torch.Tensor:
    """64-bit words shifted right with zeros from the left, which torch does for no signed dtype."""
    return bits.bitwise_right_shift(by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    """A number modulo 2**64 as a signed word."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _next(tensor: torch.Tensor, *, up: torch.Tensor) -> torch.Tensor:
    """The stored number above each element, or below it: patterns of bits in order of the numbers, and one on."""
    word = _words(tensor.dtype)
    bits = tensor.view(word).to(torch.int32 if tensor.dtype.itemsize < 4 else torch.int64)
    least = torch.iinfo(word).min
    order = torch.where(bits < 0, least - bits, bits).add_(up.to(bits.dtype), alpha=2).sub_(1)
    return torch.where(order < 0, least - order, order).to(word).view(tensor.dtype)


def _words(dtype: torch.dtype) -> torch.dtype:
    """Integers of the same width."""
    return {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
