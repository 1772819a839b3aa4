"""BD-LoRA: LoRA with one of its two factors block-diagonal (https://arxiv.org/abs/2510.23346).

Files hold the blocks one under the other: ``up`` ``[out, r / n]`` or ``down`` ``[r, in / n]``.  Which factor it is,
PEFT's ``use_bdlora`` says by parts of module names; a module that neither list names is plain LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas import peft_lora
from lorahub.deltas.delta import ALL, Delta, Index, LowRank, take
from lorahub.deltas.factors import example_factors, fresh_factors, product, scale_of
from lorahub.deltas.fit import expect_shape
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import USED, one_for_all
from lorahub.deltas.peft_values import integer
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch
from lorahub.shapes import ShapeMisfit

if TYPE_CHECKING:
    from typing import Self

__all__ = ["BDLORA", "BlockLoRA"]

SIDES: Mapping[str, str] = MappingProxyType({"target_modules_bd_a": "down", "target_modules_bd_b": "up"})
"""Field of ``use_bdlora`` -> the factor that is block-diagonal in the modules it names."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class BlockLoRA(Delta):
    """``scale * up @ down``.

    Attributes:
        up: ``[out, r]``, or its blocks ``[out, r / n]``.
        down: ``[r, in]``, or its blocks ``[r, in / n]``.
        scale: as in LoRA.
        side: the factor that is stored in blocks, "up" or "down", or "".
        blocks: n; 1 without a side.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float
    side: str = ""
    blocks: int = 1

    kind: ClassVar[str] = "bdlora"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """See ``product``; the weight gives shape, dtype and device only."""
        expect_shape(self, weight)
        return product(*self._whole(), self.scale, weight)

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        up, down = (
            torch.block_diag(*factor.chunk(self.blocks)) if self.side == name else factor  # type: ignore[no-untyped-call]
            for name, factor in (("up", self.up), ("down", self.down))
        )
        return up, down

    def region(self, rows: Index, cols: Index) -> Self:
        """Rows of ``up``, columns of ``down``, both without blocks."""
        if rows == ALL and cols == ALL:
            return self
        up, down = self._whole()
        return type(self)(take(up, rows, 0), take(down, cols, 1), self.scale)

    def low_rank(self) -> LowRank:
        """The factors with zeros between their blocks."""
        return LowRank(*self._whole(), self.scale)

    def shape(self) -> tuple[int, ...]:
        """``[out, in]``."""
        return self.up.shape[0], self.down.shape[1] * (self.blocks if self.side == "down" else 1)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """LoRA's start, without blocks.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        expect_two(shape)
        return cls(*fresh_factors("bdlora", shape, r, generator), 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors of rank 2 r, one of them in two blocks.

        Raises:
            BaseMismatch: ``shape`` is no matrix, or has an odd side.
        """
        expect_two(shape)
        up, down = example_factors("bdlora", shape, 2 * r, generator)
        if shape[0] % 2 or shape[1] % 2:
            raise BaseMismatch(f"two blocks do not divide {list(shape)}")
        if bool(torch.randint(2, (), generator=generator, device=generator.device)):
            return cls(up[:, :r].contiguous(), down, 0.7, "up", 2)
        return cls(up, down[:, : shape[1] // 2].contiguous(), 0.7, "down", 2)


def expect_two(shape: tuple[int, ...]) -> None:
    """Refuse what is no matrix.

    Raises:
        BaseMismatch: naming the shape.
    """
    if len(shape) != 2:
        raise BaseMismatch(f"a bdlora delta changes matrices [out, in], not {list(shape)}")


def form_of(group: Group) -> tuple[str, int]:
    """Side and number of blocks, as a format wrote them."""
    side, blocks = group.options["side"], group.options["blocks"]
    assert isinstance(side, str)
    assert isinstance(blocks, int)
    return side, blocks


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight; its sizes are numbers here, for no pattern says a multiple of the number of blocks.

    Raises:
        ShapeMisfit: the factors do not fit together, or cannot be cut into so many blocks.
    """
    side, blocks = form_of(group)
    up, down = group.slots["up"], group.slots["down"]
    times = {name: blocks if side == name else 1 for name in ("up", "down")}
    rank, stacked = down.shape[0], (up if side == "up" else down).shape[0]
    if up.shape[1] * times["up"] != rank or stacked % blocks:
        raise ShapeMisfit(
            f"{up.key} {list(up.shape)} and {down.key} {list(down.shape)} are no factors with {side or 'none'} in "
            f"{blocks} blocks"
        )
    dims = f"{up.shape[0]} {down.shape[1] * times['down']}"
    return (Touch(parameter="weight", dims=dims, slots=("up", "down"), additive=True, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": BlockLoRA(tensors["up"], tensors["down"], scale_of(group), *form_of(group))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": BlockLoRA() as weight, **others} if not others:
            said: dict[str, JSON] = {"side": weight.side, "blocks": weight.blocks}
            return weight.tensors(), {**said, "scale": weight.scale, "rank": weight.down.shape[0]}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType({**peft_lora.FIELDS, "use_bdlora": USED})


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """LoRA's scale and rank, and which factor is in how many blocks.

    Raises:
        IntegrityError: ``use_bdlora`` is malformed or names the module twice; or as for LoRA.
        UnsupportedKind: a pattern that cannot be matched safely.
    """
    about = config.get("use_bdlora")
    if not isinstance(about, Mapping):
        raise IntegrityError(f"use_bdlora should hold settings, not be {about!r}")
    blocks = integer(about, "nblocks", 1)
    sides = [side for field, side in SIDES.items() if any(part in module for part in _parts(about, field))]
    if len(sides) > 1 or blocks < 1:
        raise IntegrityError(f"{module}: use_bdlora names it for both factors, or has nblocks {blocks} below 1")
    side = sides[0] if sides else ""
    said: dict[str, JSON] = {"side": side, "blocks": blocks if side else 1}
    return {**peft_lora.lora_options(config, module, slots), **said}


def _parts(about: Mapping[str, JSON], field: str) -> list[str]:
    value = about.get(field) or []
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise IntegrityError(f"{field} of use_bdlora should list parts of module names, not be {value!r}")
    return [part for part in value if isinstance(part, str)]


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The inverse of ``options``: modules by their whole names.

    Raises:
        CannotCarry: modules differ in their number of blocks, a name is part of another's, or as for LoRA.
    """
    sided = {name: group for name, group in groups.items() if form_of(group)[0]}
    blocks = one_for_all(sided, "nblocks", lambda group: form_of(group)[1]) if sided else 1
    about: dict[str, JSON] = {"nblocks": blocks, "match_strict": len(sided) == len(groups)}
    for field, side in SIDES.items():
        named = [name for name, group in sided.items() if form_of(group)[0] == side]
        wrong = [name for name, group in groups.items() if form_of(group)[0] != side and any(n in name for n in named)]
        if wrong:
            raise CannotCarry(f"PEFT finds these among {field} by part of their names: {', '.join(sorted(wrong))}")
        about[field] = [*named]
    return {**peft_lora.config(groups), "use_bdlora": about}


BDLORA = Kind(
    name="bdlora",
    title="BD-LoRA",
    source="https://arxiv.org/abs/2510.23346",
    # ``touches`` knows which of the two ranks is r, and that they fit
    slots=(Slot(name="down", dims="rank across"), Slot(name="up", dims="out own")),
    deltas=(BlockLoRA,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="LORA",
            leaves=(Leaf(slot="down", suffix="lora_A.weight"), Leaf(slot="up", suffix="lora_B.weight")),
            fields=FIELDS,
            options=options,
            config=config,
            when=peft_lora.in_blocks,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in BD-LoRA."""
    return [BDLORA]
