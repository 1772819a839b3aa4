"""Sums of adapters as values: ``0.7 * a + 0.3 * b - c``, lazy and exact.

A combination is the adapters and their weights, and nothing is computed for it: merging adds its adapters to the base
in one rounding, and composing makes one adapter of them.  Weights are those of weight space, for every kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from lorahub.errors import UsageError

__all__ = ["Combinable", "Combination"]


class Combinable:
    """What can be multiplied with a number and added."""

    __slots__ = ()

    def _terms(self) -> tuple[tuple[Combinable, float], ...]:
        return ((self, 1.0),)

    def __mul__(self, number: object) -> Combination:
        if isinstance(number, bool) or not isinstance(number, int | float):
            return NotImplemented
        if not math.isfinite(number):
            raise UsageError(f"an adapter cannot be multiplied with {number}", "give a finite number")
        return Combination(terms=tuple((each, weight * number) for each, weight in self._terms()))

    __rmul__ = __mul__

    def __truediv__(self, number: float) -> Combination:
        if number == 0:
            raise UsageError("an adapter cannot be divided by zero", "give another number")
        return self * (1 / number)

    def __neg__(self) -> Combination:
        return self * -1.0

    def __add__(self, other: object) -> Combination:
        if not isinstance(other, Combinable):
            return NotImplemented
        return Combination(terms=_together((*self._terms(), *other._terms())))

    def __radd__(self, other: object) -> Combination:
        """``sum([...])`` begins at 0."""
        return self * 1.0 if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: object) -> Combination:
        return self + -other if isinstance(other, Combinable) else NotImplemented


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Combination(Combinable):
    """Adapters and their weights, in order; each adapter once.

    Attributes:
        terms: (adapter, weight).
    """

    terms: tuple[tuple[Combinable, float], ...]

    def _terms(self) -> tuple[tuple[Combinable, float], ...]:
        return self.terms


def _together(terms: tuple[tuple[Combinable, float], ...]) -> tuple[tuple[Combinable, float], ...]:
    """The same adapter once, with all its weights."""
    found: dict[int, tuple[Combinable, float]] = {}
    for each, weight in terms:
        found[id(each)] = (each, found[id(each)][1] + weight if id(each) in found else weight)
    return tuple(found.values())
