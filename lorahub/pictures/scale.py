"""Where a number lies between the least and the greatest, and how numbers and labels are written in pictures."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

__all__ = ["Scale", "label", "number", "shortened"]

_SPREAD = 100
"""Greatest over least from which on a linear scale would show most numbers alike."""

_DECADES = 4
"""What lies further than this below the greatest is shown as the least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """A range of numbers, ``low`` to ``high``, linear or logarithmic."""

    low: float
    high: float
    logarithmic: bool = False

    @classmethod
    def of(cls, values: Iterable[float], *, low: float | None = None, high: float | None = None) -> Self:
        """The scale for ``values``: from 0 on where none is negative, logarithmic where they span over two decades.

        Args:
            values: all that will be shown; what is not finite does not count.
            low: the lower end, where it is known; the scale is then linear.
            high: the upper end, in the same way.
        """
        found = [value for value in values if math.isfinite(value)]
        positive = [value for value in found if value > 0]
        least, greatest = min(found, default=0.0), max(found, default=1.0)
        if low is None and high is None and positive and least >= 0 and greatest > _SPREAD * min(positive):
            return cls(low=max(min(positive), greatest / 10**_DECADES), high=greatest, logarithmic=True)
        start = low if low is not None else min(least, 0.0)
        end = high if high is not None else greatest
        return cls(low=start, high=end if end > start else start + 1.0)

    def share(self, value: float) -> float:
        """Where ``value`` lies, 0 to 1."""
        if self.logarithmic:
            value, low, high = math.log(max(value, self.low)), math.log(self.low), math.log(self.high)
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 1.0

    def ticks(self, count: int = 5) -> list[tuple[float, float]]:
        """(share, value) of ``count`` numbers to write beside the scale, the least first."""
        shares = [step / (count - 1) for step in range(count)]
        if self.logarithmic:
            return [(share, self.low * (self.high / self.low) ** share) for share in shares]
        return [(share, self.low + (self.high - self.low) * share) for share in shares]


def number(value: float, digits: int = 2) -> str:
    """A number in about four characters: ``0.12``, ``3.4``, ``120``, ``1e-05``."""
    if value == 0 or 0.001 <= abs(value) < 10000:
        text = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
        return "0" if text in ("-0", "0.0") else text
    return f"{value:.0e}"


def label(text: str) -> str:
    """``text`` on one line, without what could drive a terminal or break a picture."""
    return "".join(
        each if unicodedata.category(each)[0] != "C" and each not in "\u2028\u2029" else "?" for each in text
    )


def shortened(text: str, room: int) -> str:
    """``text`` in at most ``room`` characters, the middle left out where it is longer: both ends tell most."""
    if len(text) <= room:
        return text
    if room < 4:
        return text[:room]
    tail = (room - 1 + 1) // 2
    return f"{text[: room - 1 - tail]}\u2026{text[len(text) - tail :]}"
