"""What a mode decides: the dtype of sums, how they are rounded, and how changes of low rank alone are summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from lorahub.engine.folding.recipes import Factors, Recipe
    from lorahub.engine.folding.sums import Sums
    from lorahub.engine.planning.steps import Step
    from lorahub.lazy import torch

__all__ = ["Mode"]


class Mode(Protocol):
    """A way to sum and round.  A value: equal modes give equal bits."""

    @property
    def spelled(self) -> str:
        """How it is written: what people type, records keep and a plan's digest covers."""

    def fault(self, step: Step, role: str) -> str:
        """Why the mode cannot keep its promise for a step, or "".

        Args:
            step: of a plan; no torch is needed to look at it.
            role: what the parameter's module is, where the framework knows ("embedding").
        """

    def sums(self, storage: torch.dtype) -> torch.dtype:
        """The dtype in which changes of every sort are summed before they are rounded to ``storage``."""

    def round(self, total: torch.Tensor, out: torch.Tensor, name: str, first: int) -> None:
        """Round ``total`` into ``out``.

        Args:
            total: sums, in any wider dtype.
            out: the same shape, in storage dtype.
            name: of the parameter.
            first: how many elements of the stored parameter lie before these.
        """

    def product(self, factors: Sequence[Factors], sums: Sums) -> Recipe:
        """How rows that only changes of low rank touch are folded."""
