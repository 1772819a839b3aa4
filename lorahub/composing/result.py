"""What came of a composition: an adapter, and the report of what was made and lost."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from lorahub.adapter import Adapter
from lorahub.composition.algebra.stacked import combined_error
from lorahub.composition.combining import Row
from lorahub.deltas.kind import JSON
from lorahub.findings import Finding

__all__ = ["ComposeReport", "Composed", "Home", "lost"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposeReport:
    """What was composed, and what was lost.

    Attributes:
        out: the folder it lies in.
        method: how.
        rows: one for each target.
        findings: everything there is to say.
        seconds: of wall clock.
        bytes_written: of weights.
        settings: budget, dtype and the method's parameters, as the record has them.
    """

    out: str
    method: str
    rows: tuple[Row, ...]
    findings: tuple[Finding, ...]
    seconds: float
    bytes_written: int
    settings: Mapping[str, JSON]

    @property
    def error(self) -> float:
        """The relative error of cutting and storing all targets together, at most."""
        return lost(self.rows)

    @property
    def energy(self) -> float:
        """The share of the squared norm of all targets that is kept."""
        return max(0.0, 1 - self.error**2)

    def document(self) -> dict[str, JSON]:
        """The report as JSON-ready values."""
        ranks = [row.rank for row in self.rows if row.rank is not None]
        return {
            "out": self.out,
            "method": self.method,
            "targets": len(self.rows),
            "ranks": [min(ranks), max(ranks)] if ranks else [],
            "energy": self.energy,
            "error": self.error,
            "settings": dict(self.settings),
            "seconds": self.seconds,
            "bytes_written": self.bytes_written,
            "findings": [*self.said()],
            "rows": [row.document() for row in self.rows],
        }

    def said(self) -> list[JSON]:
        """The findings as JSON-ready values."""
        return [{**finding.document()} for finding in self.findings]  # type: ignore[dict-item]  # of JSON values alone


def lost(rows: Sequence[Row]) -> float:
    """The relative error of cutting and storing these together, at most."""
    measured = [row for row in rows if row.error is not None and row.norm is not None]
    return combined_error([row.error or 0.0 for row in measured], [row.norm or 0.0 for row in measured])


@final
class Home:
    """A temporary folder that goes when this object does."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="lorahub-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Composed(Adapter):
    """An adapter that was composed, and its report.

    Without a folder of its own it lies in a temporary one for as long as this object lives.
    """

    report: ComposeReport
    home: Home | None = field(default=None, repr=False)
