"""Search over a few numbers without gradients: trials, and what proposes them.

LoraHub (https://arxiv.org/abs/2307.13269) looks for one weight per adapter so, within bounds and under a small penalty
on the weights.  Everything is replayed: an optimiser is made from a seed and told the same losses again, so a search
that was killed proposes what it would have proposed, and evaluates only what its log lacks.  Knows numbers; no models,
no adapters.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, TypeAlias, final

from lorahub.composition.searching.trial_log import Journal, Point, finite_or_none
from lorahub.deltas.kind import JSON
from lorahub.errors import MissingDependency, NotFinite, UsageError
from lorahub.lazy import np
from lorahub.names import did_you_mean

__all__ = ["OPTIMISERS", "Evaluate", "Search", "Space", "Trial", "search"]

Evaluate: TypeAlias = "Callable[[Sequence[float]], float]"
"""Weights -> loss, the smaller the better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Where to look, and what is minimised: ``loss + l1 * mean(abs(weights))``.

    Attributes:
        size: how many weights.
        lower, upper: bounds of each.
        start: where every weight begins; the first trial.
        l1: how much large weights cost.
    """

    size: int
    lower: float = -1.5
    upper: float = 1.5
    start: float = 0.0
    l1: float = 0.05

    def __post_init__(self) -> None:
        """Refuse what is no space.

        Raises:
            UsageError: no weights, bounds that hold no start, or a penalty that rewards.
        """
        numbers = (self.lower, self.upper, self.start, self.l1)
        if not all(map(math.isfinite, numbers)) or not self.lower < self.upper:
            raise UsageError(
                f"bounds of {self.lower} to {self.upper} hold nothing", "give two numbers, the lower first"
            )
        if not self.lower <= self.start <= self.upper:
            raise UsageError(f"the start {self.start} lies outside of {self.lower} to {self.upper}", "start within")
        if self.l1 < 0:
            raise UsageError(f"a penalty of {self.l1} would reward large weights", "give 0 or more")
        if self.size < 1:
            raise UsageError("there is no weight to search for", "give one adapter or more")

    def score(self, weights: Point, loss: float) -> float:
        """What is minimised; infinite where the loss is no finite number."""
        return loss + self.l1 * sum(map(abs, weights)) / self.size if math.isfinite(loss) else math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One evaluation.

    Attributes:
        number: from 0 on.
        weights: which.
        loss: what the objective gave; NaN where that was no finite number.
        score: the loss with the penalty on the weights; infinite where there is no loss.
    """

    number: int
    weights: Point
    loss: float
    score: float

    def document(self) -> dict[str, JSON]:
        """The trial as JSON-ready values; null where there is no number."""
        return {
            "trial": self.number,
            "weights": [*self.weights],
            "loss": finite_or_none(self.loss),
            "score": finite_or_none(self.score),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """All trials of one search.

    Attributes:
        trials: in order.
        ended: why it ended before its budget was spent, as the optimiser says; "" where it was spent.
    """

    trials: tuple[Trial, ...]
    ended: str = ""

    @property
    def best(self) -> Trial:
        """The trial with the smallest score, the first of equals."""
        return min(self.trials, key=lambda trial: trial.score)


class Optimiser(Protocol):
    """What proposes weights; the same seed and the same scores give the same proposals.  Knows no budget."""

    def ask(self) -> list[Point]:
        """The next few; none where it has come to an end."""

    def tell(self, scores: Sequence[float]) -> None:
        """What those that were asked for last came to; all finite, the smaller the better."""

    def ended(self) -> str:
        """Why nothing more is proposed, or ""."""


@final
class Uniform:
    """Random search: every weight anywhere within the bounds, alike.  Needs nothing but Python."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space, self._random = space, random.Random(seed)  # noqa: S311 - a search is no secret

    def ask(self) -> list[Point]:
        """One at a time."""
        lower, width = self._space.lower, self._space.upper - self._space.lower
        return [tuple(lower + width * self._random.random() for _ in range(self._space.size))]

    def tell(self, scores: Sequence[float]) -> None:
        """Nothing is learned from it."""

    def ended(self) -> str:
        """Never."""
        return ""


@final
class CmaEs:
    """CMA-ES (https://arxiv.org/abs/1604.00772) by the package ``cma``, with numbers of its own generator."""

    def __init__(self, space: Space, seed: int) -> None:
        """Begin at the start, with steps of a sixth of the bounds' width.

        Raises:
            MissingDependency: ``cma`` is not installed.
        """
        generator = np.random.Generator(np.random.PCG64(seed))
        self._size = space.size
        size = max(space.size, 2)  # it wants two axes; nothing depends on a second one that nobody asked for
        options: dict[str, Any] = {
            "bounds": [[space.lower] * size, [space.upper] * size],
            "randn": lambda *shape: generator.standard_normal(shape),
            "tolflatfitness": 20,  # generations: counts of right answers are flat over stretches, and so is no answer,
            "tolfun": 0,  # which is no sign of having arrived
            "seed": math.nan,  # leave numpy's own generator, which others use, alone
            "verbose": -9,
            "verb_log": 0,
        }
        self._strategy = _cma().CMAEvolutionStrategy([space.start] * size, (space.upper - space.lower) / 6, options)
        self._asked: list[Any] = []

    def ask(self) -> list[Point]:
        """One generation."""
        self._asked = [] if self._strategy.stop() else self._strategy.ask()
        return [tuple(float(number) for number in each[: self._size]) for each in self._asked]

    def tell(self, scores: Sequence[float]) -> None:
        """Their order is what counts."""
        self._strategy.tell(self._asked, list(scores))

    def ended(self) -> str:
        """The names of the criteria that were met."""
        return ", ".join(sorted(self._strategy.stop()))


def _cma() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Could not import matplotlib", UserWarning)  # nothing is drawn
            return import_module("cma")
    except ModuleNotFoundError as error:
        if error.name != "cma":
            raise
        raise MissingDependency(
            "the optimiser 'cma' needs the package cma, which is not installed",
            "pip install 'lorahub-core[search]'   (or, without it, optimiser=\"random\")",
        ) from None


OPTIMISERS: Mapping[str, Callable[[Space, int], Optimiser]] = {"cma": CmaEs, "random": Uniform}
"""Name -> how it is made of a space and a seed."""


def search(
    evaluate: Evaluate,
    space: Space,
    *,
    optimiser: str = "cma",
    seed: int = 0,
    budget: int = 40,
    journal: Journal | None = None,
    of: str = "adapters",
    tick: Callable[[], None] = lambda: None,
) -> Search:
    """Look for the weights with the smallest score; the start is the first trial.

    Args:
        evaluate: what it costs.
        space: where to look.
        optimiser: a key of ``OPTIMISERS``.
        seed: of the optimiser.
        budget: how many evaluations, those in the journal among them.
        journal: where trials are recorded, and looked up before they are evaluated.
        of: what is searched for, for the journal, which may hold several searches.
        tick: called after each trial.

    Raises:
        UsageError: there is no such optimiser, or nothing to spend.
        MissingDependency: the optimiser is not installed.
        NotFinite: no trial gave a finite number.
        BaseException: what ``evaluate`` raises.
    """
    if budget < 1:
        raise UsageError(f"a budget of {budget} evaluations finds nothing", "give 1 or more")
    proposing = make(optimiser, space, seed)
    kept = journal or Journal(None, {})
    trials: list[Trial] = []

    def trial(weights: Point) -> Trial:
        loss = kept.loss(of, len(trials), weights, lambda: evaluate(weights))
        trials.append(Trial(number=len(trials), weights=weights, loss=loss, score=space.score(weights, loss)))
        tick()
        return trials[-1]

    trial((space.start,) * space.size)
    while len(trials) < budget:
        asked = proposing.ask()
        found = [trial(weights) for weights in asked[: budget - len(trials)]]
        if not asked:
            break
        if len(found) == len(asked):
            worst = max((each.score for each in trials if math.isfinite(each.score)), default=0.0)
            proposing.tell([each.score if math.isfinite(each.score) else worst + 1.0 for each in found])
    result = Search(trials=tuple(trials), ended=proposing.ended() if len(trials) < budget else "")
    if not math.isfinite(result.best.score):
        raise NotFinite(
            f"the objective gave no finite number in {len(trials)} trials of the {of}",
            "look at what it gives for the model as it is: objective(model)",
        )
    return result


def make(name: str, space: Space, seed: int) -> Optimiser:
    """The optimiser of that name.

    Raises:
        UsageError: there is none.
        MissingDependency: it is not installed.
    """
    if name not in OPTIMISERS:
        raise UsageError(
            f"there is no optimiser '{name}'.{did_you_mean(name, OPTIMISERS)}", f"one of: {', '.join(OPTIMISERS)}"
        )
    return OPTIMISERS[name](space, seed)
