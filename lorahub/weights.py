"""Weights as people give them for several adapters: one number for all, one for each, or by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsFloat, TypeAlias

from lorahub.errors import UsageError

__all__ = ["Numbers", "finite", "for_each"]

Numbers: TypeAlias = "float | Sequence[float] | Mapping[str, float]"
"""One number for all adapters, one for each in order, or by name."""


def for_each(given: object, count: int) -> list[Any] | Mapping[str, Any]:
    """One for each adapter, in order, or those that were given by name; what each is remains to be seen.

    Args:
        given: a number for all, something with one for each, or a mapping.
        count: of the adapters.

    Raises:
        UsageError: it is none of these, or has another number of them.
    """
    if isinstance(given, Mapping):
        return given
    if _is_number(given):
        return [given] * count
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise UsageError(
            f"weights={given!r} are no weights", 'give a number for all, a list with one for each, or {"NAME": 0.7}'
        )
    found = list(given)
    if len(found) != count:
        raise UsageError(f"{len(found)} weights for {count} adapters", "give one weight per adapter")
    return found


def finite(weight: object, *, whose: str) -> float:
    """A weight as a finite number.

    Args:
        weight: a number of Python or another library.
        whose: what it multiplies, for messages.

    Raises:
        UsageError: it is none, or NaN or infinite.
    """
    if not _is_number(weight):
        raise UsageError(f"the weight of {whose} is {weight!r}, which is no number", "give a number: 0.8")
    number = float(weight)  # type: ignore[arg-type]  # it says that it can
    if not math.isfinite(number):
        raise UsageError(f"the weight of {whose} is {number}", "give a finite number")
    return number


def _is_number(given: object) -> bool:
    """Whether something is one number; an array of one axis is none."""
    return isinstance(given, SupportsFloat) and not isinstance(given, bool) and not getattr(given, "ndim", 0)
