"""LoRA on some parts of a fused layer, in the grouped layout of microsoft/LoRA's ``MergedLinear``.

https://github.com/microsoft/LoRA.  A fused layer has ``n`` equal bands of rows, g of which are adapted.  ``down`` holds
the groups' factors one below the other, ``[g * r, in]``; ``up`` those of the adapted bands, ``[g * out / n, r]``, and
each of its g blocks of rows meets its own group only (a convolution with groups).  PEFT before 0.3 kept the layout and
always made two groups, so their number is read from the shapes.  Bands are thirds of the rows even where a model
weaves its heads: so the weights were trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import ALL, Delta, Index, LowRank, take
from lorahub.deltas.factors import example_factors, fresh_factors, product, scale_of
from lorahub.deltas.fit import expect_shape
from lorahub.deltas.kind import JSON, Group, Kind, Slot, Touch
from lorahub.errors import BaseMismatch
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch
from lorahub.shapes import ShapeMisfit

if TYPE_CHECKING:
    from typing import Self

__all__ = ["MERGED", "MergedLoRA"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class MergedLoRA(Delta):
    """``scale * block_diagonal(up) @ down`` on the bands that are ``enabled``, nothing on the others.

    Attributes:
        up: ``[g * band, r]``, the blocks of the adapted bands one below the other.
        down: ``[g * r, in]``; how many blocks there are follows from the two.
        scale: ``alpha / r``.
        enabled: for every band of the layer, from the first row on, whether it is adapted.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    enabled: tuple[bool, ...] = (True,)

    kind: ClassVar[str] = "merged-lora"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """See ``product``; the weight gives shape, dtype and device only."""
        expect_shape(self, weight)
        return product(self._whole(), self.down, self.scale, weight)

    def _whole(self) -> torch.Tensor:
        """``up`` as ``[out, g * r]``, with zeros where no block is."""
        blocks = self.up.chunk(self.down.shape[0] // self.up.shape[1])
        diagonal = torch.block_diag(*blocks) if len(blocks) > 1 else self.up  # type: ignore[no-untyped-call]
        if all(self.enabled):
            return diagonal
        band = self._band()
        whole = diagonal.new_zeros(len(self.enabled), band, diagonal.shape[1])
        whole[torch.tensor(self.enabled, device=whole.device)] = diagonal.reshape(-1, band, diagonal.shape[1])
        return whole.flatten(0, 1)

    def _band(self) -> int:
        return self.up.shape[0] // sum(self.enabled)

    def region(self, rows: Index, cols: Index) -> Self:
        """Rows of the whole ``up``, columns of ``down``; one group from then on."""
        if rows == ALL and cols == ALL:
            return self
        return type(self)(take(self._whole(), rows, 0), take(self.down, cols, 1), self.scale)

    def low_rank(self) -> LowRank:
        """Plain factors of rank ``g * r``, with the zeros."""
        return LowRank(self._whole(), self.down, self.scale)

    def shape(self) -> tuple[int, ...]:
        """``[out, in]``."""
        return self._band() * len(self.enabled), self.down.shape[1]

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """LoRA's start, in one group.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        _expect_matrix(shape)
        return cls(*fresh_factors("merged-lora", shape, r, generator), 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors on all bands but the second, each in a group of its own.

        Raises:
            BaseMismatch: ``shape`` is no matrix, or its rows make no bands.
        """
        _expect_matrix(shape)
        count = next((number for number in (3, 4, 2) if shape[0] % number == 0), 0)
        if not count:
            raise BaseMismatch(f"{shape[0]} rows make no 2, 3 or 4 bands")
        enabled = (True, False, *(True for _ in range(count - 2)))
        rows = shape[0] // count * sum(enabled)
        up, down = example_factors("merged-lora", (rows, shape[1]), r * sum(enabled), generator)
        return cls(up[:, :r].contiguous() * sum(enabled) ** 0.5, down, 0.7, enabled)


def _expect_matrix(shape: tuple[int, ...]) -> None:
    if len(shape) != 2:
        raise BaseMismatch(f"a merged-lora delta changes matrices [out, in], not {list(shape)}")


def enabled_of(group: Group) -> tuple[bool, ...]:
    """Which bands are adapted, as a format wrote it."""
    listed = group.options["enabled"]
    assert isinstance(listed, list)
    return tuple(bool(each) for each in listed)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight; its sizes are numbers here, for no pattern says how many bands there are.

    Raises:
        ShapeMisfit: the factors do not divide into groups, or ``up`` not into bands.
    """
    enabled, up, down = enabled_of(group), group.slots["up"], group.slots["down"]
    stack, (rows, rank) = down.shape[0], up.shape[:2]
    groups = stack // rank if rank else 0
    if not groups or stack % rank or rows % groups or not sum(enabled) or rows % sum(enabled):
        raise ShapeMisfit(
            f"{up.key} {list(up.shape)} and {down.key} {list(down.shape)} are no factors of {sum(enabled)} bands"
        )
    dims = f"{rows // sum(enabled) * len(enabled)} {down.shape[1]}"
    return (Touch(parameter="weight", dims=dims, slots=("up", "down"), additive=True, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta; ``up`` loses the last axis that a convolution's has."""
    return {"weight": MergedLoRA(tensors["up"].flatten(1), tensors["down"], scale_of(group), enabled_of(group))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": MergedLoRA() as weight, **others} if not others:
            return weight.tensors(), {
                "enabled": [*weight.enabled],
                "scale": weight.scale,
                "rank": weight.up.shape[1],
            }
    return None


MERGED = Kind(
    name="merged-lora",
    title="LoRA on parts of a fused layer (MergedLinear)",
    source="https://github.com/microsoft/LoRA",
    # ``touches`` knows how many groups and bands there are, and that they fit
    slots=(Slot(name="down", dims="stack in"), Slot(name="up", dims="rows r *1")),
    deltas=(MergedLoRA,),
    touches=touches,
    build=build,
    dissolve=dissolve,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in MergedLinear."""
    return [MERGED]
