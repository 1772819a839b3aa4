"""One scale of colours for numbers: dark violet over teal to yellow.

Its lightness rises evenly, so that it also reads without colour vision and printed in grey.  The steps are even in
OKLab (bottosson.github.io/posts/oklab) and kept as sRGB, so that every machine has the same.
"""

from __future__ import annotations

import math

__all__ = ["STEPS_256", "STOPS", "at", "at_256", "from_256", "hexadecimal", "ink_on"]

Colour = tuple[int, int, int]

STOPS: tuple[Colour, ...] = (
    (0x33, 0x16, 0x6A),
    (0x28, 0x33, 0x80),
    (0x00, 0x51, 0x85),
    (0x07, 0x6A, 0x7E),
    (0x11, 0x80, 0x7D),
    (0x29, 0x96, 0x7A),
    (0x50, 0xA9, 0x72),
    (0x79, 0xBB, 0x61),
    (0xA5, 0xCA, 0x4F),
    (0xD1, 0xD7, 0x43),
    (0xF8, 0xE4, 0x45),
)
"""From 0 to 1 in even steps."""

STEPS_256 = (17, 18, 24, 30, 36, 71, 107, 113, 149, 185, 227)
"""The same scale among a terminal's 256 colours: the nearest ones would jump in hue, these only rise."""

_CUBE = (0, 95, 135, 175, 215, 255)
"""Levels of the 6 x 6 x 6 cube that such terminals have, from colour 16 on."""


def at(share: float) -> Colour:
    """The colour at ``share`` of the scale, 0 to 1; what lies outside takes the nearer end."""
    place = min(max(share, 0.0), 1.0) * (len(STOPS) - 1)
    below = min(int(place), len(STOPS) - 2)
    part = place - below
    low, high = STOPS[below], STOPS[below + 1]
    return (_mix(low[0], high[0], part), _mix(low[1], high[1], part), _mix(low[2], high[2], part))


def _mix(low: int, high: int, part: float) -> int:
    return int(low + (high - low) * part + 0.5)


def hexadecimal(colour: Colour) -> str:
    """``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def ink_on(colour: Colour) -> str:
    """White or nearly black: which of the two has the greater contrast to ``colour`` (WCAG 2)."""
    bright = _luminance(colour) + 0.05
    return "#ffffff" if 1.05 / bright > bright / (_luminance(_DARK) + 0.05) else hexadecimal(_DARK)


_DARK: Colour = (0x10, 0x14, 0x1A)


def _luminance(colour: Colour) -> float:
    red, green, blue = (math.pow(part / 255, 2.2) for part in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def at_256(share: float) -> int:
    """The number of the colour at ``share`` of the scale, for terminals of 256 colours."""
    return STEPS_256[min(int(min(max(share, 0.0), 1.0) * len(STEPS_256)), len(STEPS_256) - 1)]


def from_256(number: int) -> Colour:
    """The colour behind such a number, 16 to 231."""
    red, green, blue = (number - 16) // 36, (number - 16) // 6 % 6, (number - 16) % 6
    return _CUBE[red], _CUBE[green], _CUBE[blue]
