"""A parameter's whole new value: classification heads, trained norms and biases, ``modules_to_save``.

A replacement may create a parameter the base lacks; then there is no weight to change and ``replacement`` is what
counts.  Files mark replaced parameters by their place in the file, not by a suffix of this kind, so formats make the
groups themselves and no spelling is declared here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index, take
from lorahub.deltas.fit import expect_shape
from lorahub.deltas.kind import JSON, Group, Kind, Slot, Touch
from lorahub.errors import UnsupportedKind
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["REPLACE", "Replace"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Replace(Delta):
    """``W' = value``.

    Attributes:
        value: the new parameter, any shape (scalars too), stored dtype.
    """

    value: torch.Tensor

    kind: ClassVar[str] = "replace"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """``value - W`` in the weight's dtype."""
        expect_shape(self, weight)
        return self.value.to(weight) - weight

    def region(self, rows: Index, cols: Index) -> Self:
        """The same rows and columns of ``value``; a vector has rows only."""
        cut = take(self.value, rows, 0)
        return type(self)(take(cut, cols, 1) if cut.dim() > 1 else cut)

    def expert(self, position: int) -> Self:
        """The value of one matrix, where ``value`` is a stack [E, out, in] that a base keeps one by one."""
        return type(self)(self.value[position])

    def replacement(self) -> torch.Tensor:
        """``value`` as stored."""
        return self.value

    def shape(self) -> tuple[int, ...]:
        """The shape of ``value``."""
        return tuple(self.value.shape)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Refused: what changes nothing is the weight itself, and a shape does not tell it.

        Raises:
            UnsupportedKind: always.
        """
        raise UnsupportedKind(
            f"a replacement that changes nothing is the weight itself, which a shape {list(shape)} does not tell",
            "Make it from the weight, Replace(weight.clone()), or train a 'full' delta, which starts from zero.",
        )

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal values."""
        return cls(torch.randn(shape, generator=generator, device=generator.device))


def touches(group: Group) -> tuple[Touch, ...]:
    """The one parameter the group stands for, replaced whole; the option "tied" says for all names that it has."""
    tied = "value" if group.options.get("tied") else ""
    return (
        Touch(parameter=group.parameter, dims="*shape", slots=("value",), additive=False, replaces=True, tied=tied),
    )


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """One replacement of the group's parameter."""
    return {group.parameter: Replace(tensors["value"])}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """One ``Replace`` at a time: which parameter it belongs to is the key it came under."""
    match list(deltas.values()):
        case [Replace(value=value)]:
            return {"value": value}, {}
    return None


REPLACE = Kind(
    name="replace",
    title="replacement",
    source="https://huggingface.co/docs/peft/package_reference/peft_model",
    slots=(Slot(name="value", dims="*shape", holds="anything"),),
    deltas=(Replace,),
    touches=touches,
    build=build,
    dissolve=dissolve,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in replacement."""
    return [REPLACE]
