"""How much an adapter changes, target by target: norms, spectra, and where the weight of it lies.

The numbers behind ``lorahub inspect --weights``.  A change of low rank is never multiplied out; one of another kind is
computed on zeros where it adds, and needs the base's weights where it does not.  Nothing is written.

Stable rank is ||D||_F^2 / ||D||_2^2 (Rudelson and Vershynin 2007, doi.org/10.1145/1255443.1255449); effective rank is
exp of the entropy of the singular values as shares of their sum (Roy and Vetterli, EUSIPCO 2007).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from lorahub.adapter import Adapter
from lorahub.bases.index import natural
from lorahub.bases.layout import Target
from lorahub.composition.algebra.truncate import norm, one_thread, singular_values
from lorahub.conversion.weights import BaseWeights
from lorahub.deltas.delta import Delta
from lorahub.errors import Incompatible
from lorahub.findings import Finding
from lorahub.lazy import torch
from lorahub.pictures.grid import arrange
from lorahub.pictures.heat_map import HeatMap

__all__ = ["MEASURES", "Measure", "Summary", "Weighed", "Weighing", "heat_map", "summaries", "weigh"]

TOP = 5
"""Largest singular values that are kept of each target."""

_DENSE = 1024
"""Smaller side of a change whose singular values are computed from all of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """What happens to one parameter.

    Attributes:
        target: its name, component in front.
        module: dotted path, component in front.
        kind: of the change.
        shape: of the change.
        norm: Frobenius norm of the change at weight 1.
        relative: the same relative to the base's weight, where that is at hand.
        energy: its share of the squared norm of the whole adapter.
        rank: of the factors, where it has some.
        stable_rank: see above; None where singular values were not computed.
        effective_rank: see above, in the same way.
        top: the largest singular values, descending.
    """

    target: str
    module: str
    kind: str
    shape: tuple[int, ...]
    norm: float
    relative: float | None = None
    energy: float = 0.0
    rank: int | None = None
    stable_rank: float | None = None
    effective_rank: float | None = None
    top: tuple[float, ...] = ()

    def document(self) -> dict[str, object]:
        """JSON-ready values."""
        return {
            "target": self.target,
            "kind": self.kind,
            "shape": list(self.shape),
            "norm": self.norm,
            "relative": self.relative,
            "energy": self.energy,
            "rank": self.rank,
            "stable_rank": self.stable_rank,
            "effective_rank": self.effective_rank,
            "top": list(self.top),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighing:
    """What an adapter weighs.

    Attributes:
        targets: every parameter that could be weighed, in natural order.
        left_out: target -> why it could not.
        findings: what there is to say of its names in the base.
    """

    targets: tuple[Weighed, ...]
    left_out: Mapping[str, str]
    findings: tuple[Finding, ...] = ()

    @property
    def norm(self) -> float:
        """Frobenius norm over all targets."""
        return math.sqrt(math.fsum(each.norm**2 for each in self.targets))

    def document(self) -> dict[str, object]:
        """JSON-ready values."""
        return {
            "norm": self.norm,
            "targets": [each.document() for each in self.targets],
            "left_out": dict(self.left_out),
            "findings": [each.document() for each in self.findings],
        }


def _length(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value**2 for value in values))


@dataclass(frozen=True, slots=True)
class Measure:
    """Something a picture can show: how it is called, the number, and what several numbers come to together."""

    title: str
    of: Callable[[Weighed], float | None]
    fold: Callable[[Sequence[float]], float]


MEASURES: Mapping[str, Measure] = {
    "norm": Measure("Frobenius norm of the change", lambda each: each.norm, _length),
    "relative": Measure("norm of the change / norm of the weight", lambda each: each.relative, median),
    "energy": Measure("share of the squared norm", lambda each: each.energy, math.fsum),
    "stable-rank": Measure("stable rank", lambda each: each.stable_rank, median),
    "effective-rank": Measure("effective rank (entropy)", lambda each: each.effective_rank, median),
}
"""Name -> measure."""

_MOST = 160
"""Rows of a picture; beyond that, blocks within blocks (experts) are shown together."""


