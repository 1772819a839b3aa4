"""LoRA on a stack of experts: a change of low rank for each matrix of a three-dimensional parameter.

Mixtures of experts keep the weights of all experts in one parameter, ``[E, out, in]`` or, with ``transposed``,
``[E, in, out]``, and every expert has factors of its own: ``scale * up[e] @ down[e]``.  Formats bring the factors as
``down`` [E, r, in] and ``up`` [E, out, r], however their files lay them out; PEFT's ``target_parameters`` is one such
layout.  Which way round the parameter is, only the base knows, so it may stay open until a weight is seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas import peft_lora
from lorahub.deltas.delta import ALL, Delta, Index, take
from lorahub.deltas.factors import scale_of
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, Slot, Spelling, Touch
from lorahub.deltas.lora import LoRA
from lorahub.deltas.lora_starting import EXPERT_STARTING
from lorahub.deltas.stacks import COLUMNS, ROWS
from lorahub.errors import BaseMismatch, NotLocal
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["EXPERT_LORA", "ExpertLoRA"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class ExpertLoRA(Delta):
    """``scale * up[e] @ down[e]`` for every expert ``e``.

    Attributes:
        up: ``[E, out, r]``.
        down: ``[E, r, in]``.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        transposed: the parameter is ``[E, in, out]``; None: nobody said, and its shape has to tell.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    transposed: bool | None = False

    kind: ClassVar[str] = "expert-lora"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """One product for each expert; the weight gives shape, dtype and device only.

        Raises:
            BaseMismatch: the weight is no stack of that many matrices of that shape, or is square and nobody said
                which way round it is.
        """
        transposed = self._way(tuple(weight.shape))
        up, down = self.up.to(weight), self.down.to(weight)
        change = down.mT @ up.mT if transposed else up @ down
        return change.mul_(self.scale)

    def _way(self, shape: tuple[int, ...]) -> bool:
        straight, turned = self._shapes()
        if self.transposed is None and straight == turned == shape:
            raise BaseMismatch(
                f"an expert-lora delta was given a weight {list(shape)} and cannot tell rows from columns",
                "Say which way round it is: ExpertLoRA(..., transposed=...).",
            )
        ways = [way for way in (False, True) if self.transposed in (way, None) and (straight, turned)[way] == shape]
        if not ways:
            expected = " or ".join(str(list(each)) for each in self._possible())
            raise BaseMismatch(f"an expert-lora delta for {expected} was given a weight {list(shape)}")
        return ways[0]

    def _shapes(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        experts, out, _ = self.up.shape
        inputs = self.down.shape[2]
        return (experts, out, inputs), (experts, inputs, out)

    def _possible(self) -> tuple[tuple[int, int, int], ...]:
        return self._shapes() if self.transposed is None else (self._shapes()[self.transposed],)

    def region(self, rows: Index, cols: Index) -> Self:
        """Some experts, and of each some rows as the parameter stores them.

        Raises:
            NotLocal: rows are cut, and nobody said which way round the parameter is.
        """
        up, down = take(self.up, rows, 0), take(self.down, rows, 0)
        if cols == ALL:
            return replace(self, up=up, down=down)
        if self.transposed is None:
            raise NotLocal("an expert-lora delta does not know which way round its weight is, to cut it")
        return (
            replace(self, up=up, down=take(down, cols, 2))
            if self.transposed
            else replace(self, up=take(up, cols, 1), down=down)
        )

    def expert(self, position: int) -> LoRA:
        """The factors of one expert, for its matrix as the parameter stores it.

        Raises:
            NotLocal: nobody said which way round the parameter is.
        """
        if self.transposed is None:
            raise NotLocal("an expert-lora delta does not know which way round its weight is, to take one expert of it")
        up, down = self.up[position], self.down[position]
        return LoRA(down.mT, up.mT, self.scale) if self.transposed else LoRA(up, down, self.scale)

    def shape(self) -> tuple[int, ...] | None:
        """``[E, out, in]`` or ``[E, in, out]``; None where that is open."""
        return None if self.transposed is None else self._shapes()[self.transposed]

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """PEFT's default start for a stack ``[E, out, in]``, at scale 1.

        Raises:
            BaseMismatch: ``shape`` is no stack of matrices.
        """
        experts, out, inputs = _expect_stack(shape)
        bound = 1 / math.sqrt(inputs)
        down = torch.empty(experts, r, inputs, device=generator.device).uniform_(-bound, bound, generator=generator)
        return cls(torch.zeros(experts, out, r, device=generator.device), down, 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors, scaled by a number that is no power of two; either way round, or open, at random.

        Raises:
            BaseMismatch: ``shape`` is no stack of matrices.
        """
        experts, rows, cols = _expect_stack(shape)
        ways = (False, True) if rows == cols else (False, True, None)
        transposed = ways[int(torch.randint(len(ways), (), generator=generator, device=generator.device))]
        out, inputs = (cols, rows) if transposed else (rows, cols)
        up, down = (
            torch.randn(size, generator=generator, device=generator.device)
            for size in ((experts, out, r), (experts, r, inputs))
        )
        return cls(up / math.sqrt(r), down, 0.7, transposed)


def _expect_stack(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise BaseMismatch(f"an expert-lora delta changes stacks of matrices [experts, out, in], not {list(shape)}")
    return shape[0], shape[1], shape[2]


_DIMS: Mapping[JSON, str] = {False: "experts out in", True: "experts in out", None: "experts *matrix"}


def touches(group: Group) -> tuple[Touch, ...]:
    """The one parameter that the group names, whole; windows are experts."""
    rank = group.slots["down"].shape[1]
    dims = _DIMS[group.options.get("transposed", False)]
    stacks = group.options.get("transposed", False) is not None
    return (Touch(parameter=group.parameter, dims=dims, slots=("up", "down"), additive=True, rank=rank, stacks=stacks),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The delta of the group's parameter."""
    transposed = group.options.get("transposed", False)
    assert transposed is None or isinstance(transposed, bool)
    return {group.parameter: ExpertLoRA(tensors["up"], tensors["down"], scale_of(group), transposed)}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``, for one parameter at a time: which one is the key it came under."""
    match list(deltas.values()):
        case [ExpertLoRA(up=up, down=down, scale=scale, transposed=transposed)]:
            return {"down": down, "up": up}, {"scale": scale, "rank": down.shape[1], "transposed": transposed}
    return None


EXPERT_LORA = Kind(
    name="expert-lora",
    title="LoRA on a stack of experts",
    source="https://huggingface.co/docs/peft/developer_guides/lora#targeting-nnparameter-directly",
    slots=(Slot(name="down", dims="experts r in"), Slot(name="up", dims="experts out r")),
    deltas=(ExpertLoRA,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="LORA",
            leaves=(
                Leaf(slot="down", suffix="lora_A.weight", role="expert", stacked=ROWS),
                Leaf(slot="up", suffix="lora_B.weight", role="expert", stacked=COLUMNS),
            ),
            fields=peft_lora.FIELDS,
            options=peft_lora.expert_options,
            config=peft_lora.config,
            when=peft_lora.whole,
        ),
    ),
    starting=EXPERT_STARTING,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in LoRA on experts."""
    return [EXPERT_LORA]
