"""LoRA: a change of low rank, ``scale * up @ down`` (https://arxiv.org/abs/2106.09685).

One formula serves linear layers, convolutions and embeddings.  A convolution's ``down`` carries the kernel and its
``up`` is pointwise, so the product over flattened trailing axes is the whole kernel.  An embedding ``[V, d]`` is a
weight with ``out = V`` and ``in = d``; PEFT stores its factors transposed, which the spelling undoes.  rsLoRA and
per-module ranks and alphas only change ``scale``.  What PEFT's config says is read in ``peft_lora``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas import peft_lora
from lorahub.deltas.delta import Delta, Index, LowRank, take
from lorahub.deltas.departed import Departed
from lorahub.deltas.factors import (
    FACTORS,
    dissolve_factors,
    example_factors,
    factor_shape,
    fresh_factors,
    product,
    scale_of,
)
from lorahub.deltas.fit import expect_shape
from lorahub.deltas.full import Full
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, Slot, Spelling, Touch
from lorahub.deltas.lora_starting import LORA_STARTING
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["LORA", "LoRA"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class LoRA(Delta):
    """``scale * up @ down``.

    Attributes:
        up: ``[out, r]`` or ``[out, r, *1]``; PEFT's ``lora_B``.
        down: ``[r, in, *k]``; PEFT's ``lora_A``.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float

    kind: ClassVar[str] = "lora"
    additive: ClassVar[bool] = True
    drops: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """See ``product``; the weight gives shape, dtype and device only."""
        expect_shape(self, weight)
        return product(self.up, self.down, self.scale, weight)

    def region(self, rows: Index, cols: Index) -> Self:
        """Rows of ``up``, columns of ``down``."""
        return type(self)(take(self.up, rows, 0), take(self.down, cols, 1), self.scale)

    def low_rank(self) -> LowRank:
        """The factors as matrices, views of the stored tensors."""
        return LowRank(self.up.flatten(1), self.down.flatten(1), self.scale)

    def shape(self) -> tuple[int, ...]:
        """``[out, in, *k]``."""
        return factor_shape(self.up, self.down)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """PEFT's default start, at scale 1.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        return cls(*fresh_factors("lora", shape, r, generator), 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors, scaled by a number that is no power of two.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        return cls(*example_factors("lora", shape, r, generator), 0.7)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, or the one parameter that the group names, and the bias where ``lora_bias`` trained one.

    The base must have them.
    """
    rank = group.slots["down"].shape[0] if group.slots["down"].shape else None
    weight = Touch(parameter=group.parameter, dims="out in *k", slots=("up", "down"), additive=True, rank=rank)
    if "bias" not in group.slots:
        return (weight,)
    return weight, Touch(parameter="bias", dims="out", slots=("up", "bias"), additive=True)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The delta of the weight or the named parameter, and the bias's as a full difference with the same scale.

    Factors that began as part of the weight come with what they were then; no file holds that apart.
    """
    scale = scale_of(group)
    up, down = tensors["up"], tensors["down"]
    deltas: dict[str, Delta] = {group.parameter: LoRA(up, down, scale)}
    if "from_up" in tensors:
        deltas = {group.parameter: Departed(up, down, tensors["from_up"], tensors["from_down"], scale)}
    if "bias" in tensors:
        deltas["bias"] = Full(tensors["bias"], scale)
    return deltas


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``: a LoRA on the weight, alone or with a full difference of equal scale on the bias.

    One that counts from where it began becomes plain LoRA of twice the rank.
    """
    weight, bias = deltas.get("weight"), deltas.get("bias")
    if isinstance(weight, Departed):
        weight = LoRA(*weight.stacked(), weight.scale)
    if not isinstance(weight, LoRA) or not deltas.keys() <= {"weight", "bias"}:
        return None
    tensors, options = dissolve_factors(weight.up, weight.down, weight.scale)
    if bias is None:
        return tensors, options
    if not isinstance(bias, Full) or bias.scale != weight.scale or bias.shape() != (weight.up.shape[0],):
        return None
    return {**tensors, "bias": bias.diff}, options


LORA = Kind(
    name="lora",
    title="LoRA",
    source="https://arxiv.org/abs/2106.09685",
    slots=(
        *FACTORS,
        Slot(name="bias", dims="out", optional=True),
        Slot(name="from_down", dims="r in *k", optional=True),
        Slot(name="from_up", dims="out r *1", optional=True),
    ),
    deltas=(LoRA, Full),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="LORA",
            leaves=(*peft_lora.LEAVES, Leaf(slot="bias", suffix="lora_B.bias")),
            fields=peft_lora.FIELDS,
            options=peft_lora.lora_options,
            config=peft_lora.config,
            disputed=peft_lora.disputed,
            when=peft_lora.plain,
            alike=peft_lora.alike,
        ),
    ),
    starting=LORA_STARTING,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in LoRA."""
    return [LORA]
