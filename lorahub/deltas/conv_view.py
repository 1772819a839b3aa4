"""LoRA on a convolution by a view: the product of two matrices, read as a kernel (microsoft/LoRA's ``ConvLoRA``).

https://github.com/microsoft/LoRA.  For a square kernel of side k the factors are ``[r * k, in * k]`` and
``[out / groups * k, r * k]``; their product has as many elements as the weight and is taken for it in the order of
memory.  No row of the product is one of the weight's, so such a change can be neither cut nor written as plain LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import ALL, Delta, Index
from lorahub.deltas.factors import scale_of
from lorahub.deltas.kind import JSON, Group, Kind, Slot, Touch
from lorahub.errors import BaseMismatch, NotLocal
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["CONV_VIEW", "ConvView"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class ConvView(Delta):
    """``scale * (up @ down)`` with the weight's shape.

    Attributes:
        up: ``[out / groups * k, r * k]``.
        down: ``[r * k, in * k]``.
        scale: ``alpha / r``.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float

    kind: ClassVar[str] = "conv-view"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The weight gives shape, dtype and device only.

        Raises:
            BaseMismatch: it is no convolution's, or has another number of elements.
        """
        if weight.dim() != 4 or weight.numel() != self.up.shape[0] * self.down.shape[1]:
            factors = f"{list(self.up.shape)} and {list(self.down.shape)}"
            raise BaseMismatch(f"conv-view factors {factors} were given a weight {list(weight.shape)}")
        change = self.up.to(weight) @ self.down.to(weight)
        return change.mul_(self.scale).reshape(weight.shape)

    def region(self, rows: Index, cols: Index) -> Self:
        """Everything, or nothing.

        Raises:
            NotLocal: it is a part that is asked for.
        """
        if rows == ALL and cols == ALL:
            return self
        raise NotLocal("a conv-view delta is a view of one product; it cannot be cut")

    def shape(self) -> None:
        """None: the product has the number of elements, not the axes."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """``up`` of zeros.

        Raises:
            BaseMismatch: ``shape`` is none of a convolution in two dimensions.
        """
        drawn = cls.example(shape, r=r, generator=generator)
        return cls(torch.zeros_like(drawn.up), drawn.down, 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors.

        Raises:
            BaseMismatch: ``shape`` is none of a convolution in two dimensions.
        """
        if len(shape) != 4:
            raise BaseMismatch(f"a conv-view delta changes weights [out, in, k, k], not {list(shape)}")
        out, width, height, across = shape
        up, down = (
            torch.randn(size, generator=generator, device=generator.device)
            for size in ((out * height, r), (r, width * across))
        )
        return cls(up / math.sqrt(r), down, 0.7)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, by its number of elements."""
    up, down = group.slots["up"].shape, group.slots["down"].shape
    said = group.options.get("rank")
    rank = said if isinstance(said, int) else down[0]
    dims = f"*{up[0] * down[1]}"
    return (Touch(parameter="weight", dims=dims, slots=("up", "down"), additive=True, local=False, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": ConvView(tensors["up"], tensors["down"], scale_of(group))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": ConvView() as weight, **others} if not others:
            return weight.tensors(), {"scale": weight.scale, "rank": weight.down.shape[0]}
    return None


CONV_VIEW = Kind(
    name="conv-view",
    title="LoRA on a convolution by a view",
    source="https://github.com/microsoft/LoRA",
    slots=(Slot(name="down", dims="stack across"), Slot(name="up", dims="along stack")),
    deltas=(ConvView,),
    touches=touches,
    build=build,
    dissolve=dissolve,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in LoRA by a view."""
    return [CONV_VIEW]
