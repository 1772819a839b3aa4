"""DELLA: drop elements at random, small ones rather than large ones; divide by the probability; then elect, or add.

https://arxiv.org/abs/2406.11617 (MAGPRUNE): within each row the probability of being kept rises evenly with the rank
of the magnitude.  ``epsilon`` is spelled as mergekit means it, half the width of the window: probabilities run from
``density - epsilon`` to ``density + epsilon``; the paper's ε is the whole width, twice that.  A convolution's row is
all that one output channel reads; mergekit ranks such weights over the input channels only.  mergekit does not divide
by the probabilities but matches the L1 norm (``rescale="l1"``), and divides by agreeing weights in ``della``
(``normalize=True``, ``election="mergekit"``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from lorahub.composition.algebra.elements import drop_by_rank
from lorahub.composition.method import Method, PerAdapter, Terms, each_of
from lorahub.composition.methods.thinning import Elected, Summed, expect_number, listed
from lorahub.errors import UsageError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["Della", "DellaLinear"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Della(Elected):
    """``lambda * mean of w_i * dropped_i over those of the elected sign``.

    Attributes:
        density: the mean probability of an element to be kept; the default is that of the authors' example.
        epsilon: half the width of the window of probabilities, one for all adapters or one for each; as above.
        rescale: True divides what is kept by its probability.
    """

    density: PerAdapter = 0.7
    epsilon: PerAdapter = 0.07
    rescale: bool | Literal["l1"] = True

    name: ClassVar[str] = "della"
    title: ClassVar[str] = "DELLA: drop by rank, elect signs, fuse"
    source: ClassVar[str] = "https://arxiv.org/abs/2406.11617"
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Elected.__post_init__(self)
        _expect_window(self.density, self.epsilon)

    def thin(self, change: torch.Tensor, density: float, number: int, terms: Terms) -> None:
        """Drop at random, by rank."""
        epsilon = each_of(self.epsilon, len(terms.weights), "epsilon")[number]
        drop_by_rank(change, density, epsilon, terms.draw(number), rescale=self.rescale is True)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DellaLinear(Summed):
    """``lambda * sum of w_i * dropped_i``; its expectation is the weighted sum.

    Attributes:
        density: the mean probability of an element to be kept; the default is that of the authors' example.
        epsilon: half the width of the window of probabilities, one for all adapters or one for each; as above.
        rescale: True divides what is kept by its probability.
    """

    density: PerAdapter = 0.7
    epsilon: PerAdapter = 0.07
    rescale: bool | Literal["l1"] = True

    name: ClassVar[str] = "della_linear"
    title: ClassVar[str] = "DELLA: drop by rank, then add"
    source: ClassVar[str] = "https://arxiv.org/abs/2406.11617"
    draws: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Summed.__post_init__(self)
        _expect_window(self.density, self.epsilon)

    def thin(self, change: torch.Tensor, density: float, number: int, terms: Terms) -> None:
        """Drop at random, by rank."""
        epsilon = each_of(self.epsilon, len(terms.weights), "epsilon")[number]
        drop_by_rank(change, density, epsilon, terms.draw(number), rescale=self.rescale is True)


def _expect_window(density: PerAdapter, epsilon: PerAdapter) -> None:
    """Probabilities are probabilities; a density of 1 drops nothing, whatever epsilon is."""
    for half in listed(epsilon):
        expect_number("epsilon", half, least=0.0)
    count = max(len(listed(density)), len(listed(epsilon)))
    pairs = zip(each_of(density, count, "density"), each_of(epsilon, count, "epsilon"), strict=True)
    for mean, half in pairs:
        if mean < 1 and not 0 < mean - half <= mean + half <= 1:
            raise UsageError(
                f"density {mean:g} and epsilon {half:g} make probabilities from {mean - half:g} to {mean + half:g}",
                "choose epsilon such that density - epsilon is over 0 and density + epsilon up to 1",
            )


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """DELLA, elected or added."""
    return [Della, DellaLinear]
