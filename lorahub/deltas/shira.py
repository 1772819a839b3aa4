"""SHiRA: single elements of a weight changed, all others left alone (https://arxiv.org/abs/2406.13175).

The file holds the values and their rows and columns, so how the elements were once chosen does not matter.  It does
not hold the weight's shape: positions outside a weight are refused when the weight is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import ALL, Delta, Index
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED, one_for_all
from lorahub.deltas.peft_values import PLACES, integer
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError, NotLocal
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["SHIRA", "Sparse"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Sparse(Delta):
    """Values at positions of a matrix; where two fall on one position, they add.

    Attributes:
        values: ``[n]``.
        places: ``[2, n]``, rows and columns; whole numbers of any dtype, none below zero.
        r: PEFT's measure of how many values a weight gets, ``n / (in + out)``; 0 where a cut has changed that.
    """

    values: torch.Tensor
    places: torch.Tensor
    r: int

    kind: ClassVar[str] = "shira"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """Zeros but for the values.

        Raises:
            BaseMismatch: the weight is no matrix, or a position lies outside it.
        """
        places = self.places.to(weight.device, torch.long)
        if weight.dim() != 2 or any(bool((at >= size).any()) for at, size in zip(places, weight.shape, strict=True)):
            reach = [int(at.max()) + 1 if at.numel() else 0 for at in places]
            raise BaseMismatch(f"a shira delta that reaches {reach} was given a weight {list(weight.shape)}")
        return torch.zeros_like(weight).index_put((places[0], places[1]), self.values.to(weight), accumulate=True)

    def region(self, rows: Index, cols: Index) -> Self:
        """The values that fall into the region, renumbered.

        Raises:
            NotLocal: a slice counts from the end or backwards, and the end of the weight is not known here; or a
                position comes twice.
        """
        if rows == ALL and cols == ALL:
            return self
        if not self.values.numel():
            return replace(self, r=0)
        kept = torch.arange(self.values.numel(), device=self.places.device)
        places = self.places.to(torch.long)
        for axis, index in enumerate((rows, cols)):
            if index != ALL:
                source, target = self._renumber(places[axis], index)
                kept, places = kept[source], places[:, source]
                places[axis] = target
        return replace(self, values=self.values[kept], places=places, r=0)

    def _renumber(self, at: torch.Tensor, index: Index) -> tuple[torch.Tensor, torch.Tensor]:
        """Which entries of ``at`` the index takes, and where it puts them."""
        if isinstance(index, slice):
            start, stop, step = index.start or 0, index.stop, index.step or 1
            if start < 0 or step < 0 or (stop is not None and stop < 0):
                raise NotLocal("a shira delta does not know the end of its weight; count the cut from the beginning")
            offset = at - start
            inside = (offset >= 0) & (offset % step == 0)
            if stop is not None:
                inside &= at < stop
            source = inside.nonzero().flatten()
            return source, offset[source] // step
        if len(set(index)) < len(index):
            raise NotLocal("a shira delta cannot be cut to positions that come twice")
        taken = torch.tensor(index, dtype=torch.long, device=at.device)
        target = at.new_full((max([0, *index, *at.max().reshape(-1).tolist()]) + 1,), -1)
        target[taken] = torch.arange(len(index), device=at.device)
        found = target[at]
        source = (found >= 0).nonzero().flatten()
        return source, found[source]

    def shape(self) -> None:
        """None: positions say how far they reach, not where the weight ends."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Zeros at ``r * (in + out)`` random positions, or fewer where the matrix is small.

        Raises:
            BaseMismatch: ``shape`` is no matrix, or has too few elements for any.
        """
        places, r = random_places(shape, r, generator)
        return cls(torch.zeros(places.shape[1], device=generator.device), places, r)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal values at ``fresh``'s positions.

        Raises:
            BaseMismatch: as ``fresh``.
        """
        places, r = random_places(shape, r, generator)
        return cls(torch.randn(places.shape[1], generator=generator, device=generator.device), places, r)


def random_places(shape: tuple[int, ...], r: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Different positions in order, and the measure they were made for: the largest up to ``r`` that fits.

    Raises:
        BaseMismatch: ``shape`` is no matrix, or has too few elements for any.
    """
    if len(shape) != 2 or math.prod(shape) < sum(shape):
        raise BaseMismatch(
            f"a shira delta changes matrices with at least as many elements as rows and columns: {shape}"
        )
    r = min(r, math.prod(shape) // sum(shape))
    chosen = torch.randperm(math.prod(shape), generator=generator, device=generator.device)[: r * sum(shape)]
    order = chosen.sort().values
    return torch.stack([order // shape[1], order % shape[1]]).to(torch.int32), r


def touches(_group: Group) -> tuple[Touch, ...]:
    """The weight, of any size."""
    return (Touch(parameter="weight", dims="out in", slots=("values", "places"), additive=True),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta.

    Raises:
        IntegrityError: positions that are no whole numbers, or below zero.
    """
    values, places = tensors["values"], tensors["places"]
    # PEFT on Windows stores positions as float32
    if bool((places != places.to(torch.long)).any()) or bool((places < 0).any()):
        raise IntegrityError(f"{group.slots['places'].key} holds positions that are no whole numbers, or below zero")
    r = group.options["r"]
    assert isinstance(r, int)
    return {"weight": Sparse(values, places, r)}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``; the number of values that a cut leaves has no word in PEFT."""
    match dict(deltas):
        case {"weight": Sparse(values=values, places=places, r=r), **others} if not others and r:
            return {"values": values, "places": places}, {"r": r}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "r": USED,
        # how positions were chosen: they are stored
        "mask_type": INERT,
        "random_seed": INERT,
        "fan_in_fan_out": INERT,  # PEFT adapts no layer that stores [in, out]
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """The measure ``r``, which has no part in the arithmetic but is wanted back for writing.

    Raises:
        IntegrityError: the number of values is no multiple of it.
    """
    values, r = slots["values"], integer(config, "r", 32)
    if r < 1 or values.shape[0] % r:
        raise IntegrityError(f"{module}: {values.key} has {values.shape[0]} values, no multiple of r = {r}")
    return {"r": r}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """One ``r`` for all modules.

    Raises:
        CannotCarry: modules differ in it.
    """
    r = one_for_all(groups, "r", lambda group: group.options["r"])
    if not isinstance(r, int) or any(group.slots["values"].shape[0] % r for group in groups.values()):
        raise CannotCarry(f"PEFT wants r * (in + out) values in every module, and r = {r!r} does not divide them")
    return {"r": r, "mask_type": "random", "random_seed": None, "init_weights": True}


SHIRA = Kind(
    name="shira",
    title="SHiRA",
    source="https://arxiv.org/abs/2406.13175",
    slots=(Slot(name="values", dims="n"), Slot(name="places", dims="2 n", holds="integers")),
    deltas=(Sparse,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="SHIRA",
            leaves=(Leaf(slot="values", suffix="shira_weight"), Leaf(slot="places", suffix="shira_indices")),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in SHiRA."""
    return [SHIRA]
