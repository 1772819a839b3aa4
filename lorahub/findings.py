"""What lorahub has to say about an adapter, a base, or the two together: findings, and the verdict they add up to.

A finding is one observation with a stable code, its evidence and its remedy.  The verdict of a report is the worst
level over its findings.  Nothing here decides policy; ``checks.py`` does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

__all__ = ["AXES", "Axis", "Claim", "Finding", "Verdict", "worst"]

Axis = Literal["integrity", "format", "base", "libraries", "placement", "policy"]
AXES: tuple[Axis, ...] = ("integrity", "format", "base", "libraries", "placement", "policy")


class Verdict(IntEnum):
    """How well an adapter and a base go together; larger is worse, so ``max`` gives the verdict of a whole.

    ``EXACT``         the very weights the adapter was made for
    ``COMPATIBLE``    declared to work, or only untargeted weights differ
    ``UNVERIFIED``    everything fits; the base was never recorded, or is a declared relative: goes on with a line
    ``DEGRADED``      a recorded digest differs undeclared, or part of the adapter would be lost: refused unless allowed
    ``INCOMPATIBLE``  it cannot be done
    """

    EXACT = 0
    COMPATIBLE = 1
    UNVERIFIED = 2
    DEGRADED = 3
    INCOMPATIBLE = 4

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Claim:
    """A format's or framework's claim to some files or a model: how sure (0 to 1) and why, in words."""

    score: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One observation.

    Attributes:
        code: stable, kebab-case; what ``--allow`` takes and scripts match on.
        axis: which of the six axes it belongs to.
        level: the verdict this finding alone would give; ``EXACT`` is a mere note.
        message: what is so, in one sentence, naming both sides where two values differ.
        where: the keys, targets or files concerned, in order; the first few are shown.
        remedy: what to do about it, as a command where there is one.
        allowable: whether ``--allow CODE`` may set it aside (``DEGRADED`` findings may, misfits may not).
    """

    code: str
    axis: Axis
    level: Verdict
    message: str
    where: tuple[str, ...] = ()
    remedy: str = ""
    allowable: bool = False

    def document(self) -> dict[str, object]:
        """The finding as JSON-ready values, keys in declaration order."""
        return {
            "code": self.code,
            "axis": self.axis,
            "level": str(self.level),
            "message": self.message,
            "where": list(self.where),
            "remedy": self.remedy,
            "allowable": self.allowable,
        }

    def show(self, *, first: int = 3) -> str:
        """The finding as text: code, message, and the first few places it concerns."""
        text = f"{self.code}: {self.message}"
        if self.where:
            more = f" and {len(self.where) - first} more" if len(self.where) > first else ""
            text += f" [{', '.join(self.where[:first])}{more}]"
        return text


def worst(findings: Iterable[Finding], *, allowed: Collection[str] = ()) -> Verdict:
    """The verdict over ``findings``; an allowable one whose code is in ``allowed`` counts as ``UNVERIFIED`` at most."""
    return max(
        (
            min(finding.level, Verdict.UNVERIFIED) if finding.allowable and finding.code in allowed else finding.level
            for finding in findings
        ),
        default=Verdict.EXACT,
    )
