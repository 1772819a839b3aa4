"""What searching and learning have in common: controls on the same stage, and numbers that make sense."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from lorahub.composing.trying import Loss, Stage
from lorahub.composition.searching.controls import Control, Role
from lorahub.errors import Incompatible, NotFinite, UsageError
from lorahub.fetching import Progress
from lorahub.lazy import torch
from lorahub.live.attached import Planned

if TYPE_CHECKING:
    from torch import nn

__all__ = ["DIVERGED", "FRESH", "Objective", "at_weights", "counter", "demand", "drawn", "trained"]

Objective: TypeAlias = "Callable[[nn.Module], float | torch.Tensor]"
"""What a model costs on the examples: one number, the smaller the better.  Evaluation mode and no gradients are its
own business."""


FRESH = "a freshly trained adapter"
DIVERGED = "its training came to no finite number"


def drawn(stage: Stage, draw: int) -> Mapping[str, Planned] | Control:
    """Random adapters; or why there are none, as where a change's norm depends on a weight that cannot be read."""
    try:
        return stage.random(draw)
    except Incompatible as error:
        return Control(role="random", name=f"draw {draw}", loss=None, note=error.message)


def trained(
    stage: Stage,
    loss: Loss,
    objective: Objective,
    *,
    steps: int,
    lr: float,
    tick: Callable[[], None] = lambda: None,
) -> float:
    """What an adapter comes to that is trained afresh; NaN where its training comes to no finite number."""
    planned, leaves = stage.fresh()
    with stage.plain(planned) as attached:
        stage.choose(attached)
        try:
            stage.train(leaves, loss, steps=steps, lr=lr, tick=tick)
        except NotFinite:
            return math.nan
        return stage.score(objective)


def at_weights(names: Sequence[str], weights: Sequence[float], role: Role, name: str, loss: float) -> Control:
    """A control that is adapters at weights."""
    return Control(role=role, name=name, loss=loss, weights=dict(zip(names, weights, strict=True)))


def demand(lr: float, **counts: int) -> None:
    """Refuse numbers that make no sense."""
    if not 0 < lr < math.inf:
        raise UsageError(f"a learning rate of {lr} makes no sense", "give a positive number, as 0.01")
    for what, count in counts.items():
        least = 0 if what in {"draws", "seed"} else 1
        if count < least:
            raise UsageError(f"{what}={count} makes no sense", f"give {least} or more")


def counter(progress: Progress, total: int) -> Callable[[], None]:
    """What counts one step of ``total`` each time it is called."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total)

    return tick
