"""What extracting or resizing did to each target, and to all of them together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lorahub.composition.algebra.budgeting import Shared
from lorahub.composition.algebra.stacked import combined_error
from lorahub.composition.algebra.truncate import Budget
from lorahub.deltas.kind import JSON
from lorahub.findings import Finding, Verdict

__all__ = ["ReduceReport", "Rewritten", "Row", "unmet"]

Rewritten: TypeAlias = Literal["factors", "whole", "kept", "equal", "dropped", "left out"]
"""``factors``: new factors; ``whole``: the tuned value; ``kept``: as it was; ``equal``: there was nothing to do;
``dropped``: a common budget left nothing for it; ``left out``: it was not looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One target.

    Attributes:
        target: its name.
        way: what became of it.
        shape: of the parameter.
        before: the rank it had, or None.
        rank: the rank it has, or None.
        norm: the Frobenius norm of its change before.
        relative: that over the norm of the weights, where those were read.
        error: the relative Frobenius error of the change, at most; the rounding of stored factors is in it.
        reason: why, where that is not plain.
    """

    target: str
    way: Rewritten
    shape: tuple[int, ...]
    before: int | None = None
    rank: int | None = None
    norm: float = 0.0
    relative: float | None = None
    error: float | None = None
    reason: str = ""

    @property
    def energy(self) -> float | None:
        """The share of the squared norm that is kept."""
        return None if self.error is None else max(0.0, 1 - self.error**2)

    def document(self) -> dict[str, JSON]:
        """The row as JSON-ready values."""
        said: dict[str, JSON] = {
            "target": self.target,
            "way": self.way,
            "shape": list(self.shape),
            "rank_before": self.before,
            "rank": self.rank,
            "norm": self.norm,
            "relative_change": self.relative,
            "energy": self.energy,
            "error": self.error,
            "reason": self.reason,
        }
        return {key: value for key, value in said.items() if value is not None and value != ""}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduceReport:
    """What was made, and how close it is.

    Attributes:
        out: where it lies.
        rows: every target.
        findings: everything else there is to say.
        seconds: how long it took.
        bytes_written: of the weights file.
        settings: what was asked for.
    """

    out: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...] = ()
    seconds: float
    bytes_written: int
    settings: Mapping[str, JSON]

    @property
    def error(self) -> float:
        """The relative Frobenius error over all changes together; what was left out is not in it."""
        return _together(self.rows)

    @property
    def energy(self) -> float:
        """The share of the squared norm of all changes that is kept."""
        return max(0.0, 1 - self.error**2)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Every rank in use, ascending."""
        return tuple(sorted({row.rank for row in self.rows if row.rank is not None}))

    def count(self, way: Rewritten) -> int:
        """How many targets one thing became of."""
        return sum(row.way == way for row in self.rows)

    def document(self) -> dict[str, JSON]:
        """The report as JSON-ready values."""
        ways: tuple[Rewritten, ...] = ("factors", "whole", "kept", "equal", "dropped", "left out")
        return {
            "out": self.out,
            "energy": self.energy,
            "error": self.error,
            "ranks": list(self.ranks),
            "targets": {way: self.count(way) for way in ways},
            "settings": dict(self.settings),
            "seconds": round(self.seconds, 3),
            "bytes_written": self.bytes_written,
            "findings": [finding.code for finding in self.findings],
            "rows": [row.document() for row in self.rows],
        }


def _together(rows: Sequence[Row]) -> float:
    """The relative error of all rows as one vector."""
    return combined_error([row.error or 0.0 for row in rows], [row.norm for row in rows])


def unmet(rows: Sequence[Row], budget: Budget | Shared) -> tuple[Finding, ...]:
    """A finding where a quality that was asked for is not reached: a rank bounds it, or the dtype is too narrow."""
    cut = [row for row in rows if row.way in ("factors", "dropped") and row.error is not None]
    if isinstance(budget, Shared):
        share, found = budget.lost, _together(cut)
        missed = [] if share is None or found <= _tolerated(share) else cut
    else:
        share = budget.lost() if budget.energy is not None or budget.error is not None else None
        missed = [] if share is None else [row for row in cut if (row.error or 0.0) > _tolerated(share)]
        found = max((row.error or 0.0 for row in missed), default=0.0)
    if share is None or not missed:
        return ()
    return (
        Finding(
            code="budget-unmet",
            axis="policy",
            level=Verdict.UNVERIFIED,
            message=f"a relative error of {math.sqrt(share):.3g} was asked for and {found:.3g} reached: "
            "the rank or the dtype allows no less",
            where=tuple(row.target for row in missed),
            remedy="allow a higher --rank, or another --dtype",
        ),
    )


def _tolerated(share: float) -> float:
    """The error that a lost share stands for, and what float32 factors add."""
    return math.sqrt(share) * (1 + 1e-6) + 1e-6
