"""NearSwap: the first change, moved towards the second by at most ``t`` in every element.

Where the two are closer than ``t`` the second takes over.  Published as
https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001, and in mergekit as ``(1 - v) a + v b`` with
``v = min(1, t / |a - b|)``, which is the same.  Of two models on one base it is the same for their weights as for
their changes; mergekit's ``base_model`` is the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final, get_args

from lorahub.composition.algebra.elements import expect_finite
from lorahub.composition.algebra.truncate import one_thread
from lorahub.composition.method import Basis, ElementMethod, Method, Terms
from lorahub.composition.methods.thinning import expect_choice, expect_number
from lorahub.errors import UsageError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["Nearswap"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Nearswap(ElementMethod):
    """``a + clamp(b - a, -t, t)``, of the two changes each at its weight.  Peak memory: the stack and the result.

    Attributes:
        t: how far an element may move, in units of the weight's elements; the default is that of the first model made
            in this way.
        basis: where elements are looked at; ``t`` is in its units.
    """

    t: float = 1e-4
    basis: Basis = "dense"

    name: ClassVar[str] = "nearswap"
    title: ClassVar[str] = "NearSwap"
    source: ClassVar[str] = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    ordered: ClassVar[bool] = True
    count: ClassVar[tuple[int, int | None]] = (2, 2)

    def __post_init__(self) -> None:
        expect_number("t", self.t, least=0.0)
        if not self.t:
            raise UsageError("t is 0, which moves nothing", "give a number over 0")
        expect_choice("basis", self.basis, get_args(Basis))

    def elements(self, stack: torch.Tensor, terms: Terms) -> torch.Tensor:
        """Move the first towards the second."""
        with one_thread():
            for change, weight in zip(stack, terms.weights, strict=True):
                expect_finite(change)
                change.mul_(weight)
            first, second = stack
            moved: torch.Tensor = first + second.sub_(first).clamp_(-self.t, self.t)
            return moved


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """NearSwap."""
    return [Nearswap]
