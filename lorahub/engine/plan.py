"""The list of changes that merging adapters into a base means, computed from names and shapes alone.

A plan reads no weights: it can be printed, checked and digested before anything is loaded, and both the in-memory
and the streaming engine execute it, so their results agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from lorahub.bases.index import BaseRef
from lorahub.bases.layout import Piece, Target
from lorahub.deltas.kind import JSON
from lorahub.findings import Finding

__all__ = ["Form", "Plan", "Step", "Term"]


@dataclass(frozen=True, slots=True)
class Form:
    """Shape and safetensors dtype code of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One adapter's contribution to one stored parameter."""

    adapter: str
    weight: float
    target: Target
    piece: Piece
    kind: str
    additive: bool
    replaces: bool
    local: bool
    rank: int | None
    reads: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One stored parameter that changes.

    Attributes:
        out: its name in the result (canonical).
        source: the parameter it is made from, or None where it is created.
        before: what it is now, or None where it is created.
        after: what it becomes.
        terms: what is added, in the order the adapters were given.
    """

    out: str
    source: str | None
    before: Form | None
    after: Form
    terms: tuple[Term, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a merge will do.

    Attributes:
        base: which base.
        framework: the framework that named its parameters.
        steps: parameters that change, in canonical order.
        untouched: parameters that are copied as bytes.
        removed: parameters the result no longer has.
        config_edits: what changes in ``config.json``.
        findings: everything there is to say, allowed or not.
        allowed: the finding codes that were allowed.
    """

    base: BaseRef
    framework: str
    steps: tuple[Step, ...]
    untouched: tuple[str, ...]
    removed: tuple[str, ...] = ()
    config_edits: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))
    findings: tuple[Finding, ...] = ()
    allowed: tuple[str, ...] = ()
