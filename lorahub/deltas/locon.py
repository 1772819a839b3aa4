"""LoCon with a Tucker core: LoRA beside a convolution, with the kernel in a core between two pointwise factors.

``scale * sum over r, s of up[o, r] * mid[r, s, *k] * down[s, i]``, as LyCORIS stores it (``use_tucker``,
https://arxiv.org/abs/2309.14859).  LoCon without a core is LoRA, and is that kind.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index, LowRank, take
from lorahub.deltas.factors import pointwise, scale_of
from lorahub.deltas.fit import expect_matrix, expect_shape
from lorahub.deltas.kind import JSON, Group, Kind, Slot, Touch
from lorahub.deltas.tucker import core_times
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["LOCON", "LoCon"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class LoCon(Delta):
    """``scale`` times a core between two factors.

    Attributes:
        up: ``[out, r, *1]``.
        mid: ``[r, s, *k]``.
        down: ``[s, in, *1]``.
        scale: ``alpha / s``.
    """

    up: torch.Tensor
    mid: torch.Tensor
    down: torch.Tensor
    scale: float

    kind: ClassVar[str] = "locon"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The weight gives shape, dtype and device only."""
        expect_shape(self, weight)
        up, mid, down = (each.to(weight) for each in (self.up.flatten(1), self.mid, self.down.flatten(1)))
        return (up @ _inner(mid, down)).mul_(self.scale).reshape(weight.shape)

    def region(self, rows: Index, cols: Index) -> Self:
        """Rows of ``up``, columns of ``down``."""
        return replace(self, up=take(self.up, rows, 0), down=take(self.down, cols, 1))

    def low_rank(self) -> LowRank:
        """Core and ``down`` multiplied out: plain convolution factors of the same rank.

        float64, in which products of two stored numbers of up to 32 bits are exact.
        """
        wide = (each.to(torch.float64) for each in (self.mid, self.down.flatten(1)))
        return LowRank(self.up.flatten(1).to(torch.float64), _inner(*wide), self.scale)

    def shape(self) -> tuple[int, ...]:
        """``[out, in, *k]``."""
        return (self.up.shape[0], self.down.shape[1], *self.mid.shape[2:])

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """``up`` of zeros, Kaiming uniform everything else; scale 1.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        out, width, _ = expect_matrix("locon", shape)

        def uniform(*size: int) -> torch.Tensor:
            bound = 1 / math.sqrt(math.prod(size[1:]))
            return torch.empty(size, device=generator.device).uniform_(-bound, bound, generator=generator)

        up = torch.zeros(pointwise(out, r, shape), device=generator.device)
        return cls(up, uniform(r, r, *shape[2:]), uniform(*pointwise(r, width, shape)), 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal tensors whose product has elements of size 1, whatever ``r``.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        out, width, _ = expect_matrix("locon", shape)
        up, mid, down = (
            torch.randn(size, generator=generator, device=generator.device)
            for size in (pointwise(out, r, shape), (r, r, *shape[2:]), pointwise(r, width, shape))
        )
        return cls(up / r, mid, down, 0.7)


def _inner(mid: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Core times ``down``, ``[r, in * prod(k)]``; beside a linear layer the core is a matrix."""
    return mid @ down if mid.dim() == 2 else core_times(mid, down)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight."""
    return (
        Touch(
            parameter="weight",
            dims="out in *k",
            slots=("up", "mid", "down"),
            additive=True,
            rank=group.slots["down"].shape[0],
        ),
    )


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": LoCon(tensors["up"], tensors["mid"], tensors["down"], scale_of(group))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": LoCon() as weight, **others} if not others:
            return weight.tensors(), {"scale": weight.scale, "rank": weight.down.shape[0]}
    return None


LOCON = Kind(
    name="locon",
    title="LoCon with a Tucker core",
    source="https://arxiv.org/abs/2309.14859",
    slots=(
        Slot(name="up", dims="out r *1"),
        Slot(name="mid", dims="r s *k"),
        Slot(name="down", dims="s in *1"),
    ),
    deltas=(LoCon,),
    touches=touches,
    build=build,
    dissolve=dissolve,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in LoCon with a Tucker core."""
    return [LOCON]
