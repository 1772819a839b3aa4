"""Which way back takes how much memory, and which of them to go: pure functions of sizes.

How many elements a journal has to mention follows from the size of the change: weights are about normal, and rounding
loses something where the sum lies in a coarser part of the floating-point grid than the weight did.  Measured on normal
weights with normal low-rank changes in bfloat16 and float16: 0.2, 1.2 and 7.6 % of all elements at a change of 0.001,
0.01 and 0.1 times the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lorahub.engine.planning.steps import Step
from lorahub.engine.undoing.keeper import Policy

__all__ = ["LARGE", "TYPICAL", "can_journal", "choose", "held_bytes", "journal_share"]

TYPICAL = 0.1
"""The relative change that a size is predicted for where the weights are not known: most adapters make smaller ones."""

LARGE = 0.1
"""The share of its parameter that a journal may take; where it would take more, the parameter is copied."""

_WIDTHS = {"BF16": 2, "F16": 2, "F32": 4}
_FASTEST: tuple[Policy, ...] = ("copy", "journal", "host", "reload")


def journal_share(relative: float, width: int) -> float:
    """Predicted bytes of a journal over the bytes of its parameter.

    Args:
        relative: norm of the change over norm of the weights.
        width: bytes of an element.
    """
    differing: float = min(0.48 * relative**0.8, 0.5)
    return (differing + min(differing + 1 / 255, 1 / 8)) / width


def can_journal(step: Step, relative: float = TYPICAL) -> bool:
    """Whether a journal serves: no change looks at the weight, and codes and factors take less than a copy."""
    width = _WIDTHS.get(step.after.dtype)
    additive = all(term.additive and not term.replaces and not term.siblings for term in step.terms)
    if width is None or not additive or step.made_whole or not step.terms:
        return False
    share = journal_share(relative, width)
    factors = sum(term.nbytes for term in step.terms)
    return share <= LARGE and factors + share * step.after.nbytes <= step.after.nbytes / 2


def held_bytes(steps: Iterable[Step], policy: Policy, relative: Mapping[str, float] | None = None) -> int:
    """Predicted bytes that undoing needs besides the adapters, under one policy.

    Args:
        steps: of the plan.
        policy: which; "auto" at most copies, "none" and "reload" hold nothing.
        relative: parameter -> size of the change over size of the weights; ``TYPICAL`` where it is not known.
    """
    if policy in {"none", "reload"}:
        return 0
    total = 0
    for step in steps:
        size = (relative or {}).get(step.out, TYPICAL)
        if policy == "journal" and can_journal(step, size):
            total += int(journal_share(size, _WIDTHS[step.after.dtype]) * step.after.nbytes)
        else:
            total += step.before.nbytes if step.before else 0
    return total


def choose(needs: Mapping[Policy, int], rooms: Mapping[Policy, int | None]) -> Policy:
    """The fastest way back that leaves half of the free memory free, or else the one that needs least.

    Args:
        needs: policy -> bytes it would hold, for each that is possible.
        rooms: policy -> bytes that are free where it holds them, None where nobody knows.
    """
    possible = [policy for policy in _FASTEST if policy in needs]
    for policy in possible:
        room = rooms.get(policy)
        if room is None or needs[policy] <= room // 2:
            return policy
    return min(possible, key=lambda policy: needs[policy])
