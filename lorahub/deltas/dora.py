"""DoRA: LoRA for the direction of a weight, and a trained length for each of its vectors.

https://arxiv.org/abs/2402.09353
``W' = magnitude * (W + scale * up @ down) / ||W + scale * up @ down||``, the norm running over every axis but ``axis``:
per output row for linear layers and convolutions, per column of an embedding ``[V, d]``.  The norm is always that of
the untouched base, as in PEFT since 0.21.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas import peft_lora
from lorahub.deltas.beginning import scaled, stands
from lorahub.deltas.delta import Around, Delta, Directed, Index, LowRank, Route, ratio, take
from lorahub.deltas.factors import (
    FACTORS,
    dissolve_factors,
    example_factors,
    factor_shape,
    fresh_factors,
    product,
    scale_of,
)
from lorahub.deltas.fit import covers, expect_shape
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, Slot, Spelling, Touch
from lorahub.deltas.lora_starting import PLAIN_SETTINGS, plain_factors
from lorahub.deltas.starting import Ground, Started, Starting
from lorahub.errors import CannotCarry, IntegrityError, NotLocal
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

    from lorahub.bases.site import Site

__all__ = ["DORA", "DoRA"]


def lengths(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """The 2-norm over every axis but ``axis``, as a vector.

    In one memory order, so that equal values have bit-equal norms however they are stored.
    """
    norm: torch.Tensor = torch.linalg.vector_norm(
        weight.contiguous(), dim=[dim for dim in range(weight.dim()) if dim != axis]
    )
    return norm


@final
@dataclass(frozen=True, slots=True, eq=False)
class DoRA(Delta):
    """``magnitude * V / ||V||`` with ``V = W + scale * up @ down``.

    Attributes:
        up, down, scale: as in ``LoRA``.
        magnitude: ``[out]`` for axis 0, ``[in]`` for axis 1.  None stands for the lengths of the untouched weight,
            which a shape alone does not tell; ``measured`` fills them in.
        axis: 0: one length an output row; 1: one a column (embeddings).
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None
    axis: int = 0

    kind: ClassVar[str] = "dora"
    additive: ClassVar[bool] = False
    drops: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """``W' - W``.

        The norm is a constant to autograd, as section 4.3 of the paper has it and PEFT does.  A vector that already has
        the wanted length keeps it exactly, so a row of zeros with magnitude zero stays; another magnitude makes it NaN.
        """
        expect_shape(self, weight)
        moved = weight + product(self.up, self.down, self.scale, weight)
        found = lengths(moved, self.axis).detach()
        wanted = lengths(weight, self.axis) if self.magnitude is None else self.magnitude.to(weight)
        return (
            moved * ratio(wanted, found).reshape([-1 if dim == self.axis else 1 for dim in range(weight.dim())])
            - weight
        )

    def directed(self) -> Directed | None:
        """All of it where lengths belong to rows, and are known."""
        if self.axis or self.magnitude is None:
            return None
        return Directed(LowRank(self.up.flatten(1), self.down.flatten(1), self.scale), self.magnitude)

    def around(self, site: Site) -> Route | None:
        """Outputs times magnitude over length, behind LoRA; where the lengths are those of what a module gives."""
        if self.axis != (1 if site.op == "embedding" else 0) or site.op == "bias":
            return None
        return Route(self._around)

    def _around(self, read: Callable[[], torch.Tensor]) -> Around:
        """The lengths come from products of the factors' size: the sum with the weight is never made."""
        weight = read()
        wide = torch.promote_types(weight.dtype, torch.float32)
        low = LowRank(self.up.flatten(1), self.down.flatten(1), self.scale)
        with torch.no_grad():
            own = weight.flatten(1).to(wide)
            up, down = low.up.to(own), low.down.to(own) * self.scale
            if self.axis == 0:
                along, across = up, own @ down.mT
                square = (up @ (down @ down.mT)).mul_(up).sum(1)
            else:
                along, across = down.mT, own.mT @ up
                square = ((up.mT @ up) @ down).mul_(down).sum(0)
            plain = torch.linalg.vector_norm(own, dim=1 - self.axis)
            found = plain.square().add_(across.mul_(along).sum(1), alpha=2).add_(square).clamp_min_(0).sqrt_()
        wanted = plain if self.magnitude is None else self.magnitude.to(own)
        return Around(factor=ratio(wanted, found), low=low)

    def region(self, rows: Index, cols: Index) -> Self:
        """Whole vectors only: any rows for axis 0, any columns for axis 1.

        Raises:
            NotLocal: the cut takes part of a vector, whose norm needs all of it.
        """
        out, width = self.up.shape[0], self.down.shape[1]
        across, size, name = (cols, width, "rows") if self.axis == 0 else (rows, out, "columns")
        if not covers(across, size):
            raise NotLocal(f"a dora delta normalises whole {name}; it cannot be cut across them")
        kept = rows if self.axis == 0 else cols
        return replace(
            self,
            up=take(self.up, rows, 0),
            down=take(self.down, cols, 1),
            magnitude=None if self.magnitude is None else take(self.magnitude, kept, 0),
        )

    def strengthened(self, factor: float) -> Self:
        """This delta with ``factor`` inside the norm, as PEFT scales it."""
        return replace(self, scale=self.scale * factor)

    def measured(self, weight: torch.Tensor) -> Self:
        """This delta with the untouched weight's lengths as its magnitude, float32 at least, ready to train."""
        expect_shape(self, weight)
        return replace(self, magnitude=lengths(weight.to(torch.promote_types(weight.dtype, torch.float32)), self.axis))

    def shape(self) -> tuple[int, ...]:
        """``[out, in, *k]``."""
        return factor_shape(self.up, self.down)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """LoRA's start with no magnitude of its own yet, axis 0.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        return cls(*fresh_factors("dora", shape, r, generator), 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors and lengths between a half and twice what random rows have; matrices get either axis.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        up, down = example_factors("dora", shape, r, generator)
        axis = int(torch.randint(2, (), generator=generator, device=generator.device)) if len(shape) == 2 else 0
        spread = torch.rand(shape[axis], generator=generator, device=generator.device) * 1.5 + 0.5
        return cls(up, down, 0.7, spread * math.sqrt(math.prod(shape) / shape[axis]), axis)


def axis_of(group: Group) -> int:
    """Which axis keeps its lengths: what the options say, else 1 for embeddings and 0 for everything else."""
    axis = group.options.get("axis", 1 if group.role == "embedding" else 0)
    assert axis in (0, 1)
    return int(axis)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight; row windows are local where lengths belong to rows.

    Raises:
        IntegrityError: the magnitude has another number of lengths than the factors have vectors.
    """
    up, down, magnitude = (group.slots[name] for name in ("up", "down", "magnitude"))
    axis = axis_of(group)
    expected = (up.shape[:1], down.shape[1:2])[axis]
    if math.prod(magnitude.shape) != math.prod(expected) or max(magnitude.shape, default=1) != math.prod(expected):
        raise IntegrityError(
            f"{magnitude.key} {list(magnitude.shape)} should hold {math.prod(expected)} lengths, one for each "
            f"{('row', 'column')[axis]} of the weight that {up.key} and {down.key} change"
        )
    return (
        Touch(
            parameter="weight",
            dims="out in *k",
            slots=("up", "down", "magnitude"),
            additive=False,
            local=axis == 0,
            rank=down.shape[0],
            inside=True,
        ),
    )


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta; the magnitude as a vector, whatever shape the layer type gave it."""
    magnitude = tensors["magnitude"].reshape(-1)
    return {"weight": DoRA(tensors["up"], tensors["down"], scale_of(group), magnitude, axis_of(group))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``; a convolution's magnitude is stored ``[1, out, *1]``.

    Raises:
        CannotCarry: the magnitude was never measured, so there is nothing to store.
    """
    match dict(deltas):
        case {"weight": DoRA() as weight, **others} if not others:
            pass
        case _:
            return None
    if weight.magnitude is None:
        raise CannotCarry(
            "a fresh dora delta has no magnitude of its own to store",
            "Call measured(weight) with the weight it is for, then save.",
        )
    tensors, options = dissolve_factors(weight.up, weight.down, weight.scale)
    ones = weight.down.dim() - 2
    stored = weight.magnitude.reshape(1, -1, *(1,) * ones) if ones else weight.magnitude
    return {**tensors, "magnitude": stored}, {**options, "axis": weight.axis}


