"""HRA: the inputs of a layer mirrored, one plane after the other (https://arxiv.org/abs/2405.17484).

``W' = W_2d @ (I - 2 u_1 u_1^T) ... (I - 2 u_r u_r^T)`` with unit vectors ``u_i``, a convolution's inputs being
``in * prod(k)``.  With PEFT's ``apply_GS`` the vectors are made orthogonal first, by Gram and Schmidt in order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index
from lorahub.deltas.fit import expect_matrix
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import USED, one_for_all, stated_rank
from lorahub.deltas.peft_values import PLACES, switch
from lorahub.deltas.rotation import all_columns
from lorahub.errors import BaseMismatch, UnsupportedKind
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["HRA", "Mirrors"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Mirrors(Delta):
    """A row of reflections of the weight's inputs.

    Attributes:
        normals: ``[in * prod(k), r]``, a column for each mirror, of any length but zero.
        orthogonal: the columns are made orthogonal first.
    """

    normals: torch.Tensor
    orthogonal: bool = False

    kind: ClassVar[str] = "hra"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The sum of what each mirror changes, so that no digits are lost in a weight much larger than its change.

        Two equal mirrors in a row, which is how PEFT begins, change exactly nothing; autograd sees them all the same.

        Raises:
            BaseMismatch: the weight has another number of inputs.
        """
        expect_matrix(self.kind, tuple(weight.shape))
        flat = weight.flatten(1)
        if flat.shape[1] != self.normals.shape[0]:
            raise BaseMismatch(
                f"an hra delta for {self.normals.shape[0]} inputs was given a weight {list(weight.shape)}"
            )
        units = self._units(weight)
        change = torch.zeros_like(flat)
        at, count = 0, units.shape[1]
        while at < count:
            after = mirrored(flat, change, units[:, at])
            if at + 1 < count and torch.equal(units[:, at], units[:, at + 1]):
                back = mirrored(flat, after, units[:, at + 1])
                after = change + (back - back.detach())
                at += 1
            change, at = after, at + 1
        return change.reshape(weight.shape)

    def _units(self, weight: torch.Tensor) -> torch.Tensor:
        """The normals as unit vectors, orthogonal where they should be."""
        found: list[torch.Tensor] = []
        for column in self.normals.to(weight).unbind(1):
            normal = column
            for earlier in found if self.orthogonal else ():
                normal = normal - (earlier @ normal) * earlier
            found.append(normal / torch.linalg.vector_norm(normal))
        return torch.stack(found, dim=1)

    def region(self, rows: Index, cols: Index) -> Self:
        """The same mirrors for any rows.

        Raises:
            NotLocal: the columns are cut.
        """
        all_columns(self.kind, cols)
        return self

    def shape(self) -> None:
        """None: the normals say how many inputs there are, not how many outputs."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Each mirror twice, as PEFT begins: Kaiming uniform with a = sqrt(5).

        Raises:
            BaseMismatch: ``shape`` is no weight.
            UnsupportedKind: an odd number of mirrors always changes something.
        """
        _, _, features = expect_matrix("hra", shape)
        if r % 2:
            raise UnsupportedKind(
                f"{r} mirrors cannot change nothing: two equal ones undo each other, an odd one is left over",
                "Use an even number.",
            )
        half = torch.empty(features, r // 2, device=generator.device)
        half.uniform_(-1 / math.sqrt(r // 2), 1 / math.sqrt(r // 2), generator=generator)
        return cls(half.repeat_interleave(2, dim=1))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal vectors, orthogonal or not.

        Raises:
            BaseMismatch: ``shape`` is no weight, or has fewer inputs than ``r``.
        """
        _, _, features = expect_matrix("hra", shape)
        if features < r:
            raise BaseMismatch(f"there are no {r} directions among {features} inputs")
        orthogonal = bool(torch.randint(2, (), generator=generator, device=generator.device))
        return cls(torch.randn(features, r, generator=generator, device=generator.device), orthogonal)


def mirrored(flat: torch.Tensor, change: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """The change after one more mirror, which sees the weight with the change so far."""
    return change - 2 * torch.outer((flat + change) @ unit, unit)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, its inputs counted over the kernel."""
    features, rank = group.slots["normals"].shape
    return (Touch(parameter="weight", dims=f"out *{features}", slots=("normals",), additive=False, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": Mirrors(tensors["normals"], bool(group.options["orthogonal"]))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Mirrors(normals=normals, orthogonal=orthogonal), **others} if not others:
            return {"normals": normals}, {"orthogonal": orthogonal}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType({**PLACES, "r": USED, "apply_GS": USED})


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Whether the mirrors are made orthogonal.

    Raises:
        IntegrityError: the config states another number of mirrors.
    """
    normals = slots["normals"]
    stated_rank(config, module, normals.shape[1], normals.key, patterns="")
    return {"orthogonal": switch(config, "apply_GS", False)}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """One number of mirrors and one ``apply_GS`` for all modules.

    Raises:
        CannotCarry: modules differ in either.
    """
    return {
        "r": one_for_all(groups, "r", lambda group: group.slots["normals"].shape[1]),
        "apply_GS": one_for_all(groups, "apply_GS", lambda group: group.options["orthogonal"]),
        "init_weights": True,
    }


HRA = Kind(
    name="hra",
    title="HRA",
    source="https://arxiv.org/abs/2405.17484",
    slots=(Slot(name="normals", dims="features r"),),
    deltas=(Mirrors,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="HRA",
            leaves=(Leaf(slot="normals", suffix="hra_u"),),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in HRA."""
    return [HRA]
