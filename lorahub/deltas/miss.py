"""MiSS: one small matrix, repeated over the whole weight.  Its first name was Bone.

https://arxiv.org/abs/2409.15371
Balanced: a block ``[r, out]``, transposed and repeated along the inputs.  Mini: ``[r, m]``, repeated along the outputs
as well.  Bat: a block ``[r, r]`` for every r rows, by which each ``[r, r]`` piece of the weight is multiplied before
the block is added.  Balanced and mini blocks look alike; PEFT's ``init_weights`` tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.cut import Cuts, counts_from_the_end, endless, positions, then
from lorahub.deltas.delta import Delta, Index
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED, chosen, one_for_all
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError, NotLocal
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

    from lorahub.bases.site import Site

__all__ = ["MISS", "Bat", "MiSS"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class MiSS(Delta):
    """``change[o, i] = block[i % r, o % m]``.

    Attributes:
        block: ``[r, m]``; m is the number of outputs, unless it is
        mini: then m divides it.
        rows, cols: cuts still to be made; see ``cut``.
    """

    block: torch.Tensor
    mini: bool = False
    rows: Cuts = ()
    cols: Cuts = ()

    kind: ClassVar[str] = "miss"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The weight gives shape, dtype and device only.

        Raises:
            BaseMismatch: it has another number of rows, or is no matrix.
        """
        r, m = self.block.shape
        fits = weight.dim() == 2 and (self.rows or weight.shape[0] == m or (self.mini and weight.shape[0] % m == 0))
        if not fits:
            raise BaseMismatch(f"a miss block [{r}, {m}] was given a weight {list(weight.shape)}")
        rows, cols = (
            endless(cuts, size, weight.device) for cuts, size in zip((self.rows, self.cols), weight.shape, strict=True)
        )
        return self.block.to(weight).T[rows % m][:, cols % r]

    def contribution(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor | None:
        """To a linear layer: inputs that meet the same row of the block are summed first."""
        if site.op != "linear" or self.rows or self.cols:
            return None
        r, m = self.block.shape
        pieces = torch.unflatten(torch.nn.functional.pad(x.to(y.dtype), (0, -x.shape[-1] % r)), -1, (-1, r))
        outputs = pieces.sum(-2) @ self.block.to(y)
        return outputs.repeat(*(1 for _ in y.shape[1:]), y.shape[-1] // m)

    def region(self, rows: Index, cols: Index) -> Self:
        """Any rows and columns that do not count from the end, which the block does not know.

        Raises:
            NotLocal: they do.
        """
        if counts_from_the_end(rows) or counts_from_the_end(cols):
            raise NotLocal("a miss delta does not know the size of its weight, to count from the end of it")
        return replace(self, rows=then(self.rows, rows), cols=then(self.cols, cols))

    def shape(self) -> None:
        """None: nothing says how many inputs there are."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """A balanced block of zeros.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        out, _ = _matrix(shape)
        return cls(torch.zeros(r, out, device=generator.device))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """A normal block, balanced or mini.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        out, _ = _matrix(shape)
        mini = bool(torch.randint(2, (), generator=generator, device=generator.device))
        m = next(size for size in range(2, out + 1) if out % size == 0) if mini else out
        return cls(torch.randn(r, m, generator=generator, device=generator.device), mini)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Bat(Delta):
    """``change = W_ji @ block_j + block_j`` for every piece ``[r, r]`` of the weight, j along rows and i along columns.

    Attributes:
        block: ``[out / r, r, r]``.
        rows: cuts still to be made; see ``cut``.
    """

    block: torch.Tensor
    rows: Cuts = ()

    kind: ClassVar[str] = "miss"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """Row by row: a row meets the block of its piece, and gets that block's own row added.

        Raises:
            BaseMismatch: the weight has another number of rows, or its columns cannot be cut into pieces.
        """
        count, r, _ = self.block.shape
        rows = positions(count * r, self.rows, weight.device)
        if weight.dim() != 2 or weight.shape[0] != len(rows) or weight.shape[1] % r:
            raise BaseMismatch(f"a bat block {list(self.block.shape)} was given a weight {list(weight.shape)}")
        pieces, block = weight.reshape(len(rows), -1, r), self.block.to(weight)
        change = torch.empty_like(pieces, memory_format=torch.contiguous_format)
        for j in sorted(set((rows // r).tolist())):
            mine = rows // r == j
            change[mine] = pieces[mine] @ block[j] + block[j][rows[mine] % r][:, None]
        return change.reshape(weight.shape)

    def region(self, rows: Index, cols: Index) -> Self:
        """Any rows; whole pieces of columns, which are all treated alike.

        Raises:
            NotLocal: the cut goes through a piece.
        """
        r = self.block.shape[1]
        whole = isinstance(cols, slice) and cols.step in (None, 1) and not counts_from_the_end(cols)
        if not isinstance(cols, slice) or not whole or (cols.start or 0) % r or (cols.stop or 0) % r:
            raise NotLocal("a bat delta mixes the columns of a piece; it cannot be cut through one")
        return replace(self, rows=then(self.rows, rows))

    def shape(self) -> None:
        """None: nothing says how many inputs there are."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Blocks of zeros, of the largest size up to r that divides both sides.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        out, width = _matrix(shape)
        size = next(each for each in range(r, 0, -1) if math.gcd(out, width) % each == 0)
        return cls(torch.zeros(out // size, size, size, device=generator.device))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal blocks.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        zeros = cls.fresh(shape, r=r, generator=generator).block
        return cls(torch.randn(zeros.shape, generator=generator, device=generator.device))


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise BaseMismatch(f"a miss delta changes matrices [out, in], not {list(shape)}")
    return shape[0], shape[1]


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight: how many rows it has or what divides them, and for bat what divides its columns."""
    shape = group.slots["block"].shape
    dims, rank = {
        "balanced": (f"{shape[-1]} in", shape[0]),
        "mini": (f"%{shape[-1]} in", shape[0]),
        "bat": (f"{shape[0] * shape[-1]} %{shape[-1]}", shape[-1]),
    }[_variant(group)]
    additive = _variant(group) != "bat"
    return (Touch(parameter="weight", dims=dims, slots=("block",), additive=additive, rank=rank),)


def _variant(group: Group) -> str:
    return str(group.options["variant"])


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    block, variant = tensors["block"], _variant(group)
    return {"weight": Bat(block) if variant == "bat" else MiSS(block, variant == "mini")}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``; a delta that was cut is no adapter's own any more."""
    match dict(deltas):
        case {"weight": MiSS(block=block, mini=mini, rows=(), cols=()), **others} if not others:
            return {"block": block}, {"variant": "mini" if mini else "balanced"}
        case {"weight": Bat(block=block, rows=()), **others} if not others:
            return {"block": block}, {"variant": "bat"}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType({"r": USED, "init_weights": USED, "mini_r": USED, "miss_dropout": INERT})


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Which of the three formulas, and the rank.

    Raises:
        IntegrityError: ``init_weights`` names none, or the block has another shape than the config says.
    """
    block, named = slots["block"], config.get("init_weights", True)
    variant = named if isinstance(named, str) else "balanced"
    if variant not in ("balanced", "bat", "mini") or not isinstance(named, bool | str | None):
        raise IntegrityError(f"init_weights should be true, false, 'bat' or 'mini', not {named!r}")
    axes = 3 if variant == "bat" else 2
    square = variant != "bat" or block.shape[-2:-1] == block.shape[-1:]
    if len(block.shape) != axes or not square or 0 in block.shape:
        raise IntegrityError(
            f"{module}: init_weights is {named!r}, and {block.key} {list(block.shape)} is no such block"
        )
    sizes = {"r": block.shape[-1] if variant == "bat" else block.shape[0]}
    if variant == "mini":
        sizes["mini_r"] = block.shape[1]
    for field, size in sizes.items():
        stated, _ = chosen(config, "", field, module)
        if stated is not None and stated != size:
            raise IntegrityError(f"{module}: {field} is {stated}, and {block.key} is {list(block.shape)}")
    return {"variant": variant, "rank": sizes["r"]}


def bone_options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """As ``options``, for a config of Bone, which had no mini.

    Raises:
        IntegrityError: as ``options``.
    """
    if config.get("init_weights") == "mini":
        raise IntegrityError("init_weights is 'mini', which is a form of MiSS and none of Bone")
    return options(config, module, slots)


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The fields under which reading ``groups`` again takes the same formula.

    Raises:
        CannotCarry: formulas, ranks or ``mini_r`` differ.
    """
    if not groups:
        return {}
    variant = one_for_all(groups, "init_weights", _variant)
    last = -1 if variant == "bat" else 0
    rank = one_for_all(groups, "r", lambda group: group.slots["block"].shape[last])
    mini = one_for_all(groups, "mini_r", lambda group: group.slots["block"].shape[1]) if variant == "mini" else 1
    return {"init_weights": True if variant == "balanced" else variant, "r": rank, "mini_r": mini, "miss_dropout": 0.0}


def bone_config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """As ``config``.

    Raises:
        CannotCarry: as ``config``, or a form that Bone does not have.
    """
    if any(_variant(group) == "mini" for group in groups.values()):
        raise CannotCarry("Bone has no mini blocks")
    return {name: value for name, value in config(groups).items() if name in ("r", "init_weights")}


MISS = Kind(
    name="miss",
    title="MiSS",
    source="https://arxiv.org/abs/2409.15371",
    # [r, out], [r, m] or [out / r, r, r]: the options say which, see ``touches``
    slots=(Slot(name="block", dims="*block"),),
    deltas=(MiSS, Bat),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="MISS",
            leaves=(Leaf(slot="block", suffix="miss_block"),),
            fields=FIELDS,
            options=options,
            config=config,
        ),
        # what earlier PEFT wrote and 0.21 does not read any more; the formulas are the same
        Spelling(
            format="peft",
            tag="BONE",
            leaves=(Leaf(slot="block", suffix="bone_block"),),
            fields=MappingProxyType({"r": USED, "init_weights": USED}),
            options=bone_options,
            config=bone_config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in MiSS."""
    return [MISS]
