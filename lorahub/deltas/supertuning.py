"""SuperTuning: single elements of a weight moved, with or without a low-rank change (https://arxiv.org/abs/2607.09287).

``W' = W`` with ``values`` added at flat, row-major ``places``, plus ``scale * up @ down`` where files have factors.
Files may lack the places (PEFT's ``save_precomputed_indices`` false): they are those of the weight's largest elements,
in that order, or of its smallest.  Where elements of equal size have different values nothing says which has which,
and such a weight is refused; in 16 bits that is nearly always so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import ALL, Delta, Index
from lorahub.deltas.factors import example_factors, product, scale_of
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED, alpha_for, one_for_all
from lorahub.deltas.peft_values import PLACES, integer, number, switch
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError, NotLocal
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["SUPERTUNING", "Elements", "Ranked"]

LACKING = (
    "PEFT leaves the positions out where save_precomputed_indices is false and finds them again among the base's own "
    "values"
)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Elements(Delta):
    """``values`` at ``places``, plus ``scale * up @ down``.

    Attributes:
        values: ``[n]``.
        places: ``[n]`` positions in the flattened matrix; one that comes twice is added to twice.
        up: ``[out, r]`` or None.
        down: ``[r, in]`` or None.
        scale: multiplies the product.
        sparsity: the share of elements that stay, which the arithmetic does not need and PEFT wants to be told.
    """

    values: torch.Tensor
    places: torch.Tensor
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    scale: float = 1.0
    sparsity: float = 0.99

    kind: ClassVar[str] = "supertuning"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The weight gives shape, dtype and device only.

        Raises:
            BaseMismatch: it is no matrix, has too few elements, or other sizes than the factors.
        """
        reach = int(self.places.max()) + 1 if self.places.numel() else 0
        if weight.dim() != 2 or weight.numel() < reach or self.shape() not in (None, tuple(weight.shape)):
            raise BaseMismatch(
                f"a supertuning delta that reaches element {reach} of {list(self.shape() or ('any', 'any'))} was given "
                f"a weight {list(weight.shape)}"
            )
        places = self.places.to(weight.device, torch.long)
        flat = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
        change = flat.index_put((places,), self.values.to(weight), accumulate=True).reshape(weight.shape)
        if self.up is None or self.down is None:
            return change
        return change.add_(product(self.up, self.down, self.scale, weight))

    def region(self, rows: Index, cols: Index) -> Self:
        """Only the whole.

        Raises:
            NotLocal: any cut: where a position lies follows from the width of the whole weight.
        """
        if rows != ALL or cols != ALL:
            raise NotLocal("a supertuning delta follows from the shape of the whole weight; it cannot be cut")
        return self

    def shape(self) -> tuple[int, ...] | None:
        """``[out, in]`` where there are factors, or None."""
        return None if self.up is None or self.down is None else (self.up.shape[0], self.down.shape[1])

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Zeros at half of the positions.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        like = cls.example(shape, r=r, generator=generator)
        return cls(torch.zeros_like(like.values), like.places, sparsity=like.sparsity)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal values at half of the positions, with or without normal factors.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        if len(shape) != 2:
            raise BaseMismatch(f"a supertuning delta changes matrices [out, in], not {list(shape)}")
        device, size = generator.device, shape[0] * shape[1]
        places = torch.randperm(size, generator=generator, device=device)[: size // 2].to(torch.int32)
        values = torch.randn(size // 2, generator=generator, device=device)
        if bool(torch.randint(2, (), generator=generator, device=device)):
            return cls(values, places, *example_factors("supertuning", shape, r, generator), 0.7, 0.5)
        return cls(values, places, sparsity=0.5)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Ranked(Delta):
    """``values`` at the weight's largest or smallest elements, plus ``scale * up @ down``.

    Attributes:
        values: ``[n]``, the first for the very largest (or smallest) element.
        largest: which end.
        up, down, scale, sparsity: as in ``Elements``.
    """

    values: torch.Tensor
    largest: bool = True
    up: torch.Tensor | None = None
    down: torch.Tensor | None = None
    scale: float = 1.0
    sparsity: float = 0.99

    kind: ClassVar[str] = "supertuning"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """In the weight's dtype.

        Raises:
            BaseMismatch: the weight is no matrix, has too few elements, or several of one size with different values.
        """
        return self.placed(weight).delta(weight)

    def placed(self, weight: torch.Tensor) -> Elements:
        """The same change with the places that this weight gives.

        Raises:
            BaseMismatch: see ``delta``.
        """
        n = self.values.shape[0]
        if weight.dim() != 2 or weight.numel() < n:
            raise BaseMismatch(f"a supertuning delta of {n} elements was given a weight {list(weight.shape)}")
        sizes, places = weight.detach().abs().flatten().topk(min(n + 1, weight.numel()), largest=self.largest)
        values = self.values.to(weight)
        same = sizes[1:] == sizes[:-1]
        apart = torch.cat([values[1:] != values[:-1], values.new_ones(sizes.shape[0] - n, dtype=torch.bool)])
        if n and bool((same & apart[: same.shape[0]]).any()):
            raise BaseMismatch(
                f"{LACKING}, and this weight {list(weight.shape)} has elements of equal size among them, for which "
                "different values were trained: which has which is not in the file",
                "save the adapter again where it was trained, in PEFT, with save_precomputed_indices=True",
            )
        return Elements(self.values, places[:n].to(torch.int32), self.up, self.down, self.scale, self.sparsity)

    def region(self, rows: Index, cols: Index) -> Self:
        """Only the whole.

        Raises:
            NotLocal: any cut: a part has other largest elements.
        """
        if rows != ALL or cols != ALL:
            raise NotLocal("a supertuning delta looks for the largest elements of the whole weight; it cannot be cut")
        return self

    def shape(self) -> tuple[int, ...] | None:
        """``[out, in]`` where there are factors, or None."""
        return None if self.up is None or self.down is None else (self.up.shape[0], self.down.shape[1])

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Zeros for half of the elements.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        like = Elements.fresh(shape, r=r, generator=generator)
        return cls(like.values, sparsity=like.sparsity)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal values for half of the elements, at either end, with or without factors.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        like = Elements.example(shape, r=r, generator=generator)
        end = bool(torch.randint(2, (), generator=generator, device=generator.device))
        return cls(like.values, end, like.up, like.down, like.scale, like.sparsity)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, whole; of any size where there are no factors."""
    rank = group.slots["down"].shape[0] if "down" in group.slots else None
    slots, placed = tuple(group.slots), "places" in group.slots
    return (Touch(parameter="weight", dims="out in", slots=slots, additive=placed, local=False, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta.

    Raises:
        IntegrityError: positions that are no whole numbers, or below zero.
    """
    places, sparsity = tensors.get("places"), group.options["sparsity"]
    assert isinstance(sparsity, int | float)
    up, down = tensors.get("up"), tensors.get("down")
    if places is None:
        end = bool(group.options["largest"])
        return {"weight": Ranked(tensors["values"], end, up, down, scale_of(group), float(sparsity))}
    if bool((places != places.to(torch.long)).any()) or bool((places < 0).any()):
        raise IntegrityError(f"{group.slots['places'].key} holds positions that are no whole numbers, or below zero")
    return {"weight": Elements(tensors["values"], places, up, down, scale_of(group), float(sparsity))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Elements() as weight, **others} if not others:
            return weight.tensors(), {"scale": weight.scale, "sparsity": weight.sparsity}
        case {"weight": Ranked() as weight, **others} if not others:
            said: dict[str, JSON] = {"scale": weight.scale, "sparsity": weight.sparsity, "largest": weight.largest}
            return weight.tensors(), said
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "r": USED,
        "lora_alpha": USED,
        "sparsity": USED,
        "lora_dropout": INERT,
        # how positions are chosen, where they are not in the file
        "select_top": USED,
        "save_precomputed_indices": USED,
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Scale and sparsity.

    Raises:
        IntegrityError: config and tensors contradict each other, or one of two factors is missing.
    """
    down, sparsity = slots.get("down"), number(config, "sparsity", 0.99)
    if (down is None) != ("up" not in slots):
        raise IntegrityError(f"{module}: the file has one of two factors")
    stated = integer(config, "r", 0)
    if stated != (0 if down is None else down.shape[0]):
        found = "there are no factors" if down is None else f"{down.key} has rank {down.shape[0]}"
        raise IntegrityError(f"{module}: r says rank {stated or None}, and {found}")
    scale = 1.0 if down is None else number(config, "lora_alpha", 2.0 * stated) / stated
    if "places" in slots:
        return {"scale": scale, "sparsity": sparsity}
    if switch(config, "save_precomputed_indices", True):
        raise IntegrityError(f"{module}: save_precomputed_indices is true, and the file has no supertuning_indices")
    return {"scale": scale, "sparsity": sparsity, "largest": switch(config, "select_top", True)}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The inverse of ``options``.

    Raises:
        CannotCarry: modules differ in what PEFT keeps once, or no alpha gives the scale exactly.
    """

    def rank_of(group: Group) -> int | None:
        return group.slots["down"].shape[0] if "down" in group.slots else None

    rank, alpha = one_for_all(groups, "r", rank_of), None
    if isinstance(rank, int):
        scale = one_for_all(groups, "lora_alpha", lambda group: group.options["scale"])
        near = (alpha_for(scale, None, float(rank), whole=whole) for whole in (True, False))
        alpha = next((each for each in near if each is not None), None)
        if alpha is None:
            raise CannotCarry(f"no lora_alpha over rank {rank} gives the scale {scale!r} exactly")
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "sparsity": one_for_all(groups, "sparsity", lambda group: group.options["sparsity"]),
        "select_top": one_for_all(groups, "select_top", lambda group: group.options.get("largest", True)),
        "save_precomputed_indices": one_for_all(
            groups, "save_precomputed_indices", lambda group: "places" in group.slots
        ),
        "init_weights": True,
    }


SUPERTUNING = Kind(
    name="supertuning",
    title="SuperTuning",
    source="https://arxiv.org/abs/2607.09287",
    slots=(
        Slot(name="values", dims="n"),
        Slot(name="places", dims="n", optional=True, holds="integers"),
        Slot(name="up", dims="out r", optional=True),
        Slot(name="down", dims="r in", optional=True),
    ),
    deltas=(Elements, Ranked),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="SUPERTUNING",
            leaves=(
                Leaf(slot="values", suffix="supertuning_values"),
                Leaf(slot="places", suffix="supertuning_indices"),
                Leaf(slot="up", suffix="supertuning_lora_B.weight"),
                Leaf(slot="down", suffix="supertuning_lora_A.weight"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in SuperTuning."""
    return [SUPERTUNING]
