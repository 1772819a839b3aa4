"""A change stored as it is: one tensor of the parameter's own shape.

Extracted differences, trained biases of LoRA layers and LyCORIS's ``diff`` files are this kind.  PEFT has no config
word for it, so it declares no PEFT spelling; LoRA's ``lora_B.bias`` becomes one through the LoRA kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index, take
from lorahub.deltas.fit import expect_shape
from lorahub.deltas.kind import JSON, Group, Kind, Slot, Touch
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["FULL", "Full"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Full(Delta):
    """``scale * diff``, whatever the weight is.

    Attributes:
        diff: the parameter's shape, any floating dtype.
        scale: multiplies it.
    """

    diff: torch.Tensor
    scale: float = 1.0

    kind: ClassVar[str] = "full"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """A new tensor in the weight's dtype; scaled after the conversion."""
        expect_shape(self, weight)
        return self.diff.to(weight) * self.scale

    def region(self, rows: Index, cols: Index) -> Self:
        """The same rows and columns of ``diff``; a vector has rows only."""
        cut = take(self.diff, rows, 0)
        return type(self)(take(cut, cols, 1) if cut.dim() > 1 else cut, self.scale)

    def shape(self) -> tuple[int, ...]:
        """The shape of ``diff``."""
        return tuple(self.diff.shape)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Zeros; there is no rank."""
        return cls(torch.zeros(shape, device=generator.device))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal values, scaled by a number that is no power of two."""
        return cls(torch.randn(shape, generator=generator, device=generator.device), 0.7)


def touches(group: Group) -> tuple[Touch, ...]:
    """The one parameter the group stands for."""
    return (Touch(parameter=group.parameter, dims="*shape", slots=("diff",), additive=True),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """One delta on the group's parameter; ``scale`` is 1 where the options say nothing."""
    scale = group.options.get("scale", 1.0)
    assert isinstance(scale, int | float)  # a format wrote it
    return {group.parameter: Full(tensors["diff"], float(scale))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """One ``Full`` at a time: which parameter it belongs to is the key it came under."""
    match list(deltas.values()):
        case [Full(diff=diff, scale=scale)]:
            return {"diff": diff}, {"scale": scale}
    return None


FULL = Kind(
    name="full",
    title="full difference",
    source="https://github.com/KohakuBlueleaf/LyCORIS",
    slots=(Slot(name="diff", dims="*shape"),),
    deltas=(Full,),
    touches=touches,
    build=build,
    dissolve=dissolve,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in full difference."""
    return [FULL]
