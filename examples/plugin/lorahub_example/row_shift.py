"""An example of a kind: every row of a weight moved by one trained number, ``W' = W + scale * shift[:, None]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from lorahub import hookimpl
from lorahub.deltas.delta import Delta, Index, take
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.errors import BaseMismatch, CannotCarry
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self


@final
@dataclass(frozen=True, slots=True, eq=False)
class RowShift(Delta):
    """``scale * shift`` on every column.

    Attributes:
        shift: ``[out]``.
        scale: the factor on ``shift``.
    """

    shift: torch.Tensor
    scale: float

    kind: ClassVar[str] = "row-shift"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The same number all along a row."""
        if weight.shape[0] != self.shift.shape[0] or weight.dim() < 2:
            raise BaseMismatch(f"a row shift of {self.shift.shape[0]} rows does not fit {list(weight.shape)}")
        column = self.shift.to(weight).mul(self.scale).reshape(-1, *[1] * (weight.dim() - 1))
        return column.expand_as(weight).contiguous()

    def region(self, rows: Index, cols: Index) -> Self:
        """The shifts of those rows; every column is alike."""
        return type(self)(take(self.shift, rows, 0), self.scale)

    def shape(self) -> None:
        """Not determined: it fits any number of columns."""
        return

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Zeros.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        if len(shape) < 2:
            raise BaseMismatch(f"a row shift needs a weight with columns, not {list(shape)}")
        return cls(torch.zeros(shape[0]), 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal shifts.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        return cls(torch.randn(cls.fresh(shape, r=r, generator=generator).shift.shape, generator=generator), 0.5)


def touches(_group: Group) -> tuple[Touch, ...]:
    """The weight."""
    return (Touch(parameter="weight", dims="out in *k", slots=("shift",), additive=True),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    scale = group.options.get("scale", 1.0)
    assert isinstance(scale, int | float)
    return {"weight": RowShift(tensors["shift"], float(scale))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": RowShift() as weight, **others} if not others:
            return {"shift": weight.shift}, {"scale": weight.scale}
    return None


def options(config: Mapping[str, JSON], _module: str, _slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """``strength`` of the config, the same for every module."""
    strength = config.get("strength", 1.0)
    return {"scale": float(strength) if isinstance(strength, int | float) else 1.0, "scale_rule": "strength"}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The inverse of ``options``."""
    scales = sorted({float(str(group.options["scale"])) for group in groups.values()})
    if len(scales) > 1:
        raise CannotCarry(f"one strength for all modules is all there is a word for, not {scales}")
    return {"strength": scales[0]} if scales else {}


ROW_SHIFT = Kind(
    name="row-shift",
    title="row shift",
    source="examples/plugin",
    slots=(Slot(name="shift", dims="out"),),
    deltas=(RowShift,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="slashed",
            tag="",
            leaves=(Leaf(slot="shift", suffix="shift"),),
            fields={"strength": Field(used=True)},
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """One kind."""
    return [ROW_SHIFT]
