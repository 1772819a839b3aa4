"""What several adapters do to one target, made ready for a method: changes of one shape, and the way back to a delta.

A target is a matrix (a convolution's kernel flattened), a stack of matrices (experts, one after the other), a vector,
or a whole new value.  Changes that look at the weight have no sum in factor space; what becomes of them is a choice:
``refuse``; ``linearise`` takes of a DoRA its factors alone, without the lengths; ``dense`` takes the change that it
makes to the base at hand.  Knows no method.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lorahub.bases.layout import Target
from lorahub.composition.method import Change, Terms
from lorahub.deltas.delta import Delta, LowRank
from lorahub.deltas.dora import DoRA
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.deltas.full import Full
from lorahub.deltas.lora import LoRA
from lorahub.deltas.replace import Replace
from lorahub.errors import BaseMismatch, BaseNeeded, UnsupportedKind
from lorahub.lazy import torch

__all__ = ["MODES", "Gathered", "Mode", "Weights", "gather", "seed_of"]

Mode: TypeAlias = Literal["refuse", "linearise", "dense"]
MODES: tuple[Mode, ...] = ("refuse", "linearise", "dense")

Weights: TypeAlias = "Callable[[Target], torch.Tensor | None]"
"""The base's weight of a target, [out, in, *k], float64; None where the base has none."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gathered:
    """One target, ready.

    Attributes:
        terms: one for a matrix or a vector, one for each matrix of a stack.
        shape: of the parameter.
        ranks: of each adapter's change; None where it has none, 0 where it leaves the target alone.
        rebuild: from the factors of each matrix, ``up`` [n, out, r] and ``down`` [n, r, in], to the delta.
        start: the parameter's value before, where the result is a whole new one; else None.
        notes: what was done to fit them together, in words.
    """

    terms: tuple[Terms, ...]
    shape: tuple[int, ...]
    ranks: tuple[int | None, ...]
    rebuild: Callable[[torch.Tensor, torch.Tensor], Delta]
    start: torch.Tensor | None = None
    notes: tuple[str, ...] = ()

    def whole(self, change: torch.Tensor, dtype: torch.dtype) -> Delta:
        """The delta of a change that stays as it is: a difference, or a new value."""
        change = change.reshape(self.shape)
        if self.start is None:
            return Full(change.to(dtype).contiguous(), 1.0)
        return Replace((self.start + change.double()).to(dtype).contiguous())


def gather(
    target: Target,
    deltas: Sequence[Delta | None],
    weights: Sequence[float],
    seeds: Sequence[int],
    *,
    mode: Mode = "refuse",
    base: Weights | None = None,
) -> Gathered:
    """Bring the changes of one target together.

    Args:
        target: for names and seeds.
        deltas: of each adapter; None where it leaves the target alone; at least one is there.
        weights: of each.
        seeds: of each; see ``seed_of``.
        mode: what becomes of changes that look at the weight.
        base: the base's weights.

    Raises:
        BaseMismatch: they are for parameters of different shapes.
        BaseNeeded: what they do depends on the base, which was not given.
        UnsupportedKind: they do not go together; the message says what would.
    """
    there = [each for each in deltas if each is not None]
    if any(isinstance(each, ExpertLoRA) for each in there):
        return _stack(target, deltas, weights, seeds)
    start = None
    notes: list[str] = []
    if any(each.replacement() is not None for each in there):
        start = _start(target, there, base)
    shape = _shape(target, there, base)
    found = [None if each is None else _change(target, each, shape, mode, base, start, notes) for each in deltas]
    flat = shape if len(shape) < 2 else (shape[0], _inner(shape))
    changes = tuple(_nothing(flat) if each is None else _flat(each, flat) for each in found)
    up_like = next((each.up for each in there if isinstance(each, LoRA | DoRA)), None)

    def rebuild(up: torch.Tensor, down: torch.Tensor) -> Delta:
        rank = up.shape[2]
        ones = (1,) * (len(shape) - 2) if up_like is None or up_like.dim() > 2 else ()
        return LoRA(up[0].reshape(shape[0], rank, *ones), down[0].reshape(rank, *shape[1:]), 1.0)

    ranks = tuple(
        0 if each is None else change.up.shape[1] if isinstance(change, LowRank) else None
        for each, change in zip(deltas, changes, strict=True)
    )
    terms = Terms(
        shape=flat, changes=changes, weights=tuple(weights), seeds=tuple(seed_of(seed, target.name) for seed in seeds)
    )
    return Gathered(
        terms=(terms,),
        shape=shape,
        ranks=ranks,
        rebuild=rebuild,
        start=start,
        notes=tuple(dict.fromkeys(notes)),
    )


