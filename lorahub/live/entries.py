"""What is added to a module's output: the arithmetic of live adapters, one product for all low-rank ones together.

Computed in the dtype of the output: the factors are converted to it, the rank-sized product between them is multiplied
with weight and scale in float32 at least, and the sum is rounded once, onto the output.  Knows spots; no selections.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, final

from lorahub.bases.site import Site
from lorahub.deltas.delta import Delta, LowRank
from lorahub.errors import UsageError
from lorahub.lazy import torch
from lorahub.live import grouped
from lorahub.live.effective import change, cut, writable
from lorahub.live.grouped import Rows
from lorahub.live.spots import Loaded, Part, Spot, Way

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ByRow", "Entry", "Stack", "entry_of", "in_graph", "row_entry", "stack_of"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """The factors of several adapters at one spot: ``up`` [out, r], ``down`` [r, in * prod(k)].

    Attributes:
        scales: of each adapter that has any.
        ranks: how many columns of ``up`` each of these takes.
        which: their positions among the names.
        spare: columns of zeros behind them.
        anew: made of tensors that are being trained, and not those themselves.
    """

    up: torch.Tensor
    down: torch.Tensor
    scales: tuple[float, ...]
    ranks: tuple[int, ...]
    which: tuple[int, ...]
    spare: int
    anew: bool

    def fits(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it can be used with outputs of this dtype on this device."""
        return self.up.dtype == dtype and self.up.device == device


def stack_of(
    spot: Spot, adapters: Sequence[Loaded], dtype: torch.dtype, device: torch.device, capacity: int
) -> Stack | None:
    """Stack the low-rank parts of ``adapters``, with zeros up to ``capacity``; None where there is nothing.

    Raises:
        UsageError: their ranks add up to more than the capacity.
    """
    trains = any(part.trains for each in adapters for part in each.takes(spot.key, Way.LOW_RANK))
    found = [(which, low) for which, each in enumerate(adapters) if (low := _low(spot, each, trains)) is not None]
    rank = sum(low.down.shape[0] for _, low in found)
    if capacity and rank > capacity:
        raise UsageError(
            f"the adapters chosen have rank {rank} together at {spot.place.name}, and a capacity of {capacity} was "
            "asked for",
            "choose fewer, or attach with a larger capacity",
        )
    spare = capacity - rank if capacity and spot.site is not None and spot.site.op != "bias" else 0
    if not found and not spare:
        return None
    ups, downs = ([tensor.to(device, dtype) for tensor in side] for side in _sides(found))
    if spare:
        out, width = spot.sizes()
        ups.append(torch.zeros(out, spare, dtype=dtype, device=device))
        downs.append(torch.zeros(spare, width, dtype=dtype, device=device))
    alone = len(ups) == 1
    own = [each for adapter in adapters for part in adapter.takes(spot.key, Way.LOW_RANK) for each in _tensors(part)]
    kept = alone and all(any(side is each for each in own) for side in (ups[0], downs[0]))
    return Stack(
        up=ups[0] if alone else torch.cat(ups, 1),
        down=downs[0] if alone else torch.cat(downs),
        scales=tuple(low.scale for _, low in found),
        ranks=tuple(low.down.shape[0] for _, low in found),
        which=tuple(which for which, _ in found),
        spare=spare,
        anew=trains and not kept,
    )


def _tensors(part: Part) -> tuple[torch.Tensor, ...]:
    return tuple(part.delta.tensors().values())


def _low(spot: Spot, adapter: Loaded, trains: bool) -> LowRank | None:
    return spot.low_rank(adapter.parts.get(spot.key, ())) if trains else adapter.factors.get(spot.key)


