"""Adapters in, one adapter out: every target gathered, combined by a method, cut to a budget and stored.

Targets are worked on in parallel, each in float64 on one thread, so the bytes of the result do not depend on how many
threads there are.  Nothing larger than what a method makes of one target is held, besides the result.  Knows no files,
no recipe and no base but its weights by target.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from lorahub.bases.index import natural
from lorahub.bases.layout import Target
from lorahub.composition.algebra.budgeting import Shared, Spectrum
from lorahub.composition.algebra.factorise import factorise
from lorahub.composition.algebra.stacked import combined, combined_error
from lorahub.composition.algebra.truncate import Budget, norm, truncate
from lorahub.composition.gathering import Gathered, Mode, Weights, gather
from lorahub.composition.method import Change, Method, ProductMethod, SumMethod
from lorahub.composition.multiplicative import combined as multiplied
from lorahub.composition.multiplicative import multiplies
from lorahub.composition.values import settled
from lorahub.deltas.delta import Delta, LowRank
from lorahub.deltas.kind import JSON
from lorahub.engine.crew import Job, Workspace, run_jobs
from lorahub.errors import BaseNeeded, LorahubError, NotFinite, UnsupportedKind, UsageError
from lorahub.lazy import torch

__all__ = ["Combined", "Part", "Row", "changes_of", "combine", "methods_for", "order_of", "whole_for", "whole_gram"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One adapter's share of a composition.

    Attributes:
        label: what people call it.
        deltas: target -> change; asked from several threads, and only for its own targets.
        weights: target -> its weight, for each of its targets.
        without: targets that it names and the base does not have, which it may.
        elsewhere: its weight where it changes nothing, which counts where weights are held against each other.
        seed: what it draws from; see ``Terms.seeds``.
    """

    label: str
    deltas: Mapping[Target, Delta]
    weights: Mapping[Target, float]
    seed: int
    elsewhere: float = 0.0
    without: frozenset[Target] = frozenset()

    def delta(self, target: Target) -> Delta | None:
        """Its change to a target, or None."""
        return None if target in self.without else self.deltas.get(target)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What became of one target.

    Attributes:
        target: its name.
        way: "factors"; "whole" for a vector, a full difference or a new value; "value" for a new value that
            does not depend on the one before; "multiplied" where changes rescale or turn the weight.
        ranks: of each adapter's change; None where it has none, 0 where it leaves the target alone.
        rank: of the result, or None.
        norm: the Frobenius norm of what the method made; None where nothing is cut off or measured.
        error: what cutting and storing it lost, as a share of that norm, at most.
        notes: what else was done.
    """

    target: str
    way: str
    ranks: tuple[int | None, ...]
    rank: int | None = None
    norm: float | None = None
    error: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def energy(self) -> float | None:
        """The share of the squared norm that is kept."""
        return None if self.error is None else max(0.0, 1 - self.error**2)

    def document(self) -> dict[str, JSON]:
        """The row as JSON-ready values."""
        return {
            "target": self.target,
            "way": self.way,
            "ranks": list(self.ranks),
            "rank": self.rank,
            "norm": self.norm,
            "error": self.error,
            "energy": self.energy,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """The result: every target's change, and a row for each, in natural order."""

    deltas: dict[Target, Delta]
    rows: tuple[Row, ...]


