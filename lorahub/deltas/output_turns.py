"""Rotations of a weight's outputs as LyCORIS keeps them: what its diag-OFT and its BOFT have in common.

Blocks are stored as whole matrices and made skew-symmetric by taking away their transposes; a bound on the length of
all of them together, and a factor for each output, are the rest.  Knows tensors and sizes; no files and no names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorahub.deltas.delta import ALL, Delta, Index
from lorahub.deltas.fit import expect_matrix
from lorahub.deltas.kind import JSON, Group
from lorahub.errors import BaseMismatch, NotLocal
from lorahub.lazy import torch
from lorahub.shapes import ShapeMisfit

if TYPE_CHECKING:
    from typing import Self

__all__ = ["OutputRotation", "constraint_of", "demand_factors", "dissolved", "spread"]


@dataclass(frozen=True, slots=True, eq=False)
class OutputRotation(Delta):
    """``rescale * (R @ W)`` in place of ``W``, for an ``R`` made of blocks.

    Attributes:
        blocks: any square matrices, ``[..., n, b, b]``.
        rescale: a factor for each output, ``[out, *1]``, or ``[n, b, 1]`` from early releases, or None.
        constraint: ``Q`` is kept to a length of this times the number of outputs; None: it is free.
    """

    blocks: torch.Tensor
    rescale: torch.Tensor | None = None
    constraint: float | None = None

    def outputs(self) -> int:
        """How many outputs the blocks add up to."""
        return int(self.blocks.shape[-3] * self.blocks.shape[-1])

    def flat(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` as a matrix.

        Raises:
            BaseMismatch: it is no weight with as many outputs as the blocks add up to.
        """
        out, _, _ = expect_matrix(self.kind, tuple(weight.shape))
        if out != self.outputs():
            raise BaseMismatch(f"a {self.kind} delta for {self.outputs()} outputs was given a weight {[*weight.shape]}")
        return weight.flatten(1)

    def skewed(self, weight: torch.Tensor) -> torch.Tensor:
        """``Q`` of every block, in the weight's dtype, no longer than the constraint allows."""
        blocks = self.blocks.to(weight)
        q = blocks - blocks.transpose(-1, -2)
        if self.constraint is None:
            return q
        bound = self.constraint * self.outputs()
        bounded: torch.Tensor = q * (bound / torch.linalg.vector_norm(q).clamp_min(bound))
        return bounded

    def changed(self, weight: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """What the rotation's ``change`` of the flat weight comes to after ``rescale``."""
        if self.rescale is not None:
            factor = self.rescale.reshape(-1, 1).to(weight)
            change = change * factor + weight.flatten(1) * (factor - 1)
        return change.reshape(weight.shape)

    def region(self, rows: Index, cols: Index) -> Self:
        """Any columns.

        Raises:
            NotLocal: the rows are cut: a rotation of the outputs mixes them.
        """
        if rows != ALL:
            raise NotLocal(f"a {self.kind} delta mixes the outputs of a weight; it cannot be cut across them")
        return replace(self)

    def shape(self) -> None:
        """None: the blocks say how many outputs there are, not how many inputs."""


def spread(
    shape: tuple[int, ...], generator: torch.Generator, blocks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, float | None]:
    """What an example has: its blocks, and at random factors from 0.5 to 2 and a bound of half their length."""
    factors = torch.rand((shape[0], *(1 for _ in shape[1:])), generator=generator, device=generator.device) * 1.5 + 0.5
    length = float(torch.linalg.vector_norm(blocks - blocks.transpose(-1, -2)))
    rescaled, bounded = torch.randint(2, (2,), generator=generator, device=generator.device).tolist()
    return blocks, factors if rescaled else None, length / shape[0] / 2 if bounded else None


def demand_factors(group: Group, outputs: int) -> None:
    """Refuse factors that are not one for each output.

    Raises:
        ShapeMisfit: there is another number of them, or they lie along another axis.
    """
    rescale, blocks = group.slots.get("rescale"), group.slots["blocks"]
    if rescale is None:
        return
    early = (*blocks.shape[-3:-1], 1)
    along = rescale.shape[:1] == (outputs,) and math.prod(rescale.shape) == outputs
    if not along and rescale.shape != early:
        raise ShapeMisfit(f"{rescale.key} {list(rescale.shape)} should hold a factor for each of {outputs} outputs")


def constraint_of(group: Group) -> float | None:
    """The constraint that a format wrote into the group's options."""
    value = group.options.get("constraint")
    return float(value) if isinstance(value, int | float) else None


def dissolved(
    delta: OutputRotation, others: Mapping[str, Delta]
) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """Slots and options of a rotation, where nothing else is changed."""
    return (delta.tensors(), {"constraint": delta.constraint}) if not others else None
