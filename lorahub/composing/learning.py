"""Weights for adapters, learned with a few examples by gradient; for scripts.

The controls that say what the result is worth are in ``composition.searching.controls``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorahub import __version__
from lorahub.composing.controlled import DIVERGED, FRESH, at_weights, counter, demand, drawn, trained
from lorahub.composing.trying import Dials, Loss, Stage
from lorahub.composition.searching.controls import Control, Controls
from lorahub.composition.searching.outcomes import Learned
from lorahub.composition.searching.trial_log import as_loss
from lorahub.composition.searching.weighed import GRANULARITIES, Granularity
from lorahub.deltas.kind import JSON
from lorahub.errors import NotFinite, UsageError
from lorahub.fetching import Progress, Source, quiet
from lorahub.lazy import torch
from lorahub.names import did_you_mean
from lorahub.sources import Given

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Learned", "Loss", "learn"]


def learn(
    model: nn.Module,
    adapters: Mapping[str, Given] | Sequence[Source],
    loss: Loss,
    *,
    steps: int = 100,
    granularity: Granularity = "layer",
    lr: float = 1e-2,
    seed: int = 0,
    draws: int = 3,
    fresh_lr: float = 1e-3,
    batches: int | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    hub: str | None = None,
    progress: Progress = quiet,
) -> Learned:
    """Learn weights by gradient, one for each adapter and layer: LoRA Soups' CAT (https://arxiv.org/abs/2410.13025).

    The adapters are attached once, their factors and the model stay as they are; Adam changes the weights, 1/n at
    first.  The result's loss and the controls' are the mean of ``loss`` over ``batches`` steps, without gradients.
    The controls take about ``draws + 1`` times as long as the learning itself.  PyTorch's generators begin at the seed
    in each training and each evaluation.

    Args:
        model: any ``nn.Module``; afterwards it is what it was, also where something fails.
        adapters: name -> adapter, or a list of references.
        loss: (model, step) -> a tensor of one number, with gradients, of the examples of that step.
        steps: how many, also for the controls.
        granularity: what shares a weight: "layer" (a name up to its first number), "target" or "adapter".
        lr: Adam's learning rate for weights.
        seed: of random adapters, trainings and evaluations.
        draws: how many times random adapters of the same shapes and norms are weighed likewise.
        fresh_lr: Adam's learning rate for the control of a freshly trained adapter.
        batches: over how many steps a loss is averaged; over all that were trained by default.
        allow: finding codes to accept.
        compat: "peft" or "strict"; see ``lorahub.load``.
        hub: path of a folder hub.
        progress: called with (steps and evaluations done, in all).

    Raises:
        Degraded, BaseMismatch, Incompatible, IntegrityError: see ``lorahub.check``.
        UsageError: a malformed request; a loss without gradients; adapters are attached to the model already.
        NotFinite: the loss came to no finite number while the weights were learned.
        BaseException: what the loss raises; the model has no adapters then.
    """
    over = steps if batches is None else batches
    demand(min(lr, fresh_lr), draws=draws, steps=steps, batches=over, seed=seed)
    if granularity not in GRANULARITIES:
        raise UsageError(
            f"there is no granularity '{granularity}'.{did_you_mean(granularity, GRANULARITIES)}",
            f"one of: {', '.join(GRANULARITIES)}",
        )

    def objective(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(as_loss(loss(model, step)) for step in range(over)) / over

    with Stage(model, adapters, seed=seed, allow=allow, compat=compat, hub=hub) as stage:
        names = stage.names
        tick = counter(progress, steps * (2 + draws) + len(names) + 3)

        def value(chosen: Sequence[str], weights: Sequence[float] | None = None) -> float:
            stage.choose(chosen, weights)
            tick()
            return stage.score(objective)

        with stage.dialled(granularity) as dials:
            stage.choose(dials.names)
            curve, used = stage.train(dials.leaves(), loss, steps=steps, lr=lr, tick=tick)
            reached = value(dials.names)
            if not math.isfinite(reached):
                raise NotFinite("the loss of the learned weights is no finite number", "lower lr, or take fewer steps")
            weights, by_target, unused = _read(names, dials, used)
            dials.put(1.0)
            even = [1.0 / len(names)] * len(names)
            rows = [
                Control(role="base", name="the base", loss=value(())),
                at_weights(names, even, "uniform", "equal weights", value(dials.names, even)),
                *(at_weights([name], [1.0], "single", name, value([name])) for name in names),
            ]
        for draw in range(1, draws + 1):
            if isinstance(brought := drawn(stage, draw), Control):
                rows.append(brought)
                continue
            with stage.dialled(granularity, brought) as anew:
                stage.choose(anew.names)
                try:
                    stage.train(anew.leaves(), loss, steps=steps, lr=lr, tick=tick)
                    rows.append(Control(role="random", name=f"draw {draw}", loss=stage.score(objective)))
                except NotFinite:
                    rows.append(Control(role="random", name=f"draw {draw}", loss=math.nan, note=DIVERGED))
        anew_loss = trained(stage, loss, objective, steps=steps, lr=fresh_lr, tick=tick)
        note = f"Adam, {steps} steps at {fresh_lr:g}" if math.isfinite(anew_loss) else DIVERGED
        rows.append(Control(role="fresh", name=FRESH, loss=anew_loss, note=note))
    return Learned(
        weights=weights,
        by_target=by_target,
        loss=reached,
        curve=curve,
        unused=unused,
        controls=Controls(loss=reached, rows=tuple(rows)),
        settings=MappingProxyType(
            {
                "lorahub": __version__,
                "adapters": [*names],
                "granularity": granularity,
                "steps": steps,
                "lr": lr,
                "seed": seed,
                "draws": draws,
                "fresh_lr": fresh_lr,
                "batches": over,
                "compat": compat,
            }
        ),
    )


def _read(
    names: Sequence[str], dials: Dials, used: Sequence[bool]
) -> tuple[
    Mapping[str, tuple[Mapping[str, JSON], ...]], Mapping[str, Mapping[str, float]], Mapping[str, tuple[str, ...]]
]:
    """What was learned: rules, weights by target, and targets that the loss never depended on."""
    rules: dict[str, tuple[Mapping[str, JSON], ...]] = {}
    by_target: dict[str, Mapping[str, float]] = {}
    unused: dict[str, tuple[str, ...]] = {}
    marks = iter(used)
    for name, groups, weights in zip(names, dials.groups, dials.weights, strict=True):
        own = [(group, weight.item(), next(marks)) for group, weight in zip(groups, weights, strict=True)]
        rules[name] = tuple(
            {"filter": pattern, "value": number} for group, number, _ in own for pattern in group.filters
        )
        by_target[name] = {target.name: number for group, number, _ in own for target in group.targets}
        if silent := tuple(target.name for group, _, mark in own if not mark for target in group.targets):
            unused[name] = silent
    return MappingProxyType(rules), MappingProxyType(by_target), MappingProxyType(unused)