def start(ground: Ground) -> Started:
    """LoRA's factors, and the lengths that the weight has.

    Raises:
        UsageError: it cannot stand there.
    """
    stands(ground, "DoRA", {})
    axis = 1 if ground.role == "embedding" else 0
    magnitude = lengths(ground.weight().to(ground.device), axis).to(torch.float32)
    if ones := len(ground.shape) - 2:
        magnitude = magnitude.reshape(1, -1, *(1,) * ones).clone()  # a view would not be a leaf's own memory
    return Started(trained={**plain_factors(ground), "magnitude": magnitude}, options={**scaled(ground), "axis": axis})


DORA = Kind(
    name="dora",
    title="DoRA",
    source="https://arxiv.org/abs/2402.09353",
    slots=(
        *FACTORS,
        # [out]; convolutions [1, out, *1]; embeddings [in]: no one pattern says that, so ``touches`` counts the lengths
        Slot(name="magnitude", dims="*lengths"),
    ),
    deltas=(DoRA,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="LORA",
            leaves=(*peft_lora.LEAVES, Leaf(slot="magnitude", suffix="lora_magnitude_vector")),
            fields=peft_lora.FIELDS,
            options=peft_lora.dora_options,
            config=peft_lora.config,
            when=peft_lora.whole,
        ),
    ),
    starting=Starting(settings=PLAIN_SETTINGS, start=start),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in DoRA."""
    return [DORA]
