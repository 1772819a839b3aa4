"""What a conversion did, target by target, as a value and as a document."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lorahub.findings import Finding

__all__ = ["ConversionReport", "Converted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """One target that was written.

    Attributes:
        target: its name in the result.
        sources: the source's targets that it comes from.
        before / after: kinds.
        rank_before / rank_after: ranks, for kinds that have one.
        rules: the rewritings, in order; none: renamed, bit for bit.
        difference: relative Frobenius difference of the two changes; 0 for equal bits; None where it was not looked at.
        approximated: the difference is one that was asked for.
    """

    target: str
    sources: tuple[str, ...]
    before: str
    after: str
    rank_before: int | None
    rank_after: int | None
    rules: tuple[str, ...]
    difference: float | None
    approximated: bool = False

    def document(self) -> dict[str, object]:
        """JSON-ready values."""
        return {
            "target": self.target,
            "sources": list(self.sources),
            "kind": self.after,
            "kind_before": self.before,
            "rank": self.rank_after,
            "rank_before": self.rank_before,
            "rules": list(self.rules),
            "difference": self.difference,
            "approximated": self.approximated,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """A conversion that was done.

    Attributes:
        adapter: the source, as it was named.
        before: its format.
        after: the format written.
        out: where it lies.
        targets: every target written, in order.
        losses: what is not in it, a sentence each.
        findings: what there was to say of the source.
    """

    adapter: str
    before: str
    after: str
    out: str
    targets: tuple[Converted, ...]
    losses: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def rules(self) -> Mapping[str, int]:
        """Rule -> targets it was applied to; "rename" counts those that are the same bits."""
        counts = Counter(rule for each in self.targets for rule in each.rules or ("rename",))
        return dict(sorted(counts.items()))

    @property
    def max_error(self) -> float | None:
        """The largest difference that was found; None where none was looked at."""
        return max((each.difference for each in self.targets if each.difference is not None), default=None)

    @property
    def unverified(self) -> int:
        """How many targets were not compared."""
        return sum(each.difference is None for each in self.targets)

    @property
    def exact(self) -> bool:
        """Whether nothing was approximated."""
        return not any(each.approximated for each in self.targets)

    def document(self) -> dict[str, object]:
        """JSON-ready values."""
        error = self.max_error
        return {
            "adapter": self.adapter,
            "from": self.before,
            "to": self.after,
            "out": self.out,
            "rules": dict(self.rules),
            "exact": self.exact,
            "max_difference": None if error is None or not math.isfinite(error) else error,
            "unverified": self.unverified,
            "losses": list(self.losses),
            "targets": [each.document() for each in self.targets],
            "findings": [each.document() for each in self.findings],
        }
