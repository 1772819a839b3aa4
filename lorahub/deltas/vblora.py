"""VB-LoRA: low-rank factors put together from a bank of vectors (https://arxiv.org/abs/2405.15179).

Each factor is cut into pieces of the bank's vector length, and each piece is a mean of k vectors of the bank, weighted
by the softmax of its k largest logits.  Files hold all logits, or (PEFT's ``save_only_topk_weights``) the k positions
and all weights but the last, which is what is left to one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.cut import Cuts, cut, positions, then
from lorahub.deltas.delta import Delta, Index, LowRank
from lorahub.deltas.fit import expect_shape
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED, one_for_all, stated_rank
from lorahub.deltas.peft_values import PLACES, integer, switch
from lorahub.errors import BaseMismatch, IntegrityError, UnsupportedKind
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["VBLORA", "Banked", "Chosen"]


def factors(
    down: tuple[torch.Tensor, torch.Tensor], up: tuple[torch.Tensor, torch.Tensor], bank: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``up`` ``[out, r]`` and ``down`` ``[r, in]`` in the bank's dtype, each from (weights, positions in the bank)."""
    pieces = [(weights[..., None] * bank[places]).sum(-2) for weights, places in (up, down)]
    return pieces[0].transpose(1, 2).flatten(0, 1), pieces[1].flatten(1)


def shape_of(tiles: tuple[int, int], bank: torch.Tensor, rows: Cuts, cols: Cuts) -> tuple[int, int]:
    """``[out, in]`` from the numbers of pieces, after the cuts."""
    out, inputs = (
        len(positions(count * bank.shape[1], cuts, torch.device("cpu"))) if cuts else count * bank.shape[1]
        for count, cuts in zip(tiles, (rows, cols), strict=True)
    )
    return out, inputs


