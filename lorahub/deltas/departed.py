"""LoRA that counts from where it began: factors that start as part of the weight, which stays as it is.

PiSSA (https://arxiv.org/abs/2404.02948) and OLoRA (https://arxiv.org/abs/2406.01775) begin with factors that are not
nothing and take their product away from the base.  Here the base keeps its numbers, and the change is the difference:
``scale * (up @ down - from_up @ from_down)``.  It is a change of rank 2r, and so it is written: any tool that reads
LoRA computes the same, and no file depends on a decomposition that has to be found again (cf. ``pissa``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index, LowRank, take
from lorahub.deltas.factors import example_factors, factor_shape, product
from lorahub.deltas.fit import expect_shape
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Departed"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Departed(Delta):
    """``scale * (up @ down - from_up @ from_down)``.

    Attributes:
        up: ``[out, r]`` or ``[out, r, *1]``.
        down: ``[r, in, *k]``.
        from_up, from_down: the same as they were at the start; they are not trained.
        scale: of both.
    """

    up: torch.Tensor
    down: torch.Tensor
    from_up: torch.Tensor
    from_down: torch.Tensor
    scale: float

    kind: ClassVar[str] = "lora"
    additive: ClassVar[bool] = True
    drops: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """Two products and their difference, so that a start changes exactly nothing."""
        expect_shape(self, weight)
        return product(self.up, self.down, self.scale, weight) - product(
            self.from_up, self.from_down, self.scale, weight
        )

    def region(self, rows: Index, cols: Index) -> Self:
        """Rows of ``up`` and columns of ``down``, then and now."""
        (up, from_up), (down, from_down) = (
            [take(each, index, axis) for each in pair]
            for axis, (pair, index) in enumerate((((self.up, self.from_up), rows), ((self.down, self.from_down), cols)))
        )
        return type(self)(up, down, from_up, from_down, self.scale)

    def low_rank(self) -> LowRank:
        """Rank 2r: the factors of now, and those of the start with the sign in ``down``."""
        up, down = self.stacked()
        return LowRank(up.flatten(1), down.flatten(1), self.scale)

    def stacked(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``[out, 2r]`` and ``[2r, in, *k]``, with the trailing ones of ``up``."""
        return (
            torch.cat([self.up, self.from_up.to(self.up)], 1),
            torch.cat([self.down, -self.from_down.to(self.down)]),
        )

    def shape(self) -> tuple[int, ...]:
        """``[out, in, *k]``."""
        return factor_shape(self.up, self.down)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors that have not moved.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        up, down = example_factors("lora", shape, r, generator)
        return cls(up, down, up.clone(), down.clone(), 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors that come from others.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        (up, down), (from_up, from_down) = (example_factors("lora", shape, r, generator) for _ in range(2))
        return cls(up, down, from_up, from_down, 0.7)
