"""Diag-OFT: the outputs of a layer turned by an orthogonal matrix, block by block, as LyCORIS and sd-scripts have it.

https://arxiv.org/abs/2306.07280
``W' = rescale * (R^T @ W)`` with ``R`` block-diagonal, each block ``(I + Q)(I - Q)^-1``, ``Q`` the difference of a
stored matrix and its transpose.  PEFT's OFT turns the inputs, and is another kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta
from lorahub.deltas.fit import expect_matrix
from lorahub.deltas.kind import JSON, Group, Kind, Slot, Touch
from lorahub.deltas.output_turns import OutputRotation, constraint_of, demand_factors, dissolved, spread
from lorahub.deltas.rotation import cayley, number_of_blocks
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["DIAG_OFT", "OutputTurn"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class OutputTurn(OutputRotation):
    """One turn of the outputs; ``blocks`` are ``[n, b, b]``."""

    kind: ClassVar[str] = "diag-oft"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """``(R - I)^T @ W`` over flattened trailing axes, and then ``rescale``.

        Raises:
            BaseMismatch: the blocks do not add up to the weight's outputs.
        """
        flat = self.flat(weight)
        turn = cayley(self.skewed(weight))  # the transpose of a turn is the turn by the opposite Q
        parts = flat.reshape(*turn.shape[:2], -1)
        return self.changed(weight, torch.bmm(turn, parts).reshape(flat.shape))

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Zeros in ``r`` blocks, or as many fewer as the outputs fall into.

        Raises:
            BaseMismatch: ``shape`` is no weight, or has a single output.
        """
        return cls(torch.zeros(blocks_shape(shape, r), device=generator.device))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal blocks; with factors and a bound at random.

        Raises:
            BaseMismatch: ``shape`` is no weight, or has a single output.
        """
        blocks = torch.randn(blocks_shape(shape, r), generator=generator, device=generator.device) * 0.4
        return cls(*spread(shape, generator, blocks))


def blocks_shape(shape: tuple[int, ...], r: int) -> tuple[int, int, int]:
    """``[n, b, b]`` for a weight of ``shape``."""
    out, _, _ = expect_matrix("diag-oft", shape)
    n = number_of_blocks(out, r)
    return n, out // n, out // n


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight.

    Raises:
        ShapeMisfit: ``rescale`` is not a factor for each output.
    """
    n, b, _ = group.slots["blocks"].shape
    demand_factors(group, n * b)
    slots = tuple(name for name in ("blocks", "rescale") if name in group.slots)
    return (Touch(parameter="weight", dims=f"{n * b} in *k", slots=slots, additive=False, local=False),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": OutputTurn(tensors["blocks"], tensors.get("rescale"), constraint_of(group))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": OutputTurn() as turn, **others}:
            return dissolved(turn, others)
    return None


DIAG_OFT = Kind(
    name="diag-oft",
    title="diag-OFT",
    source="https://arxiv.org/abs/2306.07280",
    slots=(Slot(name="blocks", dims="n b b"), Slot(name="rescale", dims="*factors", optional=True)),
    deltas=(OutputTurn,),
    touches=touches,
    build=build,
    dissolve=dissolve,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in diag-OFT."""
    return [DIAG_OFT]
