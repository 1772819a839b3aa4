"""One change to one stored parameter, as data: what a plan lists and the engines execute.

Knows shapes, dtypes and names; no tensors, no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType

from lorahub.bases.layout import Piece, Region, Target
from lorahub.deltas.delta import Index
from lorahub.deltas.kind import JSON
from lorahub.engine.folding.windows import UNIT, WINDOW
from lorahub.files.dtypes import nbytes

__all__ = ["Form", "Step", "Term"]


@dataclass(frozen=True, slots=True)
class Form:
    """Shape and safetensors dtype code of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return nbytes(self.dtype, self.shape)

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One adapter's contribution to one stored parameter.

    Attributes:
        adapter: its name in this merge.
        weight: what its change is multiplied with; 1 for a parameter that it brings whole.
        target: under which name the adapter has the change.
        piece: which part of the change, and where it goes.
        kind: registered kind name.
        additive, replaces, local, rank, reads: as in ``Touch``.
        tied: the change is that of every name that the parameter has.
        twins: other targets under which the adapter says the same of this parameter.
        siblings: where the parameters named in ``reads`` lie.
        nbytes: bytes of the adapter's tensors for it.
        strength: what its factors are multiplied with, where an adapter's weight goes there and not to the change.
    """

    adapter: str
    weight: float
    target: Target
    piece: Piece
    kind: str
    additive: bool
    replaces: bool
    local: bool
    rank: int | None
    reads: tuple[str, ...] = ()
    tied: bool = False
    twins: tuple[Target, ...] = ()
    strength: float = 1.0
    siblings: Mapping[str, Piece] = field(default_factory=lambda: MappingProxyType({}))
    nbytes: int = 0

    @property
    def windowed(self) -> bool:
        """Whether a few rows of the stored parameter are enough at a time, as far as headers tell."""
        region = self.piece.of_parameter
        straight = not region.transposed or self.replaces or (self.additive and self.rank is not None)
        return self.local and straight and region.is_view and not self.reads

    def document(self) -> dict[str, JSON]:
        """The term as JSON-ready values."""
        return {
            "adapter": self.adapter,
            "weight": self.weight,
            "target": self.target.name,
            "kind": self.kind,
            "rank": self.rank,
            "nbytes": self.nbytes,
            **({"strength": self.strength} if self.strength != 1 else {}),
            **_piece(self.piece),
            **({"siblings": {name: _piece(piece) for name, piece in self.siblings.items()}} if self.siblings else {}),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One stored parameter that changes.

    Attributes:
        out: its name in the result (canonical).
        source: the parameter it is made from, or None where it is created.
        before: what it is now, or None where it is created.
        after: what it becomes.
        terms: what is added, in the order the adapters were given; none where a parameter is untied as it is.
        stored_as: the name that ``source`` has in the base's files, or "".
        saved_as: the name that ``out`` has in the result's files.
    """

    out: str
    source: str | None
    before: Form | None
    after: Form
    terms: tuple[Term, ...]
    stored_as: str = ""
    saved_as: str = ""

    @property
    def widened(self) -> bool:
        """Whether the base's value gets more columns, which are zero, before anything is added."""
        wider = self.before is not None and self.before.shape != self.after.shape
        return wider and not any(term.replaces for term in self.terms)

    @property
    def made_whole(self) -> bool:
        """Whether the base's value does not matter: the parameter is created, or replaced in another shape."""
        return self.before is None or (self.before.shape != self.after.shape and not self.widened)

    @property
    def windowed(self) -> bool:
        """Whether a few rows are enough at a time, as far as headers tell."""
        return all(term.windowed for term in self.terms)

    @property
    def products(self) -> bool:
        """Whether all that is added are products of factors, as far as headers tell."""
        return all(term.windowed and term.additive and term.rank is not None for term in self.terms)

    @property
    def unit_bytes(self) -> int:
        """About how many stored bytes are held at a time while it is folded."""
        if self.windowed:
            experts = any(term.piece.of_parameter.expert is not None for term in self.terms)
            whole = self.after.nbytes // (self.after.shape[0] or 1) if experts else UNIT
            return min(whole, self.after.nbytes)
        return self.after.nbytes

    @property
    def scratch_bytes(self) -> int:
        """About how much memory folding takes besides, in the dtype of the sums: two windows, or four whole copies."""
        if self.windowed:
            return 2 * WINDOW
        width = 4 if self.after.dtype in {"BF16", "F16"} or self.after.dtype.startswith("F8") else 8
        return 4 * width * prod(self.after.shape)

    def document(self) -> dict[str, JSON]:
        """The step as JSON-ready values."""
        return {
            "out": self.out,
            "source": self.source,
            "before": _form(self.before) if self.before else None,
            "after": _form(self.after),
            "stored_as": self.stored_as,
            "saved_as": self.saved_as,
            "terms": [term.document() for term in self.terms],
        }


def _form(form: Form) -> JSON:
    return {"shape": list(form.shape), "dtype": form.dtype}


def _piece(piece: Piece) -> dict[str, JSON]:
    """The parts of a piece that are not the whole of something."""
    regions = {"of_delta": piece.of_delta, "of_parameter": piece.of_parameter}
    return {name: _region(region) for name, region in regions.items() if not region.whole}


def _region(region: Region) -> JSON:
    return {
        "expert": region.expert,
        "transposed": region.transposed,
        "rows": _index(region.rows),
        "cols": _index(region.cols),
    }


def _index(index: Index) -> JSON:
    if isinstance(index, slice):
        return {"start": index.start, "stop": index.stop, "step": index.step}
    return list(index)
