"""HiRA: every element of a weight scaled by a product of low rank (https://openreview.net/forum?id=TwJrTz9cRS).

``W' = W + W * (up @ down)``, elementwise; there is no scale.  Shapes are LoRA's, for linear layers, convolutions and
embeddings alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index, take
from lorahub.deltas.factors import FACTORS, dissolve_factors, example_factors, factor_shape, fresh_factors, product
from lorahub.deltas.fit import expect_shape
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED, chosen, one_for_all, stated_rank
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["HIRA", "HiRA"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class HiRA(Delta):
    """``W * (up @ down)``.

    Attributes:
        up: ``[out, r]`` or ``[out, r, *1]``; PEFT's ``hira_B``.
        down: ``[r, in, *k]``; PEFT's ``hira_A``.
    """

    up: torch.Tensor
    down: torch.Tensor

    kind: ClassVar[str] = "hira"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """See ``product``; then element by element."""
        expect_shape(self, weight)
        return product(self.up, self.down, 1.0, weight).mul_(weight)

    def region(self, rows: Index, cols: Index) -> Self:
        """Rows of ``up``, columns of ``down``."""
        return type(self)(take(self.up, rows, 0), take(self.down, cols, 1))

    def shape(self) -> tuple[int, ...]:
        """``[out, in, *k]``."""
        return factor_shape(self.up, self.down)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """LoRA's start.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        return cls(*fresh_factors("hira", shape, r, generator))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        return cls(*example_factors("hira", shape, r, generator))


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight."""
    rank = group.slots["down"].shape[0] if group.slots["down"].shape else None
    return (Touch(parameter="weight", dims="out in *k", slots=("up", "down"), additive=False, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {group.parameter: HiRA(tensors["up"], tensors["down"])}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": HiRA() as weight, **others} if not others:
            tensors, options = dissolve_factors(weight.up, weight.down, 1.0)
            return tensors, {"rank": options["rank"]}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        "r": USED,
        "rank_pattern": USED,
        "hira_dropout": INERT,
        "fan_in_fan_out": INERT,  # the layer type decides, and PEFT overrides the flag by it
        "init_weights": INERT,  # true, false and "gaussian" all leave the base alone
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """The rank, which the arithmetic does not need.

    It may be that of ``r`` where ``rank_pattern`` says another: PEFT 0.21.2 makes every layer with ``r``.

    Raises:
        IntegrityError: the config states neither.
        UnsupportedKind: a pattern that cannot be matched safely.
    """
    down = slots["down"]
    found = down.shape[0] if down.shape else 0
    stated, _ = chosen(config, "", "r", module)
    if stated is None or stated != found:
        stated_rank(config, module, found, down.key)
    return {"rank": found}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """``r`` alone: PEFT 0.21.2 does not load what ``rank_pattern`` says.

    Raises:
        CannotCarry: ranks differ.
    """
    if not groups:
        return {}
    rank = one_for_all(
        groups, "r (for HiRA, whose rank_pattern it ignores)", lambda group: group.slots["down"].shape[0]
    )
    return {"r": rank, "rank_pattern": {}, "hira_dropout": 0.0, "init_weights": True}


HIRA = Kind(
    name="hira",
    title="HiRA",
    source="https://openreview.net/forum?id=TwJrTz9cRS",
    slots=FACTORS,
    deltas=(HiRA,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="HIRA",
            leaves=(
                Leaf(slot="down", suffix="hira_A"),
                Leaf(slot="up", suffix="hira_B"),
                # PEFT multiplies an embedding's output, so there its A is [r, V] and its B [d, r]
                Leaf(slot="up", suffix="hira_embedding_A", transposed=True, role="embedding"),
                Leaf(slot="down", suffix="hira_embedding_B", transposed=True, role="embedding"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in HiRA."""
    return [HIRA]
