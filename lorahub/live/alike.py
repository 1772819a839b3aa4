"""Plans for adapters of one structure, made once: of fifty that one recipe trained, fifty times the same would follow.

Two adapters are alike where their files say the same and only the weights differ: names, shapes, dtypes, configs,
options and findings.  Then one is placed as the other was.  Knows headers and plans; no tensors.
"""

from __future__ import annotations

from collections import deque
from typing import final

from lorahub.adapter import Adapter, AdapterHeader
from lorahub.engine.planning.plan import Plan

__all__ = ["Alike"]

KEPT = 16
"""How many structures are remembered; the oldest goes first."""


@final
class Alike:
    """What was planned for one model, under one policy, by structure."""

    def __init__(self) -> None:
        self._kept: deque[tuple[AdapterHeader, Plan]] = deque(maxlen=KEPT)

    def keep(self, adapter: Adapter, plan: Plan) -> None:
        """Remember the plan of one adapter, which was not refused."""
        if adapter.header is not None and _plain(adapter.header):
            self._kept.append((adapter.header, plan))

    def plan(self, adapter: Adapter) -> Plan | None:
        """The plan of an adapter that this one is like, under that one's name; or None."""
        header = adapter.header
        if header is None or not _plain(header):
            return None
        for other, plan in reversed(self._kept):
            targets = (term.target for step in plan.steps for term in step.terms)
            if _alike(header, other) and all(target in adapter.deltas for target in targets):
                return plan
        return None


def _plain(header: AdapterHeader) -> bool:
    """Whether files say all there is to say of it: a record can name its very bytes."""
    return header.record is None and header.index is None


def _alike(one: AdapterHeader, other: AdapterHeader) -> bool:
    files, others = one.files, other.files
    if one.reading.file != other.reading.file or files.headers.keys() != others.headers.keys():
        return False
    same = all(
        header.tensors is others.headers[name].tensors and header.metadata == others.headers[name].metadata
        for name, header in files.headers.items()  # text that was seen before gives the very tensors of before
    )
    if not same or (files.configs, files.others, files.compat) != (others.configs, others.others, others.compat):
        return False
    return (one.reading, one.findings) == (other.reading, other.findings)
