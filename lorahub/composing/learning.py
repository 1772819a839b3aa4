"""Weights for adapters, found with a few examples: by search without gradients, or by gradient; for scripts.

Either comes with controls that say what the result is worth: see ``composition.controls``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

from lorahub import __version__
from lorahub.composing.trying import Dials, Loss, Stage
from lorahub.composition.searching.controls import Control, Controls, Role
from lorahub.composition.searching.optimisers import Space
from lorahub.composition.searching.optimisers import search as find
from lorahub.composition.searching.outcomes import Learned, Searched
from lorahub.composition.searching.trial_log import Journal, as_loss
from lorahub.composition.searching.weighed import GRANULARITIES, Granularity
from lorahub.deltas.kind import JSON
from lorahub.errors import Incompatible, NotFinite, UsageError
from lorahub.lazy import torch
from lorahub.live.attached import Planned
from lorahub.names import did_you_mean
from lorahub.sources import Given, Progress, Source, quiet

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Learned", "Loss", "Objective", "Searched", "learn", "search"]

Objective: TypeAlias = "Callable[[nn.Module], float | torch.Tensor]"
"""What a model costs on the examples: one number, the smaller the better.  Evaluation mode and no gradients are its
own business."""


FRESH = "a freshly trained adapter"
DIVERGED = "its training came to no finite number"


def search(
    model: nn.Module,
    adapters: Mapping[str, Given] | Sequence[Source],
    objective: Objective,
    *,
    fresh: Loss | Given | None,
    budget: int = 40,
    bounds: tuple[float, float] = (-1.5, 1.5),
    start: float = 0.0,
    l1: float = 0.05,
    optimiser: str = "cma",
    seed: int = 0,
    draws: int = 3,
    fresh_steps: int | None = None,
    fresh_lr: float = 1e-3,
    log: str | os.PathLike[str] | None = None,
    allow: Collection[str] = (),
    compat: str | None = None,
    hub: str | None = None,
    progress: Progress = quiet,
) -> Searched:
    """Search for one weight per adapter, without gradients: LoraHub (https://arxiv.org/abs/2307.13269), linear here.

    The adapters are attached once; a trial sets their weights and nothing else, so it costs what the objective costs.
    What is minimised is ``objective(model) + l1 * mean(abs(weights))``.  The controls take about ``draws + 1`` times
    as many evaluations as the search itself.  PyTorch's generators begin at the seed in each evaluation.

    Args:
        model: any ``nn.Module``; afterwards it is what it was, also where something fails.
        adapters: name -> adapter, or a list of references.
        objective: what a model costs; a result that is no finite number counts as the worst.
        fresh: the control of an adapter trained afresh on the same examples: a loss ``(model, step) -> tensor`` to
            train one with, an adapter that was trained elsewhere, or None, which the report states.
        budget: how many evaluations, the start among them.
        bounds: of each weight.
        start: where every weight begins.
        l1: the penalty on the mean absolute weight.
        optimiser: "cma" (``pip install 'lorahub-core[search]'``) or "random".
        seed: of optimiser, random adapters and evaluations.
        draws: how many times random adapters of the same shapes and norms get a search of their own.
        fresh_steps: how many steps a fresh adapter is trained for; as many as the budget by default.
        fresh_lr: Adam's learning rate for it.
        log: a file that records every evaluation, one line of JSON each; a search that was stopped goes on from it.
            Objective, base and training examples must be the same then, which nothing can tell.
        allow: finding codes to accept.
        compat: "peft" or "strict"; see ``lorahub.load``.
        hub: path of a folder hub.
        progress: called with (evaluations done, evaluations in all).

    Raises:
        Degraded, BaseMismatch, Incompatible, IntegrityError: see ``lorahub.check``.
        UsageError: a malformed request; the log is of another search; adapters are attached to the model already.
        MissingDependency: the optimiser is not installed.
        NotFinite: no trial gave a finite number.
        BaseException: what the objective raises; the model has no adapters then.
    """
    steps = budget if fresh_steps is None else fresh_steps
    _demand(fresh_lr, budget=budget, draws=draws, fresh_steps=steps, seed=seed)
    with Stage(model, adapters, seed=seed, allow=allow, compat=compat, hub=hub) as stage, ExitStack() as held:
        names = stage.names
        space = Space(size=len(names), lower=bounds[0], upper=bounds[1], start=start, l1=l1)
        settings: dict[str, JSON] = {
            "adapters": [*names],
            "optimiser": optimiser,
            "seed": seed,
            "bounds": [float(bound) for bound in bounds],
            "start": float(start),
            "l1": float(l1),
            "compat": compat,
        }
        digests: dict[str, JSON] = {**stage.digests()} if log is not None else {}
        journal = held.enter_context(Journal(log, {**settings, **({"digests": digests} if digests else {})}))
        tick = _counter(progress, budget * (1 + draws) + len(names) + 3)

        def once(role: Role, number: int, chosen: Sequence[str], weights: Sequence[float]) -> float:
            def evaluate() -> float:
                stage.choose(chosen, weights)
                return stage.score(objective)

            loss = journal.loss(role, number, tuple(weights), evaluate)
            tick()
            return loss

        base = once("base", 0, (), ())

        def at(chosen: Sequence[str]) -> Callable[[Sequence[float]], float]:
            def evaluate(weights: Sequence[float]) -> float:
                if not any(weights):
                    return base  # the very same model
                stage.choose(chosen, weights)
                return stage.score(objective)

            return evaluate

        with stage.plain() as attached:
            found = find(at(attached), space, optimiser=optimiser, seed=seed, budget=budget, journal=journal, tick=tick)
            even = [1.0 / len(names)] * len(names)
            rows = [
                Control(role="base", name="the base", loss=base),
                _at(names, even, "uniform", "equal weights", once("uniform", 0, attached, even)),
                *(
                    _at([name], [1.0], "single", name, once("single", number, [attached[number]], [1.0]))
                    for number, name in enumerate(names)
                ),
            ]
        for draw in range(1, draws + 1):
            if isinstance(brought := _drawn(stage, draw), Control):
                rows.append(brought)
                continue
            with stage.plain(brought) as drawn:
                try:
                    best = find(
                        at(drawn),
                        space,
                        optimiser=optimiser,
                        seed=seed,
                        budget=budget,
                        journal=journal,
                        of=f"random {draw}",
                        tick=tick,
                    ).best
                except NotFinite as error:
                    rows.append(Control(role="random", name=f"draw {draw}", loss=math.nan, note=error.message))
                else:
                    rows.append(_at(names, best.weights, "random", f"draw {draw}", best.loss))
        rows.append(_fresh(stage, fresh, objective, journal, steps, fresh_lr))
        tick()
    best = found.best
    return Searched(
        weights=MappingProxyType(dict(zip(names, best.weights, strict=True))),
        loss=best.loss,
        score=best.score,
        trials=found.trials,
        ended=found.ended,
        controls=Controls(loss=best.loss, rows=tuple(rows)),
        settings=MappingProxyType(
            {
                "lorahub": __version__,
                **settings,
                "budget": budget,
                "draws": draws,
                "fresh_steps": steps,
                "fresh_lr": fresh_lr,
            }
        ),
    )


def _drawn(stage: Stage, draw: int) -> Mapping[str, Planned] | Control:
    """Random adapters; or why there are none, as where a change's norm depends on a weight that cannot be read."""
    try:
        return stage.random(draw)
    except Incompatible as error:
        return Control(role="random", name=f"draw {draw}", loss=None, note=error.message)


def _fresh(
    stage: Stage, fresh: Loss | Given | None, objective: Objective, journal: Journal, steps: int, lr: float
) -> Control:
    """A search's control of an adapter trained on the same examples."""
    if fresh is None:
        return Control(role="fresh", name=FRESH, loss=None, note="left out by the caller (fresh=None)")
    if callable(fresh):
        loss = journal.loss(
            f"fresh, {steps} steps at {lr:g}", 0, (), lambda: _trained(stage, fresh, objective, steps=steps, lr=lr)
        )
        note = f"Adam, {steps} steps at {lr:g}" if math.isfinite(loss) else DIVERGED
        return Control(role="fresh", name=FRESH, loss=loss, note=note)
    brought = stage.given("(fresh)", fresh)
    with stage.plain(brought) as attached:

        def evaluate() -> float:
            stage.choose(attached)
            return stage.score(objective)

        loss = journal.loss(f"fresh {stage.digests(brought)['(fresh)']}", 0, (), evaluate)
    return Control(role="fresh", name="the adapter given as fresh", loss=loss)


def _trained(
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
    _demand(min(lr, fresh_lr), draws=draws, steps=steps, batches=over, seed=seed)
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
        tick = _counter(progress, steps * (2 + draws) + len(names) + 3)

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
                _at(names, even, "uniform", "equal weights", value(dials.names, even)),
                *(_at([name], [1.0], "single", name, value([name])) for name in names),
            ]
        for draw in range(1, draws + 1):
            if isinstance(brought := _drawn(stage, draw), Control):
                rows.append(brought)
                continue
            with stage.dialled(granularity, brought) as drawn:
                stage.choose(drawn.names)
                try:
                    stage.train(drawn.leaves(), loss, steps=steps, lr=lr, tick=tick)
                    rows.append(Control(role="random", name=f"draw {draw}", loss=stage.score(objective)))
                except NotFinite:
                    rows.append(Control(role="random", name=f"draw {draw}", loss=math.nan, note=DIVERGED))
        trained = _trained(stage, loss, objective, steps=steps, lr=fresh_lr, tick=tick)
        note = f"Adam, {steps} steps at {fresh_lr:g}" if math.isfinite(trained) else DIVERGED
        rows.append(Control(role="fresh", name=FRESH, loss=trained, note=note))
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


def _at(names: Sequence[str], weights: Sequence[float], role: Role, name: str, loss: float) -> Control:
    return Control(role=role, name=name, loss=loss, weights=dict(zip(names, weights, strict=True)))


def _demand(lr: float, **counts: int) -> None:
    """Refuse numbers that make no sense."""
    if not 0 < lr < math.inf:
        raise UsageError(f"a learning rate of {lr} makes no sense", "give a positive number, as 0.01")
    for what, count in counts.items():
        least = 0 if what in {"draws", "seed"} else 1
        if count < least:
            raise UsageError(f"{what}={count} makes no sense", f"give {least} or more")


def _counter(progress: Progress, total: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(min(done, total), total)

    return tick
