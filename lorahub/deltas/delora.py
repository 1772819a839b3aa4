"""DeLoRA: a change of low rank whose directions have length one and whose strength is trained apart from them.

https://arxiv.org/abs/2503.18225
``(bound / r) * sum over i of (up_i / |up_i|) (down_i / |down_i|)``, each column then times the length that the weight's
column had when training began.  Those lengths lie in the file, so the change does not look at the weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.cut import Cuts, cut, then
from lorahub.deltas.delta import Delta, Index, LowRank
from lorahub.deltas.factors import example_factors, fresh_factors
from lorahub.deltas.fit import expect_shape
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED, patterned, stated_rank
from lorahub.errors import BaseMismatch
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["DELORA", "DeLoRA"]

_SHORTEST = 1e-4
"""Shorter directions are divided by this; PEFT's number."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class DeLoRA(Delta):
    """``up @ diag(bound / (r |up_i| |down_i|)) @ down`` with its columns scaled by ``lengths``.

    Attributes:
        up: ``[out, r]``; PEFT's ``delora_B``.
        down: ``[r, in]``; PEFT's ``delora_A``.
        bound: ``[1]``; PEFT's ``delora_lambda``.
        lengths: ``[in]``; PEFT's ``delora_w_norm``.
        rows, cols: cuts still to be made, because the lengths of whole directions come first; see ``cut``.
    """

    up: torch.Tensor
    down: torch.Tensor
    bound: torch.Tensor
    lengths: torch.Tensor
    rows: Cuts = ()
    cols: Cuts = ()

    kind: ClassVar[str] = "delora"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The weight gives shape, dtype and device only."""
        expect_shape(self, weight)
        up, down = (cut(self.up, self.rows, 0).to(weight), cut(self.down, self.cols, 1).to(weight))
        return ((up * self._gains().to(weight)) @ down).mul_(cut(self.lengths, self.cols, 0).to(weight))

    def _gains(self) -> torch.Tensor:
        """``bound / (r |up_i| |down_i|)`` in float64: the same for a window as for the whole."""
        up, down = self.up.double().norm(dim=0), self.down.double().norm(dim=1)
        lengths = up.clamp(min=_SHORTEST) * down.clamp(min=_SHORTEST)
        gains: torch.Tensor = self.bound.double() / self.down.shape[0] / lengths
        return gains

    def region(self, rows: Index, cols: Index) -> Self:
        """Any rows and columns."""
        return replace(self, rows=then(self.rows, rows), cols=then(self.cols, cols))

    def low_rank(self) -> LowRank:
        """Normalised directions, in float64."""
        up = cut(self.up, self.rows, 0).double() * self._gains()
        return LowRank(up, cut(self.down.double() * self.lengths.double(), self.cols, 1), 1.0)

    def shape(self) -> tuple[int, ...]:
        """``[out, in]``."""
        return cut(self.up, self.rows, 0).shape[0], cut(self.down, self.cols, 1).shape[1]

    def measured(self, weight: torch.Tensor) -> Self:
        """This delta with the lengths of the untouched weight's columns, as PEFT begins; float32 at least."""
        expect_shape(self, weight)
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return replace(self, lengths=torch.linalg.vector_norm(wide, dim=0))

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """LoRA's start at PEFT's bound of 15, with lengths of one until they are ``measured``.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        up, down = fresh_factors("delora", _matrix(shape), r, generator)
        return cls(up, down, torch.full((1,), 15.0, device=up.device), torch.ones(shape[1], device=up.device))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors, a bound that makes elements of size one, lengths between a half and twice that.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        up, down = example_factors("delora", _matrix(shape), r, generator)
        bound = torch.full((1,), 0.7 * math.sqrt(r * math.prod(shape)), device=up.device)
        return cls(up, down, bound, torch.rand(shape[1], generator=generator, device=up.device) * 1.5 + 0.5)


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 2:
        raise BaseMismatch(f"a delora delta changes matrices [out, in], not {list(shape)}")
    return shape


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight."""
    slots = ("up", "down", "bound", "lengths")
    rank = group.slots["down"].shape[0]
    return (Touch(parameter="weight", dims="out in", slots=slots, additive=True, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {group.parameter: DeLoRA(tensors["up"], tensors["down"], tensors["bound"], tensors["lengths"])}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``; a delta that was cut is no adapter's own any more."""
    match dict(deltas):
        case {"weight": DeLoRA(rows=(), cols=()) as weight, **others} if not others:
            return weight.tensors(), {"rank": weight.down.shape[0]}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        "r": USED,
        "rank_pattern": USED,
        "delora_lambda": INERT,  # where the bounds began; what became of them lies in the file
        "lambda_pattern": INERT,
        "module_dropout": INERT,
        "init_weights": INERT,
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """The rank.

    Raises:
        IntegrityError: the config states another rank than the tensors have.
        UnsupportedKind: a pattern that cannot be matched safely.
    """
    down = slots["down"]
    return {"rank": stated_rank(config, module, down.shape[0] if down.shape else 0, down.key)}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """Ranks; everything else is PEFT's default, which the tensors override."""
    if not groups:
        return {}
    r, rank_pattern = patterned({name: group.slots["down"].shape[0] for name, group in groups.items()})
    return {
        "r": r,
        "rank_pattern": dict(rank_pattern),
        "delora_lambda": 15,
        "lambda_pattern": {},
        "module_dropout": 0.0,
        "init_weights": True,
    }


DELORA = Kind(
    name="delora",
    title="DeLoRA",
    source="https://arxiv.org/abs/2503.18225",
    slots=(
        Slot(name="down", dims="r in"),
        Slot(name="up", dims="out r"),
        Slot(name="bound", dims="1"),
        Slot(name="lengths", dims="in"),
    ),
    deltas=(DeLoRA,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="DELORA",
            leaves=(
                Leaf(slot="down", suffix="delora_A"),
                Leaf(slot="up", suffix="delora_B"),
                Leaf(slot="bound", suffix="delora_lambda"),
                Leaf(slot="lengths", suffix="delora_w_norm"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in DeLoRA."""
    return [DELORA]