def combine(
    parts: Sequence[Part],
    method_of: Callable[[Target], Method],
    budget: Budget | Shared | None,
    *,
    dtype: torch.dtype,
    threads: int,
    mode: Mode = "refuse",
    base: Weights | None = None,
    whole: torch.Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Combined:
    """Combine adapters target by target.

    Without a budget the result keeps every rank that the method gives; where that is a matrix without factors, the
    sum of the ranks that came in.

    Args:
        parts: the adapters, in order.
        method_of: how the changes of a target become one; one method, with parameters that may differ.
        budget: ranks, energy or error of each target, or of all together.
        dtype: of the result's tensors.
        threads: how many; the result does not depend on it.
        mode: what becomes of changes that look at the weight.
        base: the base's weights.
        whole: what ``whole_for`` gives; None: it is asked.
        progress: called with (targets done, in all).

    Raises:
        UsageError: the method takes another number of adapters.
        BaseMismatch, BaseNeeded, UnsupportedKind: changes do not go together; the target is named.
        NotFinite: NaN or infinity, or the result does not fit into ``dtype``.
    """
    methods = methods_for(parts, method_of)
    order = [*methods]
    if whole is None:
        whole = whole_for(parts, methods, mode, base)
    done: dict[Target, _Made] = {}
    lock = threading.Lock()

    def job(target: Target) -> Job:
        def run(_: Workspace) -> None:
            made = _target(target, parts, methods[target], budget, dtype, mode, base, whole)
            with lock:
                done[target] = made

        return run

    def tick() -> None:
        if progress:
            progress(len(done), len(order))

    run_jobs([job(target) for target in order], threads, tick=tick)
    if isinstance(budget, Shared):
        done |= _shared(done, order, budget, dtype)
    return Combined(
        deltas={target: delta for target in order if (delta := done[target].delta) is not None},
        rows=tuple(done[target].row for target in order),
    )


def order_of(parts: Sequence[Part]) -> list[Target]:
    """Every target that is changed, in natural order."""
    targets = {target for part in parts for target in part.deltas if target not in part.without}
    return sorted(targets, key=lambda target: natural(target.name))


def methods_for(parts: Sequence[Part], method_of: Callable[[Target], Method]) -> dict[Target, Method]:
    """The method of every target, in natural order.

    Raises:
        UsageError: one takes another number of adapters.
    """
    methods = {target: method_of(target) for target in order_of(parts)}
    for method in dict.fromkeys(type(method) for method in methods.values()):
        _demand_count(method, len(parts))
    return methods


def whole_for(
    parts: Sequence[Part], methods: Mapping[Target, Method], mode: Mode, base: Weights | None
) -> torch.Tensor | None:
    """Inner products of whole adapters where a method looks at these, else None."""
    apart = any(getattr(method, "scope", "target") == "adapter" for method in methods.values())
    return whole_gram(parts, mode, base) if apart else None


def _demand_count(method: type[Method], count: int) -> None:
    least, most = method.count
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        raise UsageError(
            f"the method '{method.name}' takes {wanted} adapters, and there are {count}", "lorahub compose --help"
        )


def whole_gram(parts: Sequence[Part], mode: Mode, base: Weights | None) -> torch.Tensor:
    """Inner products of whole adapters, [n, n] float64: the sums of those of their targets.

    New values without one before are no changes, and have no part in it.
    """
    total = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for target in order_of(parts):
        deltas = [part.delta(target) for part in parts]
        new = any(delta is not None and delta.replacement() is not None for delta in deltas)
        if new and (base is None or base(target) is None):
            continue
        gathered = gather(target, deltas, [1.0] * len(parts), [0] * len(parts), mode=mode, base=base)
        for terms in gathered.terms:
            total += terms.gram()
    return total


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Made:
    """One target's result; ``factors`` wait, with their spectrum, where all targets share a budget."""

    row: Row
    delta: Delta | None = None
    gathered: Gathered | None = None
    factors: tuple[_Factors, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Factors:
    """``up @ down`` [out, in] in float64; singular values where it was cut, and what the cut lost."""

    up: torch.Tensor
    down: torch.Tensor
    norm: float
    error: float = 0.0
    values: torch.Tensor | None = None


def _target(
    target: Target,
    parts: Sequence[Part],
    method: Method,
    budget: Budget | Shared | None,
    dtype: torch.dtype,
    mode: Mode,
    base: Weights | None,
    whole: torch.Tensor | None,
) -> _Made:
    deltas, weights = _taking_part(target, parts)
    if _replaced(deltas) and (base is None or base(target) is None or not any(deltas)):
        return _value(target, deltas, weights)
    with _naming(target):
        if mode != "dense" and any(multiplies(delta) for delta in deltas if delta is not None):
            return _multiplied(target, deltas, weights, method, dtype)
        gathered, changes = changes_of(target, parts, method, mode, base, whole)
        return _made(target, gathered, changes, budget or _asked(method, gathered), dtype)


def _taking_part(target: Target, parts: Sequence[Part]) -> tuple[list[Delta | None], list[float]]:
    """What each adapter does to a target, and its weight; of new values only those that count."""
    deltas = [part.delta(target) for part in parts]
    weights = [part.weights.get(target, part.elsewhere) for part in parts]
    if _replaced(deltas):
        deltas = [delta if weight else None for delta, weight in zip(deltas, weights, strict=True)]
    return deltas, weights


def _replaced(deltas: Sequence[Delta | None]) -> bool:
    return any(delta is not None and delta.replacement() is not None for delta in deltas)


def changes_of(
    target: Target,
    parts: Sequence[Part],
    method: Method,
    mode: Mode,
    base: Weights | None,
    whole: torch.Tensor | None,
) -> tuple[Gathered, list[Change]]:
    """What a method makes of one target, uncut: a change for each of its matrices.

    Raises:
        BaseMismatch, BaseNeeded, UnsupportedKind: changes do not go together; the target is named.
    """
    with _naming(target):
        deltas, weights = _taking_part(target, parts)
        gathered = gather(target, deltas, weights, [part.seed for part in parts], mode=mode, base=base)
        if getattr(method, "scope", "target") == "target":
            whole = None
        return gathered, [method.combine(replace(terms, whole=whole)) for terms in gathered.terms]


@contextmanager
def _naming(target: Target) -> Iterator[None]:
    """Say of an error in a block which target it is about."""
    try:
        yield
    except LorahubError as error:
        if target.name in error.message:
            raise
        raise type(error)(f"{target.name}: {error.message}", error.hint) from None


def _multiplied(
    target: Target, deltas: Sequence[Delta | None], weights: Sequence[float], method: Method, dtype: torch.dtype
) -> _Made:
    """Changes that multiply the weight, as one of their kind."""
    if isinstance(method, SumMethod):
        delta = multiplied(deltas, method.coefficients(weights), "sum", dtype=dtype)
    elif isinstance(method, ProductMethod):
        delta = multiplied(deltas, weights, "product", dtype=dtype)
    else:
        kind = next(delta.kind for delta in deltas if delta is not None)
        raise UnsupportedKind(
            f"{target.name}: a change of kind {kind} multiplies the weight, and {method.name} takes changes that add",
            "take linear or product, or the change that it makes to a base: --base BASE --non-additive dense --rank R",
        )
    return _Made(row=Row(target=target.name, way="multiplied", ranks=(None,) * len(deltas)), delta=delta)


def _made(
    target: Target, gathered: Gathered, changes: Sequence[Change], budget: Budget | Shared | None, dtype: torch.dtype
) -> _Made:
    """The changes that a method gave, cut and stored; or waiting for a share of a common budget."""
    first = changes[0]
    unfactored = isinstance(first, torch.Tensor) and (budget is None and None in gathered.ranks)
    if isinstance(first, torch.Tensor) and (first.dim() != 2 or gathered.start is not None or unfactored):
        stored = gathered.whole(first, dtype)
        if not all(bool(torch.isfinite(each).all()) for each in stored.tensors().values()):
            raise NotFinite(f"the result does not fit into {dtype}, or an adapter holds NaN or infinity")
        row = Row(target=target.name, way="whole", ranks=gathered.ranks, norm=float(first.norm()), notes=gathered.notes)
        return _Made(row=row, delta=stored)
    every = _every(gathered)
    most = Budget(rank=min(every, budget.most or every)) if isinstance(budget, Shared) else budget
    factors = tuple(_cut(change, most, every) for change in changes)
    row = Row(target=target.name, way="factors", ranks=gathered.ranks, notes=gathered.notes)
    made = _Made(row=row, gathered=gathered, factors=factors)
    return made if isinstance(budget, Shared) else _stored(made, dtype)


def _asked(method: Method, gathered: Gathered) -> Budget | None:
    """The budget of a method that cuts where nobody gave one: the largest rank that came in."""
    ranks = [rank for rank in gathered.ranks if rank]
    return Budget(rank=max(ranks)) if method.cut and ranks else None


def _every(gathered: Gathered) -> int:
    """The rank that keeps all there can be: the sum of those that came in, as far as the matrix has so many."""
    small = min(gathered.terms[0].shape)
    known = [rank for rank in gathered.ranks if rank is not None]
    return max(1, min(sum(known), small) if len(known) == len(gathered.ranks) else small)


def _cut(change: Change, budget: Budget | None, every: int) -> _Factors:
    """Factors within a budget; without one those that there are, or the best of rank ``every``."""
    if isinstance(change, LowRank) and budget is None and change.up.shape[1] <= every:
        up = change.up.double() * change.scale
        return _Factors(up=up, down=change.down.double(), norm=norm(up, change.down, 1.0))
    budget = budget or Budget(rank=every)
    if isinstance(change, LowRank):
        found = truncate(change.up, change.down, change.scale, budget)
    else:
        found = factorise(change, budget)
    return _Factors(up=found.up, down=found.down, norm=found.norm, error=found.error, values=found.values)


def _stored(made: _Made, dtype: torch.dtype) -> _Made:
    """Factors of every matrix in a dtype, those of a lower rank filled up with zeros."""
    gathered, factors = made.gathered, made.factors
    assert gathered is not None  # only what has factors comes here
    rank = max(each.up.shape[1] for each in factors)
    out, inner = gathered.terms[0].shape
    up, down = torch.zeros(len(factors), out, rank, dtype=dtype), torch.zeros(len(factors), rank, inner, dtype=dtype)
    errors = []
    for number, each in enumerate(factors):
        one, other = each.up.to(dtype), each.down.to(dtype)
        if not (bool(torch.isfinite(one).all()) and bool(torch.isfinite(other).all())):
            raise NotFinite(
                f"the factors of the result do not fit into {dtype}, or an adapter holds NaN or infinity",
                "choose another dtype, or look: lorahub inspect --weights ADAPTER",
            )
        up[number, :, : one.shape[1]], down[number, : other.shape[0]] = one, other
        rounding = norm(each.up - one.double(), other, 1.0) + norm(each.up, each.down - other.double(), 1.0)
        errors.append(min(1.0, each.error + rounding / each.norm) if each.norm else 0.0)
    norms = [each.norm for each in factors]
    row = replace(made.row, rank=rank, norm=math.hypot(*norms), error=combined_error(errors, norms))
    return _Made(row=row, delta=gathered.rebuild(up, down))


def _shared(
    done: Mapping[Target, _Made], order: Sequence[Target], budget: Shared, dtype: torch.dtype
) -> dict[Target, _Made]:
    """The ranks of all targets out of one budget."""
    waiting = [target for target in order if done[target].factors]
    spectra = []
    for target in waiting:
        factors = done[target].factors
        values = combined([each.values for each in factors if each.values is not None])
        cost = sum(each.up.shape[0] + each.down.shape[1] for each in factors)
        missing = sum((each.error * each.norm) ** 2 for each in factors)
        spectra.append(Spectrum(values=values, cost=cost, missing=missing))
    result = {}
    for target, rank in zip(waiting, budget.ranks(spectra), strict=True):
        made = done[target]
        if not rank:
            result[target] = _Made(row=replace(made.row, way="dropped", error=1.0, norm=_norm(made)))
            continue
        result[target] = _stored(replace(made, factors=tuple(_narrow(each, rank) for each in made.factors)), dtype)
    return result


def _norm(made: _Made) -> float:
    return math.hypot(*(each.norm for each in made.factors))


def _narrow(factors: _Factors, rank: int) -> _Factors:
    """The first ``rank`` of them."""
    values = factors.values
    if values is None or rank >= len(values):
        return factors
    lost = (factors.error * factors.norm) ** 2 + float((values[rank:] ** 2).sum())
    return replace(
        factors,
        up=factors.up[:, :rank],
        down=factors.down[:rank],
        values=values[:rank],
        error=min(1.0, math.sqrt(lost) / factors.norm) if factors.norm else 0.0,
    )


def _value(target: Target, deltas: Sequence[Delta | None], weights: Sequence[float]) -> _Made:
    """A whole new value, without one before.

    Raises:
        BaseNeeded: it depends on the value before.
    """
    ranks: tuple[None, ...] = (None,) * len(deltas)
    if not any(delta is not None for delta in deltas):
        return _Made(row=Row(target=target.name, way="dropped", ranks=ranks, notes=("every weight is 0",)))
    found = settled(deltas, weights)
    if found is None:
        raise BaseNeeded(
            f"{target.name}: adapters bring new values for the whole of it, and what they come to depends on the "
            "value before",
            "name a base that has it (--base FOLDER), or give weights that sum to 1 over adapters that all bring one",
        )
    notes = (found.note,) if found.note else ()
    return _Made(row=Row(target=target.name, way="value", ranks=ranks, notes=notes), delta=found.delta)