@final
@dataclass(frozen=True, slots=True, eq=False)
class Banked(Delta):
    """``up @ down`` from logits.

    Attributes:
        down: ``[r, in / length, vectors]`` logits; PEFT's ``vblora_logits_A``.
        up: ``[out / length, r, vectors]`` logits; PEFT's ``vblora_logits_B``.
        bank: ``[vectors, length]``.
        topk: how many vectors make a piece.
        rows, cols: cuts still to be made; see ``cut``.
    """

    down: torch.Tensor
    up: torch.Tensor
    bank: torch.Tensor
    topk: int
    rows: Cuts = ()
    cols: Cuts = ()

    kind: ClassVar[str] = "vblora"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The largest logits are found as stored; everything after that is in the weight's dtype."""
        expect_shape(self, weight)
        up, down = self._factors(weight)
        return up @ down

    def _factors(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        down, up = (self._choice(logits, like) for logits in (self.down, self.up))
        left, right = factors(down, up, self.bank.to(like))
        return cut(left, self.rows, 0), cut(right, self.cols, 1)

    def _choice(self, logits: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        largest, places = logits.to(like.device).topk(self.topk, dim=-1)
        return largest.to(like).softmax(-1), places

    def region(self, rows: Index, cols: Index) -> Self:
        """Rows of ``up``, columns of ``down``, once they are put together."""
        return replace(self, rows=then(self.rows, rows), cols=then(self.cols, cols))

    def low_rank(self) -> LowRank:
        """The factors, put together in float64."""
        return LowRank(*self._factors(self.bank.double()), 1.0)

    def shape(self) -> tuple[int, ...]:
        """``[out, in]``."""
        return shape_of((self.up.shape[0], self.down.shape[1]), self.bank, self.rows, self.cols)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Refused: see ``no_start``."""
        raise no_start(shape)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal logits, two vectors of five for every piece.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        length, device = piece_of(shape), generator.device
        down = torch.randn(r, shape[1] // length, 5, generator=generator, device=device)
        up = torch.randn(shape[0] // length, r, 5, generator=generator, device=device)
        return cls(down, up, torch.randn(5, length, generator=generator, device=device), 2)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Chosen(Delta):
    """``up @ down`` from the chosen vectors and their weights.

    Attributes:
        down_places: ``[r, in / length, k]`` whole numbers.
        down_weights: ``[r, in / length, k - 1]``; the last is what is left to one.
        up_places: ``[out / length, r, k]``.
        up_weights: ``[out / length, r, k - 1]``.
        bank: ``[vectors, length]``.
        rows, cols: cuts still to be made; see ``cut``.
    """

    down_places: torch.Tensor
    down_weights: torch.Tensor
    up_places: torch.Tensor
    up_weights: torch.Tensor
    bank: torch.Tensor
    rows: Cuts = ()
    cols: Cuts = ()

    kind: ClassVar[str] = "vblora"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """All in the weight's dtype."""
        expect_shape(self, weight)
        up, down = self._factors(weight)
        return up @ down

    def _factors(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        down, up = (
            (
                torch.cat([weights.to(like), 1 - weights.to(like).sum(-1, keepdim=True)], -1),
                places.to(like.device).long(),
            )
            for weights, places in ((self.down_weights, self.down_places), (self.up_weights, self.up_places))
        )
        left, right = factors(down, up, self.bank.to(like))
        return cut(left, self.rows, 0), cut(right, self.cols, 1)

    def region(self, rows: Index, cols: Index) -> Self:
        """Rows of ``up``, columns of ``down``, once they are put together."""
        return replace(self, rows=then(self.rows, rows), cols=then(self.cols, cols))

    def low_rank(self) -> LowRank:
        """The factors, put together in float64."""
        return LowRank(*self._factors(self.bank.double()), 1.0)

    def shape(self) -> tuple[int, ...]:
        """``[out, in]``."""
        return shape_of((self.up_places.shape[0], self.down_places.shape[1]), self.bank, self.rows, self.cols)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Refused: see ``no_start``."""
        raise no_start(shape)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """What is kept of ``Banked``'s example.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        full = Banked.example(shape, r=r, generator=generator)
        down, up = (logits.topk(full.topk, dim=-1) for logits in (full.down, full.up))
        down_weights, up_weights = (chosen.values.softmax(-1)[..., :-1].contiguous() for chosen in (down, up))
        return cls(down.indices.to(torch.uint8), down_weights, up.indices.to(torch.uint8), up_weights, full.bank)


def no_start(shape: tuple[int, ...]) -> UnsupportedKind:
    """Why there is no fresh delta: only a bank of zeros changes nothing, and from that no training leads away."""
    return UnsupportedKind(
        f"no vblora delta for {list(shape)} changes nothing and can be trained: both its factors come from one bank",
        "Train a 'lora' delta, which starts from zero.",
    )


def piece_of(shape: tuple[int, ...]) -> int:
    """The shortest length above one into which both axes of a matrix can be cut, or one.

    Raises:
        BaseMismatch: ``shape`` is no matrix.
    """
    if len(shape) != 2:
        raise BaseMismatch(f"a vblora delta changes matrices [out, in], not {list(shape)}")
    common = math.gcd(*shape)
    return next((size for size in range(2, common + 1) if common % size == 0), 1)


LOGITS, CHOICES = ("down", "up"), ("down_places", "down_weights", "up_places", "up_weights")


def count(group: Group, option: str) -> int:
    """A whole number among the group's options."""
    value = group.options[option]
    assert isinstance(value, int)
    return value


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight; its sizes are numbers here, for no pattern says a multiple of the bank's length."""
    own = LOGITS if "down" in group.slots else CHOICES
    up, down = (group.slots[name] for name in ((LOGITS[1], LOGITS[0]) if own is LOGITS else (CHOICES[2], CHOICES[0])))
    length = count(group, "length")
    dims = f"{up.shape[0] * length} {down.shape[1] * length}"
    return (Touch(parameter="weight", dims=dims, slots=(*own, "bank"), additive=True, rank=down.shape[0]),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta from whichever form the file has.

    Raises:
        IntegrityError: the bank has vectors of another length than the config says, or lacks some that are chosen.
    """
    bank = tensors["bank"]
    if bank.dim() != 2 or bank.shape[1] != count(group, "length"):
        raise IntegrityError(
            f"{group.module}: the shared bank is {list(bank.shape)}, and vector_length is {count(group, 'length')}"
        )
    if "down" in tensors:
        if bank.shape[0] != tensors["down"].shape[-1]:
            raise IntegrityError(
                f"{group.module}: {group.slots['down'].key} chooses among {tensors['down'].shape[-1]} vectors, and the "
                f"shared bank has {bank.shape[0]}"
            )
        return {"weight": Banked(tensors["down"], tensors["up"], bank, count(group, "topk"))}
    down_places, down_weights, up_places, up_weights = (tensors[name] for name in CHOICES)
    for name in ("down_places", "up_places"):
        places, long = tensors[name], tensors[name].long()
        if bool((places != long).any() | (long < 0).any() | (long >= bank.shape[0]).any()):
            raise IntegrityError(f"{group.slots[name].key} names vectors that the shared bank of {len(bank)} lacks")
    return {"weight": Chosen(down_places, down_weights, up_places, up_weights, bank)}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``; a cut through pieces has no word in any file."""
    match dict(deltas):
        case {"weight": Banked(rows=(), cols=()) as weight, **others} if not others:
            topk, rank = weight.topk, weight.down.shape[0]
        case {"weight": Chosen(rows=(), cols=()) as weight, **others} if not others:
            topk, rank = weight.down_places.shape[-1], weight.down_places.shape[0]
        case _:
            return None
    return weight.tensors(), {"topk": topk, "length": weight.bank.shape[1], "rank": rank}


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "r": USED,
        "topk": USED,
        "vector_length": USED,
        "num_vectors": USED,
        "save_only_topk_weights": USED,
        "vblora_dropout": INERT,
        "init_vector_bank_bound": INERT,
        "init_logits_std": INERT,
        # how the base stores its weights: the layer type decides, and PEFT overrides the flag by it
        "fan_in_fan_out": INERT,
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """The vectors' length and how many make a piece.

    Raises:
        IntegrityError: config and tensors contradict each other, or part of the tensors is missing.
    """
    if slots.keys() - {"bank"} not in ({*LOGITS}, {*CHOICES}):
        raise IntegrityError(f"{module}: {', '.join(ref.key for ref in slots.values())} are not all of its tensors")
    kept = "down_places" in slots
    if kept != switch(config, "save_only_topk_weights", False):
        has = "chosen vectors" if kept else "logits"
        raise IntegrityError(f"{module}: save_only_topk_weights is {str(not kept).lower()}, and the file has {has}")
    topk, length = integer(config, "topk", 2), integer(config, "vector_length", 256)
    if length < 1:
        raise IntegrityError(f"vector_length is {length}")
    down = slots["down_places" if kept else "down"]
    rank = stated_rank(config, module, down.shape[0], down.key, patterns="")
    if not kept:
        vectors = integer(config, "num_vectors", 256)
        if down.shape[-1] != vectors:
            raise IntegrityError(f"{module}: num_vectors is {vectors}, and {down.key} has {down.shape[-1]} logits")
    _expect_choices(slots, topk, kept=kept, most=down.shape[-1])
    return {"topk": topk, "length": length, "rank": rank}


def _expect_choices(slots: Mapping[str, TensorRef], topk: int, *, kept: bool, most: int) -> None:
    if topk < 1 or topk > most or (kept and topk != most):
        raise IntegrityError(f"topk is {topk}, and {'as many as' if kept else 'at most'} {most} are there")
    for name in ("down", "up") if kept else ():
        places, weights = (slots[f"{name}_{what}"] for what in ("places", "weights"))
        if weights.shape != (*places.shape[:-1], topk - 1):
            raise IntegrityError(f"{weights.key} {list(weights.shape)} does not fit {places.key} {list(places.shape)}")


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The inverse of ``options``.

    Raises:
        CannotCarry: modules differ in what PEFT keeps once.
    """
    return {
        "r": one_for_all(groups, "r", lambda group: group.options["rank"]),
        "topk": one_for_all(groups, "topk", lambda group: group.options["topk"]),
        "vector_length": one_for_all(groups, "vector_length", lambda group: group.options["length"]),
        "num_vectors": one_for_all(groups, "num_vectors", lambda group: group.slots["bank"].shape[0]),
        "save_only_topk_weights": one_for_all(
            groups, "save_only_topk_weights", lambda group: "down_places" in group.slots
        ),
        "vblora_dropout": 0.0,
    }


VBLORA = Kind(
    name="vblora",
    title="VB-LoRA",
    source="https://arxiv.org/abs/2405.15179",
    # logits, or choices: ``options`` sees to it that one of the two is whole
    slots=(
        Slot(name="down", dims="r across vectors", optional=True),
        Slot(name="up", dims="along r vectors", optional=True),
        Slot(name="down_places", dims="r across k", optional=True, holds="integers"),
        Slot(name="down_weights", dims="r across others", optional=True, prunable=True),
        Slot(name="up_places", dims="along r k", optional=True, holds="integers"),
        Slot(name="up_weights", dims="along r others", optional=True, prunable=True),
        Slot(name="bank", dims="n length", shared=True),
    ),
    deltas=(Banked, Chosen),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="VBLORA",
            leaves=(
                Leaf(slot="down", suffix="vblora_logits_A"),
                Leaf(slot="up", suffix="vblora_logits_B"),
                Leaf(slot="down_places", suffix="vblora_logits_A_topk_indices"),
                Leaf(slot="down_weights", suffix="vblora_logits_A_topk_weights"),
                Leaf(slot="up_places", suffix="vblora_logits_B_topk_indices"),
                Leaf(slot="up_weights", suffix="vblora_logits_B_topk_weights"),
                Leaf(slot="bank", suffix="vblora_vector_bank"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in VB-LoRA."""
    return [VBLORA]
