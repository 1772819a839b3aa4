"""The modes by name, and how they are spelled."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from lorahub.engine.rounding.exact import Exact
from lorahub.engine.rounding.fast import FAST
from lorahub.engine.rounding.mode import Mode
from lorahub.engine.rounding.peft import Peft
from lorahub.engine.rounding.stochastic import Stochastic
from lorahub.errors import UsageError

__all__ = ["MODES", "STOCHASTIC", "read_mode"]

MODES: Mapping[str, Mode] = MappingProxyType(
    {mode.spelled: mode for mode in (FAST, Exact(), Peft(), Peft(safe=True), Stochastic(0))}
)
"""Spelling -> mode; ``stochastic`` takes any other seed too."""

STOCHASTIC = "stochastic(SEED)"
_SEEDED = re.compile(r"stochastic\((-?[0-9]{1,18})\)")


def read_mode(text: str) -> Mode:
    """The mode that a text spells.

    Raises:
        UsageError: none is.
    """
    if found := MODES.get(text):
        return found
    if seeded := _SEEDED.fullmatch(text):
        return Stochastic(int(seeded[1]))
    named = [name for name in MODES if not _SEEDED.fullmatch(name)]
    raise UsageError(f"{text!r} is no mode", f"one of {', '.join(named)}, {STOCHASTIC}")