def _sides(found: Sequence[tuple[int, LowRank]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [low.up for _, low in found], [low.down for _, low in found]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What is added at one spot to all rows alike.

    Attributes:
        site: how the output comes from the weight.
        stack: factors, or None.
        factor: what the product between them is multiplied with: one number, or one for each rank.
        number: the factor, where it is one number.
        owns: changes with a way of their own, each with its weight.
        changes: what changes the numbers of a quantised weight, each with its weight.
        spot: where.
        over: groups of processes over which the product between the factors is summed, each having a part of it.
    """

    site: Site
    stack: Stack | None
    factor: torch.Tensor | None
    number: float | None
    owns: tuple[tuple[Delta, torch.Tensor], ...]
    changes: tuple[tuple[Part, float], ...]
    spot: Spot
    over: tuple[ProcessGroup, ...] = ()

    @property
    def anew(self) -> bool:
        """Whether it has to be made again for each call."""
        return self.stack is not None and self.stack.anew

    def fits(self, y: torch.Tensor) -> bool:
        """Whether it was made for outputs of this dtype on this device."""
        return self.stack is None or self.stack.fits(y.dtype, y.device)

    def add(self, x: torch.Tensor, y: torch.Tensor, *, changes: bool = True) -> torch.Tensor:
        """Add everything to ``y``, the fresh output of the module for ``x``, in place; gives ``y``.

        ``changes``: also what changes a quantised weight's numbers, which is in ``y`` otherwise already.
        """
        y = writable(y)
        added = [(delta.contribution(x, y, self.site), weight) for delta, weight in self.owns]
        if self.changes and changes:
            added.append((_beside(self.spot, self.changes, x, y), torch.ones(())))
        if self.stack is not None:
            site, up, down = self.site, self.stack.up, self.stack.down
            if not self.stack.fits(y.dtype, y.device):  # only in a graph, which converts as it goes
                up, down = up.to(y), down.to(y)
            inner = site.inner(x if site.op == "embedding" else x.to(y.dtype), up, down)
            for group in self.over:
                torch.distributed.all_reduce(inner, group=group)
            number = None if torch.compiler.is_compiling() else self.number  # it would be part of the graph
            if number is None or site.op == "conv":
                inner, number = self._weighted(inner).to(y.dtype), 1.0
            if site.op == "conv":
                y.add_(site.outer(inner, up, down))
            else:
                matrix = up.t() if site.op == "linear" else down
                y.view(-1, y.shape[-1]).addmm_(inner.reshape(-1, inner.shape[-1]), matrix, alpha=number)
        for value, weight in added:
            assert value is not None
            y.add_((value * weight).to(y.dtype))
        return y

    def _weighted(self, inner: torch.Tensor) -> torch.Tensor:
        assert self.factor is not None
        factor = self.factor
        if factor.dim() and self.site.op == "conv":
            factor = factor.repeat(self.site.groups).reshape(-1, *(1 for _ in self.site.kernel))
        return inner * factor


def entry_of(
    spot: Spot, adapters: Sequence[Loaded], strengths: Sequence[float], stack: Stack | None, device: torch.device
) -> Entry | None:
    """What ``adapters`` at ``strengths`` add at a spot, or None."""
    owns = tuple(
        (cut(part.delta, part.piece), torch.tensor(strength, dtype=torch.float64))
        for adapter, strength in zip(adapters, strengths, strict=True)
        for part in adapter.takes(spot.key, Way.OWN)
    )
    changes = tuple(
        (part, strength)
        for adapter, strength in zip(adapters, strengths, strict=True)
        for part in adapter.takes(spot.key, Way.CHANGE)
    )
    if spot.site is None or (stack is None and not owns and not changes):
        return None
    factor = _factor(stack, strengths, device) if stack else None
    number = None if factor is None or factor.dim() else float(factor)
    return Entry(spot.site, stack, factor, number, owns, changes, spot)


def in_graph(entry: Entry, adapters: Sequence[Loaded], y: torch.Tensor) -> Entry:
    """The entry with its factors stacked anew from what they are made of, as part of a graph that is being made."""
    stack = entry.stack
    if stack is None:
        return entry
    ups, downs = [], []
    for adapter in adapters:  # loops, which graphs are made of more readily than of comprehensions
        low = entry.spot.low_rank(adapter.parts.get(entry.spot.key, ()))
        if low is not None:
            ups.append(low.up.to(y))
            downs.append(low.down.to(y))
    if stack.spare:
        ups.append(y.new_zeros(ups[0].shape[0], stack.spare))
        downs.append(y.new_zeros(stack.spare, downs[0].shape[1]))
    up = ups[0] if len(ups) == 1 else torch.cat(ups, 1)
    down = downs[0] if len(downs) == 1 else torch.cat(downs)
    made = Stack(up, down, stack.scales, stack.ranks, stack.which, stack.spare, anew=False)
    return Entry(entry.site, made, entry.factor, entry.number, entry.owns, entry.changes, entry.spot)


def _beside(spot: Spot, parts: Sequence[tuple[Part, float]], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """What is added to the output where parts are added to the weight, which stays as it is; like ``y``."""
    assert spot.site is not None
    weight = change(spot.numbers(), [part.addend(strength) for part, strength in parts]).to(y.dtype)
    inputs = x if spot.site.op == "embedding" else x.to(y.dtype)
    if spot.site.op == "bias":
        return spot.site.call(inputs, weight).expand_as(y)
    return spot.site.call(inputs, weight.transpose(0, 1) if spot.site.transposed else weight)


def _factor(stack: Stack, strengths: Sequence[float], device: torch.device) -> torch.Tensor:
    each = [strengths[which] * scale for which, scale in zip(stack.which, stack.scales, strict=True)]
    if len(each) == 1 and not stack.spare:
        return torch.tensor(each[0], dtype=torch.float64)  # of no axis, so it takes the dtype of what it multiplies
    numbers = [number for number, rank in zip(each, stack.ranks, strict=True) for _ in range(rank)]
    wide = torch.float64 if stack.up.dtype == torch.float64 else torch.float32
    return torch.tensor([*numbers, *([0.0] * stack.spare)], dtype=wide, device=device)


_Run: TypeAlias = "Callable[[ByRow, torch.Tensor, torch.Tensor], torch.Tensor]"


@final
@dataclass(frozen=True, slots=True, eq=False)
class ByRow:
    """What is added at one spot to each row by itself.

    Attributes:
        site: how the output comes from the weight.
        factors: adapter -> low-rank factors.
        rows: which adapter each row takes.
        strengths: a weight for each of ``rows.adapters``, as a tensor; None where all are 1.
        others: what has no such factors: position of its adapter, its weight, its parts.
        run: what does the work; a graph breaks there, for what is done depends on the rows.
    """

    site: Site
    factors: Mapping[str, LowRank]
    rows: Rows
    strengths: torch.Tensor | None
    spot: Spot
    others: tuple[tuple[int, float, Part], ...]
    run: _Run

    @property
    def anew(self) -> bool:
        """Whether it has to be made again for each call."""
        return any(low.up.requires_grad or low.down.requires_grad for low in self.factors.values())

    def fits(self, y: torch.Tensor) -> bool:
        """Whether it was made for outputs on this device."""
        return self.strengths is None or self.strengths.device == y.device

    def add(self, x: torch.Tensor, y: torch.Tensor, *, changes: bool = True) -> torch.Tensor:
        """Add to each row of ``y`` what its adapter adds, in place.

        Raises:
            UsageError: the batch has another number of rows, or its rows cannot be told apart here.
        """
        return (self.run if torch.compiler.is_compiling() else _by_row)(self, x, writable(y))

    def one(self, part: Part, strength: float, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """What a part without low-rank factors adds to the rows of its adapter; ``y`` is their output before."""
        if part.way is Way.OWN:
            value = cut(part.delta, part.piece).contribution(x, y, self.site)
            assert value is not None
            return value * strength
        return _beside(self.spot, [(part, strength)], x, y)


def _by_row(entry: ByRow, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    before = y.clone() if entry.others else y
    try:
        y = grouped.add(y, x, entry.site, entry.factors, entry.rows, entry.strengths)
    except UsageError as error:
        raise UsageError(f"{entry.spot.place.name}: {error.message}", error.hint) from None
    for which, strength, part in entry.others:
        rows = torch.tensor(entry.rows.places[which], device=y.device)
        axis = entry.site.rows or 0
        value = entry.one(part, strength, x.index_select(axis, rows), before.index_select(axis, rows))
        y.index_add_(axis, rows, value.to(y.dtype))
    return y


@functools.cache
def _outside_graphs() -> _Run:
    disable: Callable[[_Run], _Run] = torch.compiler.disable
    return disable(_by_row)


def row_entry(
    spot: Spot, adapters: Sequence[Loaded], strengths: Sequence[float], rows: Rows, device: torch.device
) -> ByRow | None:
    """What each row of a batch takes at a spot, or None where no adapter does anything."""
    others = tuple(
        (which, strength, part)
        for which, (adapter, strength) in enumerate(zip(adapters, strengths, strict=True))
        for part in adapter.takes(spot.key, Way.OWN, Way.WEIGHT, Way.CHANGE)
    )
    trains = any(part.trains for adapter in adapters for part in adapter.parts.get(spot.key, ()))
    factors = {each.name: low for each in adapters if (low := _low(spot, each, trains)) is not None}
    if spot.site is None or not (others or factors):
        return None
    weights = None if all(strength == 1 for strength in strengths) else torch.tensor(strengths, device=device)
    return ByRow(spot.site, factors, rows, weights, spot, others, _outside_graphs())
