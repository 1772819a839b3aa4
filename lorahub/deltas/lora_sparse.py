"""LoRA with a sparse rest: what LyCORIS's extraction keeps of a difference besides its largest singular values.

``scale * (up @ down + rest)``, ``rest`` given by positions in the flattened weight ``[out, in * prod(k)]``; with a
Tucker core as in LoCon where there is one.  Files call the rest a bias (``bias_indices``, ``bias_values``,
``bias_size``), and it is none.  Extraction stores the rank as alpha, so a scale of 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.cut import Cuts, cut, then
from lorahub.deltas.delta import Delta, Index
from lorahub.deltas.factors import example_factors, fresh_factors, scale_of
from lorahub.deltas.fit import bind_slots, expect_matrix
from lorahub.deltas.kind import JSON, Group, Kind, Slot, Touch
from lorahub.deltas.tucker import core_times
from lorahub.errors import BaseMismatch
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["LORA_SPARSE", "WithRest"]

_WRAP = 1 << 16
"""Positions beyond 32767 come back negative from the 16 bits they are stored in."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class WithRest(Delta):
    """``scale * (up @ down + rest)``.

    Attributes:
        up, down: as in ``LoRA``; ``down`` is ``[s, in, *1]`` beside a core.
        places: ``[2, n]``, rows and columns of the flattened weight.
        values: ``[n]``.
        size: ``[2]``, rows and columns in all; only kept, for the factors say the same.
        scale: ``alpha / r``.
        core: ``[r, s, *k]``, or None.
        rows, cols: cuts still to be made; see ``cut``.
    """

    up: torch.Tensor
    down: torch.Tensor
    places: torch.Tensor
    values: torch.Tensor
    size: torch.Tensor
    scale: float
    core: torch.Tensor | None = None
    rows: Cuts = ()
    cols: Cuts = ()

    kind: ClassVar[str] = "lora-sparse"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The weight gives shape, dtype and device only.

        Raises:
            BaseMismatch: it has another shape, or a position lies outside the factors' product.
        """
        up, down = self.up.flatten(1).to(weight), self.down.flatten(1).to(weight)
        if self.core is not None:
            down = core_times(self.core.to(weight), down)
        at = self.places.to(weight.device, torch.long)
        at = torch.where(at < 0, at + _WRAP, at) if self.places.dtype is torch.int16 else at
        change = up @ down
        if at.numel() and (bool((at < 0).any()) or int(at[0].max()) >= len(change) or int(at[1].max()) >= len(down[0])):
            raise BaseMismatch(f"a lora-sparse delta has positions outside {list(change.shape)}")
        change = change.index_put((at[0], at[1]), self.values.to(weight), accumulate=True).mul_(self.scale)
        change = cut(cut(change.reshape(self._whole()), self.rows, 0), self.cols, 1)
        if change.shape != weight.shape:
            raise BaseMismatch(f"a lora-sparse delta for {list(change.shape)} was given a weight {list(weight.shape)}")
        return change.clone() if self.rows or self.cols else change

    def _whole(self) -> tuple[int, ...]:
        kernel = (self.down if self.core is None else self.core).shape[2:]
        return (self.up.shape[0], self.down.shape[1], *kernel)

    def region(self, rows: Index, cols: Index) -> Self:
        """Any rows and columns, cut from the whole change."""
        return replace(self, rows=then(self.rows, rows), cols=then(self.cols, cols))

    def shape(self) -> tuple[int, ...]:
        """``[out, in, *k]``, after the cuts."""
        out, width, *kernel = self._whole()
        left = (cut(torch.empty(size, 0), cuts, 0).shape[0] for size, cuts in ((out, self.rows), (width, self.cols)))
        return (*left, *kernel)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """LoRA's start at scale 1, and no rest.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        up, down = fresh_factors("lora-sparse", shape, r, generator)
        return cls(up, down, *rest(shape, 0, generator), 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors and a rest at three positions; beside a convolution with a core.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        up, down = example_factors("lora-sparse", shape, r, generator)
        core = None
        if len(shape) > 2:
            down = down[(slice(None), slice(None), *(slice(0, 1) for _ in shape[2:]))].clone()
            core = torch.randn((r, r, *shape[2:]), generator=generator, device=generator.device)
        return cls(up, down, *rest(shape, 3, generator), 0.7, core)


def rest(
    shape: tuple[int, ...], count: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions, normal values and sizes."""
    out, _, flat = expect_matrix("lora-sparse", shape)
    at = torch.randperm(out * flat, generator=generator, device=generator.device)[:count]
    values = torch.randn(count, generator=generator, device=generator.device)
    return torch.stack([at // flat, at % flat]), values, torch.tensor([out, flat], device=generator.device)


_FACTORS = {"up": "out r *1", "down": "r in *k"}
_CORE = {"up": "out r *1", "core": "r s *k", "down": "s in *1"}


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight.

    Raises:
        ShapeMisfit: factors and core do not fit together.
    """
    down, core = group.slots["down"], group.slots.get("core")
    form = _FACTORS if core is None else _CORE
    bind_slots(group, form)
    kernel = (down if core is None else core).shape[2:]
    sizes = (group.slots["up"].shape[0], down.shape[1], *kernel)
    return (
        Touch(
            parameter="weight",
            dims=" ".join(map(str, sizes)),
            slots=tuple(name for name in ("up", "down", "places", "values", "size", "core") if name in group.slots),
            additive=True,
            rank=down.shape[0],
        ),
    )


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    up, down, places, values, size = (tensors[name] for name in ("up", "down", "places", "values", "size"))
    return {"weight": WithRest(up, down, places, values, size, scale_of(group), tensors.get("core"))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``; a delta that was cut is no adapter's own any more."""
    match dict(deltas):
        case {"weight": WithRest(rows=(), cols=()) as weight, **others} if not others:
            return weight.tensors(), {"scale": weight.scale, "rank": weight.down.shape[0]}
    return None


LORA_SPARSE = Kind(
    name="lora-sparse",
    title="LoRA with a sparse rest",
    source="https://github.com/KohakuBlueleaf/LyCORIS",
    slots=(
        Slot(name="down", dims="*down"),  # [r, in, *k], or [s, in, *1] beside a core: ``touches`` binds it
        Slot(name="up", dims="out r *1"),
        Slot(name="core", dims="r s *k", optional=True),
        Slot(name="places", dims="2 n", prunable=True, holds="integers"),
        Slot(name="values", dims="n", prunable=True),
        Slot(name="size", dims="2", holds="integers"),
    ),
    deltas=(WithRest,),
    touches=touches,
    build=build,
    dissolve=dissolve,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in LoRA with a sparse rest."""
    return [LORA_SPARSE]
