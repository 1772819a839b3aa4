"""IA3 as LyCORIS has it: one learned addition to the factor 1 for each output or each input of a layer.

https://arxiv.org/abs/2205.05638
``W' = (1 + w) * W`` along one axis; a flag beside the tensor says which.  The bias stays as it is, as in LyCORIS's
forward pass and merge; PEFT stores the whole factor and multiplies the bias too, and is another kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index, take
from lorahub.deltas.fit import expect_matrix
from lorahub.deltas.kind import JSON, Group, Kind, Slot, Touch
from lorahub.errors import BaseMismatch, IntegrityError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["LYCORIS_IA3", "Growth"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Growth(Delta):
    """``growth * W`` added to ``W``.

    Attributes:
        growth: ``[size]`` beside a matrix, ``[1, size, *1]`` beside a convolution, whichever axis it is for.
        axis: 0: outputs; 1: inputs.
    """

    growth: torch.Tensor
    axis: int

    kind: ClassVar[str] = "lycoris-ia3"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The change, in the weight's dtype.

        Raises:
            BaseMismatch: the weight has other axes or another size along ``axis``.
        """
        if weight.dim() != max(2, self.growth.dim()) or weight.shape[self.axis] != self.growth.numel():
            raise BaseMismatch(
                f"a lycoris-ia3 delta for {self.growth.numel()} {('outputs', 'inputs')[self.axis]} was given a weight "
                f"{list(weight.shape)}"
            )
        along = [-1 if dim == self.axis else 1 for dim in range(weight.dim())]
        return weight * self.growth.to(weight).reshape(along)

    def region(self, rows: Index, cols: Index) -> Self:
        """What is left along its own axis; the other is broadcast."""
        return replace(self, growth=take(self.growth, (rows, cols)[self.axis], min(1, self.growth.dim() - 1)))

    def shape(self) -> None:
        """None: it says one size of its weight."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Zeros for the outputs; there is no rank.

        Raises:
            BaseMismatch: ``shape`` is no weight.
        """
        return cls(torch.zeros(stored_shape(shape, 0), device=generator.device), 0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Between -0.5 and 1, on either axis.

        Raises:
            BaseMismatch: ``shape`` is no weight.
        """
        axis = int(torch.randint(2, (), generator=generator, device=generator.device))
        return cls(
            torch.rand(stored_shape(shape, axis), generator=generator, device=generator.device) * 1.5 - 0.5, axis
        )


def stored_shape(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    """As LyCORIS stores it beside a weight of ``shape``."""
    expect_matrix("lycoris-ia3", shape)
    return (shape[axis],) if len(shape) == 2 else (1, shape[axis], *(1 for _ in shape[2:]))


def axis_of(group: Group) -> int:
    """The axis that a format wrote into the group's options."""
    axis = group.options["axis"]
    assert axis in (0, 1)
    return int(axis)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight.

    Raises:
        IntegrityError: the tensor is neither a vector nor one with ones on every axis but the second.
    """
    growth, axis = group.slots["growth"], axis_of(group)
    shape = growth.shape
    if len(shape) not in (1, 3, 4, 5) or math.prod(shape) != shape[min(1, len(shape) - 1)]:
        raise IntegrityError(f"{growth.key} {list(shape)} is neither [size] nor [1, size, 1, ...]")
    dims = ["out", "in", *(f"k{at}" for at in range(max(0, len(shape) - 2)))]
    dims[axis] = str(math.prod(shape))
    return (Touch(parameter="weight", dims=" ".join(dims), slots=("growth",), additive=False),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": Growth(tensors["growth"], axis_of(group))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Growth(growth=growth, axis=axis), **others} if not others:
            return {"growth": growth}, {"axis": axis}
    return None


LYCORIS_IA3 = Kind(
    name="lycoris-ia3",
    title="(IA)³ as LyCORIS has it",
    source="https://arxiv.org/abs/2205.05638",
    slots=(Slot(name="growth", dims="*growth"),),
    deltas=(Growth,),
    touches=touches,
    build=build,
    dissolve=dissolve,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in (IA)³ of LyCORIS."""
    return [LYCORIS_IA3]
