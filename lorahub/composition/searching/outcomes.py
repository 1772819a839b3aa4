"""What looking for weights comes to: the weights, how they were found, and what they are held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lorahub.composition.searching.controls import Controls
from lorahub.composition.searching.optimisers import Trial
from lorahub.deltas.kind import JSON

__all__ = ["Learned", "Searched"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """What a search found.

    Attributes:
        weights: adapter -> weight, as ``lorahub.compose`` and ``lorahub.merge`` take them.
        loss: what the objective gives at these.
        score: the same with the penalty on the weights: what was minimised.
        trials: every evaluation, in order; the first is the start.
        ended: why the optimiser ended before its budget was spent, or "".
        controls: what the result is held against.
        settings: what was asked for.
    """

    weights: Mapping[str, float]
    loss: float
    score: float
    trials: tuple[Trial, ...]
    ended: str
    controls: Controls
    settings: Mapping[str, JSON]

    def document(self) -> dict[str, JSON]:
        """Everything as JSON-ready values."""
        return {
            "weights": dict(self.weights),
            "loss": self.loss,
            "score": self.score,
            "ended": self.ended,
            "controls": self.controls.document(),
            "settings": dict(self.settings),
            "trials": [trial.document() for trial in self.trials],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What gradients found.

    Attributes:
        weights: adapter -> rules as a recipe has them: ``{"filter": pattern, "value": weight}``; together they fit
            each of its targets once.  Targets are named as the base names them, so the recipe should name the base.
        by_target: adapter -> target -> weight.
        loss: of the result, as the controls' are.
        curve: the loss at each step, before it.
        unused: targets whose weight the loss never depended on, by adapter; theirs are what they began with.
        controls: what the result is held against.
        settings: what was asked for.
    """

    weights: Mapping[str, tuple[Mapping[str, JSON], ...]]
    by_target: Mapping[str, Mapping[str, float]]
    loss: float
    curve: tuple[float, ...]
    unused: Mapping[str, tuple[str, ...]]
    controls: Controls
    settings: Mapping[str, JSON]

    def document(self) -> dict[str, JSON]:
        """Everything as JSON-ready values."""
        return {
            "weights": {name: [dict(rule) for rule in rules] for name, rules in self.weights.items()},
            "loss": self.loss,
            "curve": [*self.curve],
            "unused": {name: [*targets] for name, targets in self.unused.items()},
            "controls": self.controls.document(),
            "settings": dict(self.settings),
        }
