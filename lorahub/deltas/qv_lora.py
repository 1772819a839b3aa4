"""LoRA on the query and the value rows of a fused projection, as LoRA-ViT and its descendants for SAM train it.

https://github.com/JamesQFreeman/LoRA-ViT.  The first ``d`` rows of ``attn.qkv`` are the queries and the last ``d`` the
values; each has a pair of factors of its own, and the rows between keep still.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.cut import Cuts, cut, then
from lorahub.deltas.delta import Delta, Index, LowRank, take
from lorahub.deltas.factors import example_factors, fresh_factors, product, scale_of
from lorahub.deltas.kind import JSON, Group, Kind, Slot, Touch
from lorahub.errors import BaseMismatch
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["QV", "QvLoRA"]

_BANDS = 3
"""Query, key and value."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class QvLoRA(Delta):
    """``scale * q_up @ q_down`` on the first third of the rows, ``scale * v_up @ v_down`` on the last.

    Attributes:
        q_up, v_up: ``[d, r]``.
        q_down, v_down: ``[r, in]``.
        scale: multiplies both.
        rows: cuts of rows still to be made; see ``cut``.
    """

    q_up: torch.Tensor
    q_down: torch.Tensor
    v_up: torch.Tensor
    v_down: torch.Tensor
    scale: float
    rows: Cuts = ()

    kind: ClassVar[str] = "qv-lora"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The weight gives shape, dtype and device only.

        Raises:
            BaseMismatch: it has another shape.
        """
        up, down = self._whole()
        if tuple(weight.shape) != (up.shape[0], down.shape[1]):
            raise BaseMismatch(f"a qv-lora delta for {list(self.shape())} was given a weight {list(weight.shape)}")
        return product(up, down, self.scale, weight)

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        (d, r), nothing = self.q_up.shape, torch.zeros_like(self.q_up)
        queries, values = torch.cat((self.q_up, nothing), dim=1), torch.cat((nothing, self.v_up), dim=1)
        up = torch.cat((queries, self.q_up.new_zeros((_BANDS - 2) * d, 2 * r), values))
        return cut(up, self.rows, 0), torch.cat((self.q_down, self.v_down))

    def region(self, rows: Index, cols: Index) -> Self:
        """Any rows, remembered; columns of both ``down``."""
        q_down, v_down = (take(each, cols, 1) for each in (self.q_down, self.v_down))
        return type(self)(self.q_up, q_down, self.v_up, v_down, self.scale, then(self.rows, rows))

    def low_rank(self) -> LowRank:
        """Plain factors of rank ``2 r``, with zeros."""
        return LowRank(*self._whole(), self.scale)

    def shape(self) -> tuple[int, ...]:
        """``[3 d, in]``, after cuts."""
        up, down = self._whole() if self.rows else (self.q_up, self.q_down)
        return (up.shape[0] if self.rows else _BANDS * up.shape[0]), down.shape[1]

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """LoRA's start for both.

        Raises:
            BaseMismatch: ``shape`` is no matrix of three bands.
        """
        band = _band(shape)
        q_up, q_down = fresh_factors("qv-lora", band, r, generator)
        return cls(q_up, q_down, *fresh_factors("qv-lora", band, r, generator), 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors, scaled by a number that is no power of two.

        Raises:
            BaseMismatch: ``shape`` is no matrix of three bands.
        """
        band = _band(shape)
        q_up, q_down = example_factors("qv-lora", band, r, generator)
        return cls(q_up, q_down, *example_factors("qv-lora", band, r, generator), 0.7)


def _band(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2 or shape[0] % _BANDS:
        raise BaseMismatch(f"a qv-lora delta changes matrices of {_BANDS} bands of rows, not {list(shape)}")
    return shape[0] // _BANDS, shape[1]


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight."""
    dims = f"{_BANDS * group.slots['q_up'].shape[0]} in"
    slots = ("q_up", "q_down", "v_up", "v_down")
    rank = group.slots["q_down"].shape[0]
    return (Touch(parameter="weight", dims=dims, slots=slots, additive=True, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    queries, values = (tensors["q_up"], tensors["q_down"]), (tensors["v_up"], tensors["v_down"])
    return {"weight": QvLoRA(*queries, *values, scale_of(group))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``; a delta whose rows were cut is no adapter's own any more."""
    match dict(deltas):
        case {"weight": QvLoRA(rows=()) as weight, **others} if not others:
            return weight.tensors(), {"scale": weight.scale, "rank": weight.q_down.shape[0]}
    return None


QV = Kind(
    name="qv-lora",
    title="LoRA on query and value of a fused projection",
    source="https://github.com/JamesQFreeman/LoRA-ViT",
    slots=(
        Slot(name="q_down", dims="r in"),
        Slot(name="q_up", dims="d r"),
        Slot(name="v_down", dims="r in"),
        Slot(name="v_up", dims="d r"),
    ),
    deltas=(QvLoRA,),
    touches=touches,
    build=build,
    dissolve=dissolve,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in LoRA on query and value."""
    return [QV]