def weigh(
    adapter: Adapter,
    *,
    base: BaseWeights | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Weighing:
    """Norm, spectrum and energy of every change.

    Args:
        adapter: with its tensors; under the base's names where there is one.
        base: its weights, for relative norms and for changes that depend on them.
        progress: called with (targets done, targets in all).
    """
    found: list[Weighed] = []
    left_out: dict[str, str] = {}
    for done, target in enumerate(sorted(adapter.deltas, key=lambda each: natural(each.name))):
        progress(done, len(adapter.deltas))
        weight = base.weight(target) if base is not None else None
        try:
            found.append(_weighed(target, _delta(adapter, target), weight, base))
        except _CannotWeigh as error:
            left_out[target.name] = str(error)
    progress(len(adapter.deltas), len(adapter.deltas))
    total = math.fsum(each.norm**2 for each in found)
    shares = tuple(_with_energy(each, total) for each in found)
    return Weighing(targets=shares, left_out=left_out)


class _CannotWeigh(Exception):
    """Why a change has no numbers."""


def _delta(adapter: Adapter, target: Target) -> Delta:
    """A change, where it can be had under the base's names.

    Raises:
        _CannotWeigh: it cannot.
    """
    try:
        return adapter.deltas[target]
    except Incompatible as error:
        raise _CannotWeigh(error.message) from None


def _with_energy(each: Weighed, total: float) -> Weighed:
    return replace(each, energy=each.norm**2 / total if total else 0.0)


def _weighed(target: Target, delta: Delta, weight: torch.Tensor | None, base: BaseWeights | None) -> Weighed:
    module = f"{target.component}.{target.module}".strip(".") or target.parameter
    if target.parameter != "weight":
        module = f"{module}.{target.parameter}".lstrip(".")
    low = delta.low_rank()
    if low is not None:
        shape = delta.shape() or (low.up.shape[0], low.down.shape[1])
        if min(low.up.shape[1], low.down.shape[0]) == 0:
            size, values = 0.0, None
        else:
            size, values = norm(low.up, low.down, low.scale), singular_values(low.up, low.down, low.scale)
        rank = int(low.down.shape[0])
    else:
        change = _dense(target, delta, weight, base)
        shape, rank = tuple(change.shape), None
        size, values = _of_dense(change)
    stable, effective = _ranks(values)
    return Weighed(
        target=target.name,
        module=module,
        kind=delta.kind,
        shape=tuple(shape),
        norm=size,
        relative=_relative(size, weight),
        rank=rank,
        stable_rank=stable,
        effective_rank=effective,
        top=() if values is None else tuple(values[:TOP].tolist()),
    )


def _dense(target: Target, delta: Delta, weight: torch.Tensor | None, base: BaseWeights | None) -> torch.Tensor:
    """The whole change in float64.

    Raises:
        _CannotWeigh: it depends on weights that are not at hand.
    """
    replaced = delta.replacement()
    if (replaced is not None or not delta.additive or delta.reads) and weight is None:
        what = "replaces the parameter" if replaced is not None else "depends on the weight it changes"
        missing = "the base has no such parameter" if base is not None else "it takes the base: --base BASE"
        raise _CannotWeigh(f"a {delta.kind} change {what}, and {missing}")
    if replaced is not None:
        assert weight is not None
        if replaced.shape != weight.shape:
            raise _CannotWeigh(f"the parameter is {list(replaced.shape)} here and {list(weight.shape)} in the base")
        return replaced.to(torch.float64) - weight
    siblings = {name: _sibling(target, name, base) for name in delta.reads}
    shape = delta.shape()
    if weight is None:
        if shape is None:
            raise _CannotWeigh(f"a {delta.kind} change does not tell its shape, and it takes the base: --base BASE")
        weight = torch.zeros(shape, dtype=torch.float64)
    try:
        return delta.delta(weight, **siblings)
    except Incompatible as error:
        raise _CannotWeigh(error.message) from None


def _sibling(target: Target, name: str, base: BaseWeights | None) -> torch.Tensor:
    found = base.weight(Target(target.component, target.module, name)) if base is not None else None
    if found is None:
        raise _CannotWeigh(f"the change also reads {name}, which is not at hand")
    return found


def _of_dense(change: torch.Tensor) -> tuple[float, torch.Tensor | None]:
    """Norm, and singular values where they are quick to have."""
    size = float(torch.linalg.vector_norm(change))
    if change.dim() < 2 or not math.isfinite(size):
        return size, None
    matrix = change.flatten(1)
    if min(matrix.shape) > _DENSE or not matrix.numel():
        return size, None
    with one_thread():
        return size, torch.linalg.svdvals(matrix)


def _ranks(values: torch.Tensor | None) -> tuple[float | None, float | None]:
    """Stable and effective rank; (None, None) where nothing changes."""
    if values is None or not values.numel() or not float(values[0]) > 0:
        return None, None
    stable = float((values**2).sum() / values[0] ** 2)
    shares = values / values.sum()
    shares = shares[shares > 0]
    return stable, math.exp(-float((shares * shares.log()).sum()))


def _relative(size: float, weight: torch.Tensor | None) -> float | None:
    whole = 0.0 if weight is None else float(torch.linalg.vector_norm(weight))
    return size / whole if whole else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The targets of one name in all layers, folded: norm and energy summed up, the rest their medians."""

    name: str
    count: int
    norm: float
    energy: float
    relative: float | None
    rank: int | None
    stable_rank: float | None
    effective_rank: float | None
    top: float | None


def summaries(weighing: Weighing) -> list[Summary]:
    """One line for each column of the picture, in its order."""
    places = arrange([each.module for each in weighing.targets])
    groups: dict[str, list[Weighed]] = {}
    for each in weighing.targets:
        groups.setdefault(places[each.module].column, []).append(each)
    return [
        Summary(
            name=name,
            count=len(groups[name]),
            norm=math.sqrt(math.fsum(each.norm**2 for each in groups[name])),
            energy=math.fsum(each.energy for each in groups[name]),
            relative=_middle([each.relative for each in groups[name]]),
            rank=max((each.rank for each in groups[name] if each.rank is not None), default=None),
            stable_rank=_middle([each.stable_rank for each in groups[name]]),
            effective_rank=_middle([each.effective_rank for each in groups[name]]),
            top=max((each.top[0] for each in groups[name] if each.top), default=None),
        )
        for name in _ordered(list(groups))
    ]


def _middle(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return median(found) if found else None


def heat_map(weighing: Weighing, measure: str, *, title: str) -> HeatMap:
    """One measure of ``MEASURES`` as a picture: layers down, targets across.

    Args:
        weighing: what to show.
        measure: which number.
        title: of the picture.
    """
    shown = MEASURES[measure]
    places = arrange([each.module for each in weighing.targets])
    rows = _rows({place.row for place in places.values()})
    numbers: dict[tuple[str, str], list[float]] = {}
    for each in weighing.targets:
        value, place = shown.of(each), places[each.module]
        if value is not None and math.isfinite(value):
            numbers.setdefault((rows[place.row], place.column), []).append(value)
    columns = list(dict.fromkeys(places[each.module].column for each in weighing.targets))
    kinds = "+".join(sorted({each.kind for each in weighing.targets}))
    return HeatMap(
        title=title,
        subtitle=f"{shown.title}; {len(weighing.targets)} parameters, {kinds}",
        rows=sorted(set(rows.values()), key=natural),
        columns=_ordered(columns),
        values={place: found[0] if len(found) == 1 else shown.fold(found) for place, found in numbers.items()},
        measure=shown.title,
    )


def _rows(rows: Collection[str]) -> dict[str, str]:
    """Row -> the row it is shown in: itself, or its block with a star for the innermost number where there are many."""
    shown = {row: row for row in rows}
    while len(set(shown.values())) > _MOST:
        folded = {row: _NUMBER.sub("*", into) for row, into in shown.items()}
        if folded == shown:
            break
        shown = folded
    return shown


_NUMBER = re.compile(r"\d+(?=[^\d]*$)")
"""The last number in a label."""


def _ordered(columns: Sequence[str]) -> list[str]:
    """The columns as models run through them: query, key, value, out; then the rest as it came."""
    order = {name: number for number, name in enumerate(_ORDER)}

    def place(column: str) -> tuple[str, int]:
        head, _, tail = column.replace("_to_", ".to_").partition(".")
        word = (tail or head).partition(".")[0]
        return head if tail else "", order.get(word, len(order))

    groups = {head: at for at, head in reversed(list(enumerate(place(column)[0] for column in columns)))}
    return sorted(columns, key=lambda column: (groups[place(column)[0]], place(column)[1]))


_ORDER = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "out_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "query",
    "key",
    "value",
    "q",
    "k",
    "v",
    "o",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "proj_in",
    "proj_out",
)
