"""What a merge did: parameters changed, how much, how long it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import cast

from lorahub.deltas.kind import JSON
from lorahub.engine.folding.retention import Retention
from lorahub.findings import Finding

__all__ = ["MergeReport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge did.

    Attributes:
        changes: parameter -> size of the change over the size of the weights (Frobenius norms), before rounding; None
            where the base has nothing to compare with, or only zeros.
        created: parameters the base did not have, or had in another shape.
        removed: parameters the result no longer has.
        seconds: from the first byte to the last.
        bytes_read: of the base's weights; 0 in memory.
        bytes_written: of the result's files; 0 in memory.
        resumed: files that an earlier run had finished.
        threads: how many folded.
        plan: digest of the plan.
        undo: way back -> bytes that it holds; nothing where there is none.
        retained: parameter -> how much of its change is left as stored, where that was measured.
        retention: the same of all changes together.
        findings: what there is to say about that, and about how it was done.
    """

    changes: Mapping[str, float | None]
    created: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    seconds: float
    bytes_read: int = 0
    bytes_written: int = 0
    resumed: int = 0
    threads: int
    plan: str
    undo: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    retained: Mapping[str, Retention] = field(default_factory=lambda: MappingProxyType({}))
    retention: Retention | None = None
    findings: tuple[Finding, ...] = ()

    @property
    def changed(self) -> int:
        """How many parameters changed, created ones included."""
        return len(self.changes)

    @property
    def largest_change(self) -> float:
        """The largest relative change of any parameter; 0 where there is none."""
        return max((value for value in self.changes.values() if value is not None), default=0.0)

    @property
    def largest_name(self) -> str:
        """The parameter it happened to, or ""."""
        named = {name: value for name, value in self.changes.items() if value is not None}
        return max(named, key=lambda name: named[name], default="")

    def document(self) -> dict[str, JSON]:
        """The report as JSON-ready values."""
        told = [finding.document() for finding in self.findings]
        return {
            "changed": self.changed,
            "largest_change": self.largest_change,
            "largest_name": self.largest_name,
            "created": list(self.created),
            "removed": list(self.removed),
            "seconds": round(self.seconds, 3),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "resumed": self.resumed,
            "threads": self.threads,
            "plan": self.plan,
            "undo": dict(self.undo),
            "retention": asdict(self.retention) if self.retention else None,
            "retained": {name: asdict(each) for name, each in self.retained.items()},
            "findings": cast("list[JSON]", told),
            "changes": dict(self.changes),
        }
