"""Two adapters side by side: what both change and how alike, and what only one of them changes.

Changes with factors are compared by these (``gram``); others as dense tensors, one target at a time, where that can be
done: a change that looks at the weight needs the base.  What cannot be compared is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeAlias

from lorahub.bases.index import natural
from lorahub.bases.layout import Target
from lorahub.composition.algebra.gram import Relation, relate, relate_dense
from lorahub.deltas.delta import Delta, LowRank
from lorahub.deltas.kind import JSON
from lorahub.findings import Finding
from lorahub.lazy import torch

__all__ = ["Comparison", "Row", "State", "Weights", "compare", "compare_parts", "identical"]

State: TypeAlias = Literal["equal", "close", "different", "only in A", "only in B", "not compared"]

Weights: TypeAlias = "Callable[[Target], torch.Tensor | None]"
"""The base's weight of a target, [out, in, *k], float64; None where the base has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One target.

    Attributes:
        target: its name.
        kinds: what changes it in A and in B; "" where nothing does.
        state: "equal": the same tensors and numbers; "close": the same change within the tolerance.
        relation: how the two lie to each other, or None.
        reason: why they were not compared, or "".
    """

    target: str
    kinds: tuple[str, str]
    state: State
    relation: Relation | None = None
    reason: str = ""

    def document(self) -> dict[str, JSON]:
        """The row as JSON-ready values."""
        said: dict[str, JSON] = {"target": self.target, "kinds": list(self.kinds), "state": self.state}
        if self.reason:
            said["reason"] = self.reason
        if found := self.relation:
            said |= {
                "norms": list(found.norms),
                "cosine": found.cosine,
                "relative_difference": found.relative,
                "ranks": list(found.ranks),
                "angles_out": list(found.angles_out),
                "angles_in": list(found.angles_in),
            }
        return said


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two adapters side by side.

    Attributes:
        rows: every target of either, in natural order.
        tolerance: the relative difference up to which changes count as the same.
        findings: what there is to say of their names in the base.
    """

    rows: tuple[Row, ...]
    tolerance: float
    findings: tuple[Finding, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether every target of either is equal or close: nothing differs, is missing or was left uncompared."""
        return all(row.state in ("equal", "close") for row in self.rows)

    def count(self, state: State) -> int:
        """How many targets are in a state."""
        return sum(row.state == state for row in self.rows)

    @property
    def whole(self) -> Relation:
        """All targets as one vector each; a target that one adapter leaves alone counts as zero there.

        What was not compared is left out.
        """
        found = [row.relation for row in self.rows if row.relation]
        return Relation(
            norms=(
                math.sqrt(sum(each.norms[0] ** 2 for each in found)),
                math.sqrt(sum(each.norms[1] ** 2 for each in found)),
            ),
            inner=sum(each.inner for each in found),
            difference=math.sqrt(sum(each.difference**2 for each in found)),
        )

    def document(self) -> dict[str, JSON]:
        """The comparison as JSON-ready values."""
        whole = self.whole
        states: tuple[State, ...] = ("equal", "close", "different", "only in A", "only in B", "not compared")
        return {
            "equal": self.equal,
            "tolerance": self.tolerance,
            "norms": list(whole.norms),
            "cosine": whole.cosine,
            "relative_difference": whole.relative,
            "targets": {state: self.count(state) for state in states},
            "rows": [row.document() for row in self.rows],
            "findings": [{**each.document()} for each in self.findings],  # type: ignore[dict-item]  # JSON values alone
        }


def compare(
    one: Mapping[Target, Delta], other: Mapping[Target, Delta], *, tolerance: float, weights: Weights | None = None
) -> Comparison:
    """Compare two adapters target by target.

    Args:
        one: A's changes.
        other: B's changes, under the same names.
        tolerance: the relative difference up to which changes count as the same.
        weights: the base's weights, for changes that look at them.
    """
    targets = sorted({*one, *other}, key=lambda target: natural(target.name))
    return Comparison(
        rows=tuple(_row(target, one.get(target), other.get(target), tolerance, weights) for target in targets),
        tolerance=tolerance,
    )


def compare_parts(
    one: Mapping[str, tuple[str, str | None]], other: Mapping[str, tuple[str, str | None]]
) -> tuple[Row, ...]:
    """A row for everything that is no weight change: equal to the byte, or not.

    Args:
        one: name of A's part -> (kind, digest of its tensors; None where they are not at hand).
        other: B's.
    """
    rows = []
    for name in sorted({*one, *other}):
        (kind, digest), (other_kind, other_digest) = one.get(name, ("", None)), other.get(name, ("", None))
        alone: State | None = "only in A" if name not in other else "only in B" if name not in one else None
        known = digest is not None and other_digest is not None
        state: State = "not compared" if not known else "equal" if digest == other_digest else "different"
        reason = "it is no weight change, and was compared by its bytes"
        rows.append(Row(target=name, kinds=(kind, other_kind), state=alone or state, reason=reason))
    return tuple(rows)


def _row(target: Target, one: Delta | None, other: Delta | None, tolerance: float, weights: Weights | None) -> Row:
    kinds = (one.kind if one else "", other.kind if other else "")
    if one and other and identical(one, other):
        relation = _relation(target, one, other, weights)
        return Row(
            target=target.name,
            kinds=kinds,
            state="equal",
            relation=relation if isinstance(relation, Relation) else None,
        )
    relation = _relation(target, one, other, weights)
    alone: State | None = "only in A" if other is None else "only in B" if one is None else None
    if isinstance(relation, str):
        return Row(target=target.name, kinds=kinds, state=alone or "not compared", reason=relation)
    state: State = alone or ("close" if relation.relative <= tolerance else "different")
    return Row(target=target.name, kinds=kinds, state=state, relation=relation)


def _relation(target: Target, one: Delta | None, other: Delta | None, weights: Weights | None) -> Relation | str:
    """How two changes lie to each other, or why nobody can say."""
    factors = [each.low_rank() if each else None for each in (one, other)]
    given = [each for each in (one, other) if each]
    if all(found or not each for found, each in zip(factors, (one, other), strict=True)):
        left, right = (found or _nothing(next(filter(None, factors))) for found in factors)
        shapes = {(found.up.shape[0], found.down.shape[1]) for found in (left, right)}
        return relate(left, right) if len(shapes) == 1 else _misfit(given)
    shapes_known = {each.shape() for each in given} - {None}
    if len(shapes_known) > 1:
        return _misfit(given)
    shape = next(iter(shapes_known), None)
    looking = [each for each in given if not each.additive]
    weight = weights(target) if weights else None
    if weight is None and looking:
        return f"a change of kind {looking[0].kind} looks at the weight: " + (
            "the base has none of that name" if weights else "name the base"
        )
    if weight is None and shape is None:
        return "its tensors do not tell the weight's shape: name the base"
    if weight is None:
        weight = torch.zeros(shape or (), dtype=torch.float64)
    if shape is not None and tuple(weight.shape) != shape:
        return f"it changes a weight {list(shape)}, and the base has {list(weight.shape)}"
    siblings: dict[str, torch.Tensor] = {}
    for name in dict.fromkeys(name for each in given for name in each.reads):
        value = weights(replace(target, parameter=name)) if weights else None
        if value is None:
            return f"a change of kind {looking[0].kind} looks at the module's {name}, which the base does not have"
        siblings[name] = value
    dense = [_dense(each, weight, siblings) for each in (one, other)]
    return relate_dense(*dense)


def _dense(delta: Delta | None, weight: torch.Tensor, siblings: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A change as a tensor; zeros where there is none."""
    if delta is None:
        return torch.zeros_like(weight)
    return delta.delta(weight, **{name: siblings[name] for name in delta.reads})


def _nothing(beside: LowRank | None) -> LowRank:
    """No change, of the shape that another one has."""
    assert beside is not None  # a row has at least one change
    return LowRank(beside.up[:, :0], beside.down[:0], 1.0)


def _misfit(given: list[Delta]) -> str:
    return f"A changes a weight {list(given[0].shape() or ())}, B one {list(given[-1].shape() or ())}"


def identical(one: Delta, other: Delta) -> bool:
    """Whether two deltas hold the same numbers in the same places."""
    if type(one) is not type(other):
        return False
    names = [each.name for each in fields(one)]  # type: ignore[arg-type]  # every delta is a dataclass
    return all(_same(getattr(one, name), getattr(other, name)) for name in names)


def _same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return False
    return one == other
