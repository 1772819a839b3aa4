"""What there is to say of adapters before they are composed: every pair's numbers, what suits, at which weights."""

from __future__ import annotations

from dataclasses import dataclass

from lorahub.composition.algebra.truncate import one_thread
from lorahub.composition.analysis.advice import Advice, Pair, advise, advise_all
from lorahub.composition.analysis.interference import Interference
from lorahub.composition.analysis.similarity import Similarity
from lorahub.deltas.kind import JSON
from lorahub.lazy import torch

__all__ = ["InterferenceReport", "balanced_weights", "even_weights"]

_MODERATE = 2.0
"""Weights above this are no advice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InterferenceReport:
    """Everything there is to say of adapters before they are composed.

    Attributes:
        similarity: how they lie to each other.
        signs: what a sum of them would lose.
    """

    similarity: Similarity
    signs: Interference

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Two at a time."""
        return _pairs(self.similarity, self.signs)

    @property
    def advice(self) -> Advice | None:
        """For all together; None where there is nothing to go by."""
        found = self.pairs
        return advise_all(found) if len(found) > 1 else next(iter(advise(found[0])), None)

    def document(self) -> dict[str, JSON]:
        """The report as JSON-ready values; that of ``similarity`` is its own."""
        advice, signs = self.advice, self.signs
        return {
            "elements": signs.elements,
            "cancelled": signs.cancelled,
            "cancelled_if_independent": signs.expected,
            "pairs": [{**each.document(), "advice": [one.document() for one in advise(each)]} for each in self.pairs],
            "advice": advice.document() if advice else None,
            "weights": {
                "balanced": _list(balanced_weights(self.similarity)),
                "even_norms": _list(even_weights(self.similarity)),
            },
            "targets": [row.document() for row in signs.rows],
        }


def even_weights(found: Similarity) -> tuple[float, ...] | None:
    """Weights that give every adapter the mean of all norms (the geometric one); None where one changes nothing.

    They stand in place of those that were given, and keep their signs.
    """
    if not all(found.norms):
        return None
    norms = torch.tensor(found.norms, dtype=torch.float64)
    weights: list[float] = (norms.log().mean().exp() / norms).tolist()
    return tuple(weight * factor for weight, factor in zip(weights, found.factors, strict=True))


def balanced_weights(found: Similarity) -> tuple[float, ...] | None:
    """Weights of a sum that has, along the direction of each of its terms, as much as that term alone would bring.

    They solve ``G w = diag(G)``: 1 each for orthogonal changes, and less the more two have in common.  Of several
    solutions, as for equal changes, the shortest one; None where a pair is unknown, or where changes oppose each other
    so much that no moderate weights do it.  They stand in place of those that were given.
    """
    count = range(len(found.names))
    cosines = [
        [1.0 if one == other else found.cosine(min(one, other), max(one, other)) for other in count] for one in count
    ]
    if any(value is None for row in cosines for value in row):
        return None
    norms = torch.tensor(found.norms, dtype=torch.float64)
    with one_thread():
        angles = torch.tensor(cosines, dtype=torch.float64)
        lengths = torch.linalg.lstsq(angles, norms[:, None], driver="gelsd").solution[:, 0]
    weights: list[float] = (lengths / norms).tolist()
    if not all(0 < weight <= _MODERATE for weight in weights):
        return None
    return tuple(weight * factor for weight, factor in zip(weights, found.factors, strict=True))


def _pairs(found: Similarity, signs: Interference) -> tuple[Pair, ...]:
    """The numbers of every pair."""
    return tuple(
        Pair(
            names=(found.names[one], found.names[other]),
            shared=found.shared(one, other),
            same=found.same(one, other),
            cosine=found.cosine(one, other),
            overlap_out=found.overlap(one, other, "out"),
            overlap_in=found.overlap(one, other, "in"),
            chance_out=found.chance(one, other, "out"),
            chance_in=found.chance(one, other, "in"),
            conflict=signs.conflict(one, other),
            count=signs.count(one, other),
            norms=(found.norms[one], found.norms[other]),
        )
        for one, other in found.pairs
    )


def _list(weights: tuple[float, ...] | None) -> JSON:
    return None if weights is None else list(weights)
