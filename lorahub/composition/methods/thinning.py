"""What methods share that thin every change out by itself and then add: their parameters, and the two ways to add.

    Thinned     density, rescale, lambda: each change is thinned out in place
    ├── Summed      then the weighted sum
    └── Elected     then sign election, and the mean over those that agree (TIES, https://arxiv.org/abs/2306.01708)

A subclass says how one change is thinned out; weights come after that, and multiply what is left.  Peak memory: the
stack of all changes, the result, and one tensor of the size of a change where elements are selected by magnitude.

mergekit's ``int8_mask`` has no counterpart: no mask of a whole weight is held.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

from lorahub.composition.algebra.elements import (
    Divisor,
    SignMethod,
    elected_mean,
    expect_finite,
    l1_norm,
    match_l1,
    normalised,
    weighted_sum,
)
from lorahub.composition.algebra.truncate import one_thread
from lorahub.composition.method import Basis, ElementMethod, PerAdapter, Terms, each_of
from lorahub.errors import UsageError
from lorahub.lazy import torch

__all__ = [
    "Elected",
    "Election",
    "Summed",
    "Thinned",
    "expect_choice",
    "expect_number",
    "expect_share",
    "listed",
]

Election: TypeAlias = Literal["paper", "peft", "mergekit"]
"""Whose rules elect a sign; they differ in two details, and agree where all weights are equal and no votes cancel.

``paper``: changes vote at their weight, and where votes cancel nothing is taken.  ``mergekit``: the same, but where
they cancel the sign is positive.  ``peft``: changes vote at weight 1, and where they cancel the sign is positive.
"""

_ELECTIONS: Mapping[str, tuple[bool, Literal["none", "positive"]]] = MappingProxyType(
    {"paper": (True, "none"), "peft": (False, "positive"), "mergekit": (True, "positive")}
)
"""Name -> (whether votes are weighted, the sign where they cancel)."""

_DIVISORS: Mapping[bool | str, Divisor] = MappingProxyType({"count": "count", True: "weights", False: "one"})
"""``normalize`` -> what the sum over agreeing elements is divided by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thinned(ElementMethod):
    """Each change is thinned out, and what is left is added; see the subclasses.

    Attributes:
        density: the share of elements that is kept, over 0 and up to 1; one for all adapters, or one for each.
        rescale: make up for what is gone.  True divides by the probability of being kept, where that is what thins
            out; "l1" gives each change the L1 norm that it had, as mergekit's ``rescale: true`` does.
        lambda_: multiplies the result; recipes spell it ``lambda``.
        basis: where elements are looked at.
    """

    density: PerAdapter = 1.0
    rescale: bool | Literal["l1"] = False
    lambda_: float = 1.0
    basis: Basis = "dense"

    def __post_init__(self) -> None:
        for share in listed(self.density):
            expect_share("density", share)
        expect_choice("rescale", self.rescale, (True, False, "l1"))
        if self.rescale is True and not self.draws:
            raise UsageError(
                f"the method '{self.name}' drops nothing at random, so that there is no probability to divide by",
                'leave rescale out, or take rescale="l1", which is what mergekit calls true',
            )
        expect_number("lambda", self.lambda_)
        expect_choice("basis", self.basis, get_args(Basis))

    def elements(self, stack: torch.Tensor, terms: Terms) -> torch.Tensor:
        """Thin out every change in place, then add."""
        densities = each_of(self.density, len(stack), "density")
        with one_thread():
            for number, change in enumerate(stack):
                expect_finite(change)
                before = l1_norm(change) if self.rescale == "l1" else None
                self.thin(change, densities[number], number, terms)
                if before is not None:
                    match_l1(change, before)
            return self.add(stack, terms.weights)

    @abstractmethod
    def thin(self, change: torch.Tensor, density: float, number: int, terms: Terms) -> None:
        """Set elements of one change to zero, in place, and divide the others where ``rescale`` is True."""

    @abstractmethod
    def add(self, stack: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        """What is left, as one tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summed(Thinned):
    """``lambda * sum of w_i * thinned_i``.

    Attributes:
        normalize: divide the weights by their sum, over all adapters that change the target.
    """

    normalize: bool = False

    def __post_init__(self) -> None:
        Thinned.__post_init__(self)
        expect_choice("normalize", self.normalize, (True, False))

    def add(self, stack: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        """The weighted sum.

        Raises:
            UsageError: the weights are to be normalised and sum to zero.
        """
        used = normalised(weights) if self.normalize else weights
        return weighted_sum(stack, [self.lambda_ * weight for weight in used])


@dataclass(frozen=True, slots=True, kw_only=True)
class Elected(Thinned):
    """The mean of ``w_i * thinned_i`` over those that have the elected sign, times ``lambda``, element by element.

    Attributes:
        majority_sign_method: "total" elects by the sum of values, "frequency" by the number of values of either sign.
        election: whose rules decide between the signs.
        normalize: what the sum over agreeing elements is divided by.  "count": how many there are, the paper's
            disjoint mean and PEFT's.  True: the sum of their weights, mergekit's ``normalize: true``.  False:
            nothing, mergekit's ``normalize: false``.
    """

    majority_sign_method: SignMethod = "total"
    election: Election = "paper"
    normalize: bool | Literal["count"] = "count"

    def __post_init__(self) -> None:
        Thinned.__post_init__(self)
        expect_choice("majority_sign_method", self.majority_sign_method, get_args(SignMethod))
        expect_choice("election", self.election, tuple(_ELECTIONS))
        expect_choice("normalize", self.normalize, tuple(_DIVISORS))

    def add(self, stack: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
        """The mean over those that agree."""
        weigh_votes, undecided = _ELECTIONS[self.election]
        return elected_mean(
            stack,
            weights,
            by=self.majority_sign_method,
            weigh_votes=weigh_votes,
            undecided=undecided,
            divisor=_DIVISORS[self.normalize],
            factor=self.lambda_,
        )


def listed(value: PerAdapter) -> tuple[float, ...]:
    """A parameter's values: one, or those for each adapter."""
    return value if isinstance(value, tuple) else (value,)


def expect_number(name: str, value: Any, *, least: float = -math.inf, below: float = math.inf) -> None:
    """A finite number, ``least`` or more and less than ``below``.

    Raises:
        UsageError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{name} is {value!r}", "give a finite number")
    if not least <= value < below:
        upper = f" and less than {below:g}" if below < math.inf else ""
        raise UsageError(f"{name} is {value:g}", f"give a number of at least {least:g}{upper}")


def expect_share(name: str, value: Any) -> None:
    """A number over 0 and up to 1.

    Raises:
        UsageError: it is not.
    """
    expect_number(name, value)
    if not 0 < value <= 1:
        raise UsageError(
            f"{name} is {value:g}: it is the share that is kept", "give a number over 0 and up to 1, which keeps all"
        )


def expect_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """One of some values; numbers are no truth values.

    Raises:
        UsageError: it is not.
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise UsageError(f"{name} is {value!r}", f"choose one of {', '.join(map(repr, choices))}")
