"""BEFT: a vector added to a layer's bias, and nothing else (https://arxiv.org/abs/2509.15974).

PEFT applies it to layers without a bias too while the adapter is live, and refuses to merge it there; so does lorahub,
because the base has no such parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index, take
from lorahub.deltas.fit import expect_shape
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_values import PLACES
from lorahub.errors import BaseMismatch
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["BEFT", "Offset"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Offset(Delta):
    """``b + offset``.

    Attributes:
        offset: ``[out]``.
    """

    offset: torch.Tensor

    kind: ClassVar[str] = "beft"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """A copy of the offset in the bias's dtype."""
        expect_shape(self, weight)
        return self.offset.to(weight, copy=True)

    def region(self, rows: Index, cols: Index) -> Self:
        """Any rows; a bias has no columns."""
        return type(self)(take(self.offset, rows, 0))

    def shape(self) -> tuple[int, ...]:
        """``[out]``."""
        return tuple(self.offset.shape)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Zeros; there is no rank.

        Raises:
            BaseMismatch: ``shape`` is no vector.
        """
        return cls(torch.zeros(vector(shape), device=generator.device))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal numbers.

        Raises:
            BaseMismatch: ``shape`` is no vector.
        """
        return cls(torch.randn(vector(shape), generator=generator, device=generator.device))


def vector(shape: tuple[int, ...]) -> int:
    """The length of a bias of ``shape``.

    Raises:
        BaseMismatch: it is no vector.
    """
    if len(shape) != 1:
        raise BaseMismatch(f"a beft delta changes biases [out], not {list(shape)}")
    return shape[0]


def touches(_group: Group) -> tuple[Touch, ...]:
    """The bias, which the base must have."""
    return (Touch(parameter="bias", dims="out", slots=("offset",), additive=True),)


def build(_group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The bias's delta."""
    return {"bias": Offset(tensors["offset"].reshape(-1))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``; PEFT stores a row."""
    match dict(deltas):
        case {"bias": Offset(offset=offset), **others} if not others:
            return {"offset": offset.reshape(1, -1)}, {}
    return None


def options(_config: Mapping[str, JSON], _module: str, _slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """None: the tensor says everything."""
    return {}


def config(_groups: Mapping[str, Group]) -> dict[str, JSON]:
    """PEFT needs no more than the names of the modules."""
    return {"init_weights": True}


FIELDS: Mapping[str, Field] = MappingProxyType({**PLACES})

BEFT = Kind(
    name="beft",
    title="BEFT",
    source="https://arxiv.org/abs/2509.15974",
    slots=(Slot(name="offset", dims="1 out"),),
    deltas=(Offset,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="BEFT",
            leaves=(Leaf(slot="offset", suffix="beft_bias"),),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in BEFT."""
    return [BEFT]
