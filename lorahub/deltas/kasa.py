"""KaSA: a low-rank change with a trained diagonal, on a weight cut to its larger singular values.

``W' = W - tail(W) + scale * up @ diag(d) @ down``: of ``W`` the r smallest singular values are taken away first
(https://arxiv.org/abs/2412.06071).  PEFT cuts the base when an adapter is added and keeps nothing of what it took, so
the cut is made anew from the untouched weight.  The tail does not depend on the signs of singular vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas import peft_lora
from lorahub.deltas.delta import Delta, Index
from lorahub.deltas.factors import dissolve_factors, example_factors, product, scale_of
from lorahub.deltas.full import Full
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import USED
from lorahub.deltas.singular import Factors, expect_sizes, smallest, whole_only
from lorahub.errors import BaseMismatch, IntegrityError, UnsupportedKind
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["KASA", "Kasa"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Kasa(Delta):
    """``scale * (up * diagonal) @ down - tail(W)``.

    Attributes:
        up: ``[out, r]``; PEFT's ``lora_B``.
        down: ``[r, in]``; PEFT's ``lora_A``.
        diagonal: ``[r]``; PEFT's ``lora_diag``.
        scale: ``alpha / r``, or ``alpha / sqrt(r)``.
    """

    up: torch.Tensor
    down: torch.Tensor
    diagonal: torch.Tensor
    scale: float

    kind: ClassVar[str] = "kasa"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """In the weight's dtype, the decomposition too.

        Raises:
            BaseMismatch: the weight has other sizes.
        """
        left, right = self.taken(weight)
        return product(self.up.to(weight) * self.diagonal.to(weight), self.down, self.scale, weight) - left @ right

    def taken(self, weight: torch.Tensor) -> Factors:
        """What is taken from the weight, as factors of rank r.

        Raises:
            BaseMismatch: the weight has other sizes.
        """
        r = self.down.shape[0]
        expect_sizes(self.kind, weight, self.up.shape[0], self.down.shape[1], r + 1)
        return smallest(weight, r)

    def region(self, rows: Index, cols: Index) -> Self:
        """Only the whole.

        Raises:
            NotLocal: any cut.
        """
        whole_only(self.kind, rows, cols)
        return self

    def shape(self) -> tuple[int, int]:
        """``[out, in]``."""
        return self.up.shape[0], self.down.shape[1]

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Refused: even an untrained adapter takes the tail away.

        Raises:
            UnsupportedKind: always.
        """
        raise UnsupportedKind("a kasa delta changes its weight from the start; there is none that changes nothing")

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors and diagonal.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        if len(shape) != 2:
            raise BaseMismatch(f"a kasa delta changes matrices [out, in], not {list(shape)}")
        rank = min(r, min(shape) - 1)
        up, down = example_factors("kasa", shape, rank, generator)
        return cls(up, down, torch.randn(rank, generator=generator, device=generator.device), 0.7)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, whole, and the bias where ``lora_bias`` trained one."""
    rank, slots = group.slots["down"].shape[0], ("up", "down", "diagonal")
    weight = Touch(parameter="weight", dims="out in", slots=slots, additive=False, local=False, rank=rank)
    if "bias" not in group.slots:
        return (weight,)
    return weight, Touch(parameter="bias", dims="out", slots=("up", "bias"), additive=True)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta, and the bias's as a full difference with the same scale."""
    scale = scale_of(group)
    deltas: dict[str, Delta] = {"weight": Kasa(tensors["up"], tensors["down"], tensors["diagonal"], scale)}
    if "bias" in tensors:
        deltas["bias"] = Full(tensors["bias"], scale)
    return deltas


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    weight, bias = deltas.get("weight"), deltas.get("bias")
    if not isinstance(weight, Kasa) or not deltas.keys() <= {"weight", "bias"}:
        return None
    tensors, options = dissolve_factors(weight.up, weight.down, weight.scale)
    tensors["diagonal"] = weight.diagonal
    if bias is None:
        return tensors, options
    if not isinstance(bias, Full) or bias.scale != weight.scale or bias.shape() != (weight.up.shape[0],):
        return None
    return {**tensors, "bias": bias.diff}, options


FIELDS: Mapping[str, Field] = MappingProxyType({**peft_lora.FIELDS, "kasa_config": USED})


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Scale, its rule, alpha and rank.

    Raises:
        IntegrityError: the config states another rank, denies that this is KaSA, or contradicts whether there is a
            bias.
        UnsupportedKind: a pattern that cannot be matched safely.
    """
    if not isinstance(config.get("kasa_config"), Mapping):
        raise IntegrityError(f"{module}: kasa_config is not set, and the file has {slots['diagonal'].key}")
    return peft_lora.lora_options(config, module, slots)


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The inverse of ``options``.

    Raises:
        CannotCarry: modules with and without a bias in one adapter, or a scale that no alpha gives.
    """
    # PEFT's own weights of two penalties in training; the arithmetic of the tensors does not need them
    return {**peft_lora.config(groups), "kasa_config": {"beta": 1e-4, "gamma": 1e-3}}


KASA = Kind(
    name="kasa",
    title="KaSA",
    source="https://arxiv.org/abs/2412.06071",
    slots=(
        Slot(name="down", dims="r in"),
        Slot(name="up", dims="out r"),
        Slot(name="diagonal", dims="r"),
        Slot(name="bias", dims="out", optional=True),
    ),
    deltas=(Kasa,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="LORA",
            leaves=(
                Leaf(slot="down", suffix="lora_A.weight"),
                Leaf(slot="up", suffix="lora_B.weight"),
                Leaf(slot="diagonal", suffix="lora_diag"),
                Leaf(slot="bias", suffix="lora_B.bias"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
            when=peft_lora.whole,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in KaSA."""
    return [KASA]
