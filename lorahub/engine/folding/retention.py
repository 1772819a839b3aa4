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

from lorahub.engine.folding.sums import Change
from lorahub.errors import Degraded
from lorahub.findings import Finding, Verdict

__all__ = ["IDLE", "LOST", "REFUSE", "WARN", "Retention", "judge", "measured", "overall"]

LOST = "delta-lost"
"""Code of the finding that rounding takes a noticeable part of the changes away."""

IDLE = "changes-nothing"
"""Code of the finding that everything that was added is zero."""

WARN, REFUSE = 0.1, 0.5
"""Shares of all changes that are lost, as ``Retention.lost``, from which that is said, and from which it is refused."""

_INSTEAD = "attach the adapter live, or store finer: --dtype float32"

_HALF = " (or float16, finer than bfloat16 by eight times)"

_AS_FINE = frozenset({"F16", "F32", "F64"})
"""Dtypes that are no coarser than float16."""


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


def judge(
    changes: Mapping[str, Change], *, allowed: Collection[str] = (), dtypes: Collection[str] = ()
) -> tuple[Finding, ...]:
    """What to say of changes that are about to be kept.

    Args:
        changes: by parameter.
        allowed: codes of findings that are let through.
        dtypes: safetensors codes in which these parameters are stored; none where nobody knows.

    Raises:
        Degraded: half of them or more is lost, and that is not allowed.
    """
    if changes and all(change.before > 0 and not change.added > 0 for change in changes.values()):
        return (_idle(changes),)
    whole = overall(changes)
    if whole is None or not whole.lost >= WARN:
        return ()
    instead = _INSTEAD if dtypes and _AS_FINE.issuperset(dtypes) else _INSTEAD + _HALF
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
        remedy=instead,
        allowable=True,
    )
    if finding.level is Verdict.DEGRADED and LOST not in allowed:
        raise Degraded(message, f"{instead}; to go on all the same: --allow {LOST}", (finding,))
    return (finding,)


def _idle(changes: Collection[str]) -> Finding:
    return Finding(
        code=IDLE,
        axis="policy",
        level=Verdict.UNVERIFIED,
        message=f"what is added is zero wherever it was measured in the {len(changes)} parameters that change, so the "
        "result is the base: the adapter was never trained, or its factors or its scale are zero",
        where=tuple(sorted(changes)),
    )
