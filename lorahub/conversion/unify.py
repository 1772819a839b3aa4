"""Exact rewritings of a whole adapter, for formats that keep a kind, a scale or a rank once for all of it.

MLX has one kind, one scale and one rank, GGUF one alpha, PEFT one kind.  Each function takes all changes and gives them
back; what it cannot bring into line stays as it is, and the format will say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from lorahub.conversion.change import Change, Weight
from lorahub.conversion.folding import commonest, fold
from lorahub.conversion.rewrite import Obstacle, rewrite
from lorahub.deltas.dora import DoRA
from lorahub.deltas.full import Full
from lorahub.deltas.lora import LoRA
from lorahub.lazy import torch

__all__ = ["Unify", "biases_beside", "ladder", "one_kind", "one_rank", "one_scale", "pad"]

Unify = Callable[[Sequence[Change]], "list[Change]"]


def one_kind(changes: Sequence[Change], weight: Weight) -> list[Change]:
    """Everything that is LoRA in another dress as LoRA."""
    return [_plain(change, weight) for change in changes]


def _plain(change: Change, weight: Weight) -> Change:
    if isinstance(change.delta, LoRA) or change.delta.kind in ("full", "replace"):
        return change
    try:
        return rewrite(change, weight)
    except Obstacle:
        return change


def biases_beside(changes: Sequence[Change]) -> list[Change]:
    """A difference of a bias at the scale of the factors beside it, which is how PEFT keeps one: ``lora_bias``."""
    scales = {
        (change.target.component, change.target.module): change.delta.scale
        for change in changes
        if isinstance(change.delta, LoRA) and change.target.parameter == "weight" and change.delta.scale
    }
    result = []
    for change in changes:
        delta, scale = change.delta, scales.get((change.target.component, change.target.module))
        if isinstance(delta, Full) and change.target.parameter == "bias" and scale and delta.scale != scale:
            result.append(change.become(Full(fold(delta.diff, delta.scale / scale), scale), "scale-folded"))
        else:
            result.append(change)
    return result


def one_scale(changes: Sequence[Change]) -> list[Change]:
    """The commonest scale everywhere; the ratio to it is multiplied into the other modules' ``up``."""
    common = commonest(change.delta.scale for change in changes if isinstance(change.delta, LoRA | DoRA))
    return [_scaled(change, common) if common else change for change in changes]


def _scaled(change: Change, scale: float) -> Change:
    delta = change.delta
    if not isinstance(delta, LoRA | DoRA) or delta.scale == scale:
        return change
    up = fold(delta.up, delta.scale / scale)
    return change.become(replace(delta, up=up, down=delta.down.to(up.dtype), scale=scale), "scale-folded")


def one_rank(changes: Sequence[Change]) -> list[Change]:
    """The largest rank everywhere, by rows and columns of zeros."""
    ranks = [change.delta.down.shape[0] for change in changes if isinstance(change.delta, LoRA | DoRA)]
    largest = max(ranks, default=0)
    return [
        change.become(pad(change.delta, largest), "rank-padded")
        if isinstance(change.delta, LoRA | DoRA) and change.delta.down.shape[0] < largest
        else change
        for change in changes
    ]


def pad(delta: LoRA | DoRA, rank: int) -> LoRA | DoRA:
    """The same change with zeros up to ``rank``."""
    up, down = delta.up, delta.down
    more = rank - down.shape[0]
    up = torch.cat([up, up.new_zeros(up.shape[0], more, *up.shape[2:])], dim=1)
    down = torch.cat([down, down.new_zeros(more, *down.shape[1:])])
    return replace(delta, up=up, down=down)


def nearest_scale(changes: Sequence[Change]) -> list[Change]:
    """The nearest scale that an alpha over the rank gives in double precision: at most one unit in the last place."""
    return [_nearest(change) for change in changes]


def _nearest(change: Change) -> Change:
    delta = change.delta
    if not isinstance(delta, LoRA | DoRA) or not (rank := delta.down.shape[0]):
        return change
    scale = delta.scale * rank / rank
    return change if scale == delta.scale else change.become(replace(delta, scale=scale), "scale-rounded")


def ladder(weight: Weight) -> tuple[tuple[Unify, ...], ...]:
    """What is tried, the least invasive first, until the format takes it."""
    plain: Unify = partial(one_kind, weight=weight)
    return (
        (),
        (biases_beside,),
        (nearest_scale,),
        (nearest_scale, biases_beside),
        (plain,),
        (plain, nearest_scale),
        (plain, nearest_scale, biases_beside),
        (plain, one_scale),
        (plain, one_scale, nearest_scale),
        (plain, one_scale, nearest_scale, biases_beside),
        (plain, one_scale, one_rank),
        (plain, one_scale, one_rank, nearest_scale),
    )
