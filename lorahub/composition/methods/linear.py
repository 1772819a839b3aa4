"""The weighted sum, exact: ``sum of w_i * delta_i``.

On factors it is concatenation, ``[w_1 s_1 B_1 | ... ] @ [A_1; ...]``, for any ranks and signs; the rank of the result
is the sum of theirs.  PEFT calls that ``cat``, and what it calls ``linear`` is another thing (``peft_linear``);
task arithmetic (https://arxiv.org/abs/2212.04089) is the same sum times one factor for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.algebra.elements import normalised
from lorahub.composition.method import Method, SumMethod
from lorahub.hookspecs import hookimpl

__all__ = ["Cat", "Linear", "TaskArithmetic"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(SumMethod):
    """``sum of w_i * delta_i``.

    Attributes:
        normalize: divide the weights by their sum.

    Raises:
        UsageError: at use, the weights sum to zero and were to be divided by that.
    """

    normalize: bool = False

    name: ClassVar[str] = "linear"
    title: ClassVar[str] = "weighted sum"
    source: ClassVar[str] = "https://arxiv.org/abs/2203.05482"

    def coefficients(self, weights: Sequence[float]) -> Sequence[float]:
        """The weights, or what they are of their sum."""
        return normalised(weights) if self.normalize else weights


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Cat(SumMethod):
    """The same sum, under PEFT's name for it."""

    name: ClassVar[str] = "cat"
    title: ClassVar[str] = "concatenation"
    source: ClassVar[str] = "PEFT, combination_type='cat'"

    def coefficients(self, weights: Sequence[float]) -> Sequence[float]:
        """The weights."""
        return weights


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TaskArithmetic(SumMethod):
    """``lambda * sum of w_i * delta_i``; the paper's lambda is 0.3 for eight tasks, and 1 here unless asked.

    Attributes:
        lambda_: multiplies the sum; recipes spell it ``lambda``.
        normalize: divide the weights by their sum.
    """

    lambda_: float = 1.0
    normalize: bool = False

    name: ClassVar[str] = "task_arithmetic"
    title: ClassVar[str] = "task arithmetic"
    source: ClassVar[str] = "https://arxiv.org/abs/2212.04089"

    def coefficients(self, weights: Sequence[float]) -> Sequence[float]:
        """The weights, or what they are of their sum, times one number."""
        return [self.lambda_ * weight for weight in (normalised(weights) if self.normalize else weights)]


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """The sum under its three names."""
    return [Linear, Cat, TaskArithmetic]