def seed_of(seed: int, name: str) -> int:
    """A seed for one name out of one for all: 63 bits of a SHA-256, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]) >> 1


def _stack(target: Target, deltas: Sequence[Delta | None], weights: Sequence[float], seeds: Sequence[int]) -> Gathered:
    """Experts: one matrix after the other."""
    there = [each for each in deltas if each is not None]
    stacks = [each for each in there if isinstance(each, ExpertLoRA)]
    if len(stacks) < len(there):
        raise UnsupportedKind(
            f"{target.name}: a change of a stack of experts goes with others like it, not with a "
            f"{next(each.kind for each in there if not isinstance(each, ExpertLoRA))}",
            "convert them to one kind first: lorahub convert --help",
        )
    sizes = {(*each.up.shape[:2], each.down.shape[2]) for each in stacks}
    ways = {each.transposed for each in stacks}
    if len(sizes) > 1 or len(ways) > 1:
        raise _misfit(target, [each.shape() for each in stacks])
    experts, out, inner = sizes.pop()
    (transposed,) = ways

    def of(delta: Delta | None, expert: int) -> LowRank:
        if not isinstance(delta, ExpertLoRA):
            return LowRank(torch.zeros(out, 0), torch.zeros(0, inner), 1.0)
        return LowRank(delta.up[expert], delta.down[expert], delta.scale)

    terms = tuple(
        Terms(
            shape=(out, inner),
            changes=tuple(of(delta, expert) for delta in deltas),
            weights=tuple(weights),
            seeds=tuple(seed_of(seed, f"{target.name} {expert}") for seed in seeds),
        )
        for expert in range(experts)
    )
    return Gathered(
        terms=terms,
        shape=stacks[0].shape() or (experts, out, inner),
        ranks=tuple(each.up.shape[2] if isinstance(each, ExpertLoRA) else 0 for each in deltas),
        rebuild=lambda up, down: ExpertLoRA(up, down, 1.0, transposed),
    )


def _change(
    target: Target,
    delta: Delta,
    shape: tuple[int, ...],
    mode: Mode,
    base: Weights | None,
    start: torch.Tensor | None,
    notes: list[str],
) -> Change:
    """What one delta does, as factors or as a tensor."""
    new = delta.replacement()
    if new is not None:
        assert start is not None  # it was looked up for this
        return (new.double() - start).float()
    if (low := delta.low_rank()) is not None:
        return low
    if delta.additive:
        return delta.delta(torch.zeros(shape, dtype=torch.float32))
    if mode == "linearise" and isinstance(delta, DoRA):
        notes.append("the lengths of a DoRA were left out")
        return LowRank(delta.up.flatten(1), delta.down.flatten(1), delta.scale)
    if mode == "dense":
        return _against(target, delta, base).float()
    linear = "; or its factors without the lengths: --non-additive linearise" if delta.kind == "dora" else ""
    raise UnsupportedKind(
        f"{target.name}: a change of kind {delta.kind} looks at the weight, so that there is no sum apart from a base",
        f"take the change that it makes to a base: --base BASE --non-additive dense --rank R{linear}",
    )


def _against(target: Target, delta: Delta, base: Weights | None) -> torch.Tensor:
    """The change that a delta makes to the base at hand, float64."""
    if base is None:
        raise BaseNeeded(
            f"{target.name}: what a change of kind {delta.kind} does depends on the base", "name it: --base FOLDER"
        )
    values = {
        name: base(Target(target.component, target.module, name if name != "weight" else target.parameter))
        for name in delta.reads
    }
    weight = base(target)
    if weight is None or any(value is None for value in values.values()):
        raise BaseMismatch(f"the base has no {target.name}, or not all that a change of it looks at", "is it the base?")
    return delta.delta(weight, **{name: value for name, value in values.items() if value is not None})


def _start(target: Target, there: Sequence[Delta], base: Weights | None) -> torch.Tensor:
    """The parameter as it was, where an adapter brings a whole new value."""
    if base is None:
        raise BaseNeeded(
            f"{target.name}: an adapter brings a new value for the whole of it, and its change is not known "
            "without the value before",
            "name the base: --base FOLDER",
        )
    before = base(target)
    shapes = {tuple(value.shape) for each in there if (value := each.replacement()) is not None}
    if before is None or shapes != {tuple(before.shape)}:
        raise UnsupportedKind(
            f"{target.name}: adapters bring different new modules for it, and the base has none of that shape, so "
            "nothing says what is between them",
            "compose adapters of one task head, or leave the heads out",
        )
    return before


def _shape(target: Target, there: Sequence[Delta], base: Weights | None) -> tuple[int, ...]:
    shapes = [shape for each in there if (shape := each.shape()) is not None]
    if len(shapes) < len(there) and base is not None and (weight := base(target)) is not None:
        return tuple(weight.shape)
    if not shapes:
        low = next((low for each in there if (low := each.low_rank())), None)
        if low is not None:
            return low.up.shape[0], low.down.shape[1]
        if base is not None:
            raise BaseMismatch(f"the base has no {target.name}, whose shape nothing else tells", "is it the base?")
        raise BaseNeeded(f"{target.name}: its tensors do not tell the weight's shape", "name the base: --base FOLDER")
    if len(set(shapes)) > 1:
        raise _misfit(target, shapes)
    return shapes[0]


def _misfit(target: Target, shapes: Sequence[tuple[int, ...] | None]) -> BaseMismatch:
    told = " and ".join(str(list(shape or ())) for shape in dict.fromkeys(shapes))
    return BaseMismatch(
        f"{target.name}: the adapters change weights of different shapes, {told}: they are for different bases",
        "compose adapters of one base: lorahub inspect ADAPTER says which it names",
    )


def _nothing(flat: Sequence[int]) -> Change:
    if len(flat) < 2:
        return torch.zeros(tuple(flat), dtype=torch.float32)
    return LowRank(torch.zeros(flat[0], 0), torch.zeros(0, flat[1]), 1.0)


def _flat(change: Change, flat: tuple[int, ...]) -> Change:
    return change if isinstance(change, LowRank) else change.reshape(flat)


def _inner(shape: Sequence[int]) -> int:
    size = 1
    for each in shape[1:]:
        size *= each
    return size
