"""Weights for adapters, searched for with a few examples and without gradients; for scripts.

The controls that say what the result is worth are in ``composition.searching.controls``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING

from lorahub import __version__
from lorahub.composing.controlled import DIVERGED, FRESH, Objective, at_weights, counter, demand, drawn, trained
from lorahub.composing.trying import Loss, Stage
from lorahub.composition.searching.controls import Control, Controls, Role
from lorahub.composition.searching.optimisers import Space
from lorahub.composition.searching.optimisers import search as find
from lorahub.composition.searching.outcomes import Searched
from lorahub.composition.searching.trial_log import Journal
from lorahub.deltas.kind import JSON
from lorahub.errors import NotFinite
from lorahub.fetching import Progress, Source, quiet
from lorahub.sources import Given

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Objective", "Searched", "search"]


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
    demand(fresh_lr, budget=budget, draws=draws, fresh_steps=steps, seed=seed)
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
        tick = counter(progress, budget * (1 + draws) + len(names) + 3)

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
                at_weights(names, even, "uniform", "equal weights", once("uniform", 0, attached, even)),
                *(
                    at_weights([name], [1.0], "single", name, once("single", number, [attached[number]], [1.0]))
                    for number, name in enumerate(names)
                ),
            ]
        for draw in range(1, draws + 1):
            if isinstance(brought := drawn(stage, draw), Control):
                rows.append(brought)
                continue
            with stage.plain(brought) as attached_anew:
                try:
                    best = find(
                        at(attached_anew),
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
                    rows.append(at_weights(names, best.weights, "random", f"draw {draw}", best.loss))
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


def _fresh(
    stage: Stage, fresh: Loss | Given | None, objective: Objective, journal: Journal, steps: int, lr: float
) -> Control:
    """A search's control of an adapter trained on the same examples."""
    if fresh is None:
        return Control(role="fresh", name=FRESH, loss=None, note="left out by the caller (fresh=None)")
    if callable(fresh):
        loss = journal.loss(
            f"fresh, {steps} steps at {lr:g}", 0, (), lambda: trained(stage, fresh, objective, steps=steps, lr=lr)
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
