"""How much of a change survives being stored, and when that is too little.

Rounding to 16 or 8 bits is no noise around a change: a change smaller than half a step of the storage is gone, and the
smaller it is beside its weight, the more of it.  Measured while merging, on a sample of each parameter's rows
(``windows.sample``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

from lorahub.engine.sums import Change
from lorahub.errors import Degraded
from lorahub.findings import Finding, Verdict

__all__ = ["LOST", "REFUSE", "WARN", "Retention", "judge", "measured", "overall"]

LOST = "delta-lost"
"""Code of the finding that rounding takes a noticeable part of the changes away."""

WARN, REFUSE = 0.1, 0.5
"""Shares of all changes that are lost, as ``Retention.lost``, from which that is said, and from which it is refused."""

_INSTEAD = "attach the adapter live, or store finer: --dtype float32 (or float16, finer than bfloat16 by eight times)"


@dataclass(frozen=True, slots=True)
class Retention:
    """What is left of a change dW where the stored weights change by dW_eff.

    What rounding adds besides is noise, which outputs average out; a gain is what they see.

    Attributes:
        gain: <dW_eff, dW> / ||dW||^2: how much of the change is there, along itself; 1 is all.
        error: ||dW_eff - dW|| / ||dW||: how far off the stored elements are, noise included.
    """

    gain: float
    error: float

    @property
    def lost(self) -> float:
        """The share of the change that is not there, or there too much."""
        return abs(1 - self.gain)

    @classmethod
    def of(cls, change: Change) -> Self | None:
        """What sums say; None where nothing was to change, or nothing was measured."""
        if not change.wanted > 0:
            return None
        return cls(change.kept / change.wanted, math.sqrt(change.lost / change.wanted))


def measured(changes: Mapping[str, Change]) -> dict[str, Retention]:
    """By parameter, where there is something to tell."""
    return {name: found for name, change in changes.items() if (found := Retention.of(change))}


def overall(changes: Mapping[str, Change]) -> Retention | None:
    """Of all changes together, each element counting alike."""
    return Retention.of(sum(changes.values(), Change()))


def judge(changes: Mapping[str, Change], *, allowed: Collection[str] = ()) -> tuple[Finding, ...]:
    """What to say of changes that are about to be kept.

    Raises:
        Degraded: half of them or more is lost, and that is not allowed.
    """
    whole = overall(changes)
    if whole is None or not whole.lost >= WARN:
        return ()
    each = measured(changes)
    worst = sorted(each, key=lambda name: -each[name].lost)
    message = (
        f"storing the merged weights loses {whole.lost:.0%} of the change; most in {worst[0]}: "
        f"{each[worst[0]].lost:.0%}"
    )
    finding = Finding(
        code=LOST,
        axis="policy",
        level=Verdict.DEGRADED if whole.lost >= REFUSE else Verdict.UNVERIFIED,
        message=message,
        where=tuple(name for name in worst if each[name].lost >= WARN),
        remedy=_INSTEAD,
        allowable=True,
    )
    if finding.level is Verdict.DEGRADED and LOST not in allowed:
        raise Degraded(message, f"{_INSTEAD}; to go on all the same: --allow {LOST}", (finding,))
    return (finding,)
