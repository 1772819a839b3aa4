"""A plugin for lorahub: one more kind of adapter, which moves every row of a weight by one trained number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, final

import lorahub
from lorahub.deltas.delta import Delta, take
from lorahub.deltas.kind import Kind, Leaf, Slot, Spelling, Touch
from lorahub.deltas.starting import Started, Starting
from lorahub.errors import BaseMismatch
from lorahub.lazy import torch  # imported when something is computed, and not before


@final
@dataclass(frozen=True, slots=True, eq=False)
class RowShift(Delta):
    """``W' = W + shift[:, None]``, with ``shift`` of ``[out]``; of a convolution ``W`` is ``[out, in, *k]``."""

    shift: torch.Tensor
    kind: ClassVar[str] = "row-shift"
    additive: ClassVar[bool] = True  # what it adds depends on no weight

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        if weight.dim() < 2 or len(weight) != len(self.shift):
            raise BaseMismatch(f"a row shift of {len(self.shift)} rows does not fit {list(weight.shape)}")
        return self.shift.to(weight).reshape(-1, *[1] * (weight.dim() - 1)).expand_as(weight).contiguous()

    def region(self, rows: Any, cols: Any) -> RowShift:
        return RowShift(take(self.shift, rows, 0))

    def shape(self) -> None:
        return  # any number of columns

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> RowShift:
        if len(shape) < 2:
            raise BaseMismatch(f"a row shift needs columns, not {list(shape)}")
        return cls(torch.zeros(shape[0]))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> RowShift:
        return cls(torch.randn(cls.fresh(shape, r=r, generator=generator).shift.shape, generator=generator))


def dissolve(deltas: Any) -> Any:
    found = deltas.get("weight")
    return ({"shift": found.shift}, {}) if isinstance(found, RowShift) and len(deltas) == 1 else None


# in PEFT's folders: "peft_type": "ROW_SHIFT", and keys such as base_model.model.layers.0.q.shift
LEAVES = (Leaf(slot="shift", suffix="shift"),)
PEFT = Spelling(format="peft", tag="ROW_SHIFT", leaves=LEAVES, options=lambda *_: {}, config=lambda _: {})
ROW_SHIFT = Kind(
    name="row-shift",
    title="row shift",
    source="examples/plugin",
    slots=(Slot(name="shift", dims="out"),),
    deltas=(RowShift,),
    touches=lambda _: (Touch(parameter="weight", dims="out in *k", slots=("shift",), additive=True),),
    build=lambda _, tensors: {"weight": RowShift(tensors["shift"])},
    dissolve=dissolve,
    spellings=(PEFT,),
    starting=Starting(settings={}, start=lambda at: Started(trained={"shift": torch.zeros(at.shape[0])})),
)


@lorahub.hookimpl
def lorahub_kinds() -> list[Kind]:
    return [ROW_SHIFT]
