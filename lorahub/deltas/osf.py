"""OSF: the smaller singular values of a weight, and their directions, trained anew (see ``source``).

``W' = W - tail(W) + (up * values) @ down``, where ``tail`` is the part of ``W`` with the n smallest singular values;
PEFT's ``effective_rank`` is how many larger ones stay.  PEFT keeps the tail in memory only, so it is found again in the
untouched weight; it does not depend on the signs of singular vectors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index
from lorahub.deltas.factors import example_factors
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT
from lorahub.deltas.peft_values import PLACES
from lorahub.deltas.singular import Factors, expect_sizes, smallest, whole_only
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError, UnsupportedKind
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["OSF", "Tail"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Tail(Delta):
    """``(up * values) @ down - tail(W)``.

    Attributes:
        up: ``[out, n]``.
        values: ``[n]``.
        down: ``[n, in]``.
    """

    up: torch.Tensor
    values: torch.Tensor
    down: torch.Tensor

    kind: ClassVar[str] = "osf"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """In the weight's dtype, the decomposition too.

        Raises:
            BaseMismatch: the weight has other sizes.
        """
        left, right = self.taken(weight)
        return (self.up.to(weight) * self.values.to(weight)) @ self.down.to(weight) - left @ right

    def taken(self, weight: torch.Tensor) -> Factors:
        """What is taken from the weight, as factors of rank n.

        Raises:
            BaseMismatch: the weight has other sizes.
        """
        n = self.values.shape[0]
        expect_sizes(self.kind, weight, self.up.shape[0], self.down.shape[1], n)
        return smallest(weight, n)

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
        """Refused: what changes nothing is the weight's own tail, which a shape does not tell.

        Raises:
            UnsupportedKind: always.
        """
        raise UnsupportedKind("an osf delta starts from its weight; a shape alone does not give one")

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors and values.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        if len(shape) != 2:
            raise BaseMismatch(f"an osf delta changes matrices [out, in], not {list(shape)}")
        n = min(r, min(shape) - 1)
        up, down = example_factors("osf", shape, n, generator)
        return cls(up, torch.randn(n, generator=generator, device=generator.device), down)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, whole."""
    rank, slots = group.slots["values"].shape[0], ("up", "values", "down")
    return (Touch(parameter="weight", dims="out in", slots=slots, additive=False, local=False, rank=rank),)


def build(_group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": Tail(tensors["up"], tensors["values"], tensors["down"])}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Tail() as weight, **others} if not others:
            return weight.tensors(), {"rank": weight.values.shape[0]}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        # how many values stay: the shapes say how many do not
        "effective_rank": INERT,
        "rank_pattern": INERT,
        "target_svd_config": INERT,  # PEFT itself has no use for it yet
    }
)


def options(_config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """How many values are trained, which the arithmetic has from the shapes.

    Raises:
        IntegrityError: there are more of them than the weight has.
    """
    up, values, down = slots["up"], slots["values"], slots["down"]
    if values.shape[0] > min(up.shape[0], down.shape[1]):
        raise IntegrityError(
            f"{module}: {values.key} has {values.shape[0]} values, more than a {[up.shape[0], down.shape[1]]} has"
        )
    return {"rank": values.shape[0]}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """How many values stay: the commonest number, and the others by module.

    Raises:
        CannotCarry: none stays in a module, which PEFT does not take.
    """
    stay = {
        name: min(group.slots["up"].shape[0], group.slots["down"].shape[1]) - group.slots["values"].shape[0]
        for name, group in groups.items()
    }
    if none := sorted(name for name, count in stay.items() if count < 1):
        raise CannotCarry(f"PEFT's OSF leaves at least one singular value as it is, and here: {', '.join(none)}")
    base = Counter(stay.values()).most_common(1)[0][0]
    others: dict[str, JSON] = {f"^{re.escape(name)}$": count for name, count in stay.items() if count != base}
    return {"effective_rank": base, "rank_pattern": others or None, "target_svd_config": None, "init_weights": True}


OSF = Kind(
    name="osf",
    title="OSF",
    source="https://arxiv.org/abs/2504.07097",
    slots=(
        Slot(name="up", dims="out n", prunable=True),
        Slot(name="values", dims="n", prunable=True),
        Slot(name="down", dims="n in", prunable=True),
    ),
    deltas=(Tail,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="OSF",
            leaves=(
                Leaf(slot="up", suffix="osf_svd_params.U_low"),
                Leaf(slot="values", suffix="osf_svd_params.S_low"),
                Leaf(slot="down", suffix="osf_svd_params.V_low"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in OSF."""
    return [OSF]
