"""BOFT: the inputs of a layer turned by a product of block rotations, with the inputs shuffled between them.

https://arxiv.org/abs/2311.06243
``W' = (W_2d @ M^T) * s`` with ``M = M_n ... M_1``, ``M_i = P_i B_i P_i^T``: ``B_i`` block-diagonal, each block the
exact Cayley transform of half the difference of a stored matrix and its transpose; ``P_i`` the butterfly permutation
that doubles its reach with every factor.  The first one is the identity, so one factor is plain OFT.  PEFT 0.21.2
computes several factors only where its CUDA extension builds, and elsewhere makes modules with one and says so in a
warning; a file's tensors say how many there are, and here all of them count everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index, take
from lorahub.deltas.fit import expect_matrix
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED, one_for_all
from lorahub.deltas.peft_values import PLACES
from lorahub.deltas.rotation import all_columns, blockwise, cayley, number_of_blocks
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["BOFT", "Butterfly"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Butterfly(Delta):
    """``(W @ M^T) * scale`` in place of ``W``.

    Attributes:
        blocks: ``[factors, n, b, b]``, any matrices.
        scale: one factor for each output, ``[out, 1]``, or ``[1, out]`` beside convolutions.
    """

    blocks: torch.Tensor
    scale: torch.Tensor

    kind: ClassVar[str] = "boft"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """One factor after the other, on flattened trailing axes.

        Raises:
            BaseMismatch: the blocks do not add up to the weight's inputs, or there is another number of outputs.
        """
        factors, n, b, _ = self.blocks.shape
        out, _, features = expect_matrix(self.kind, tuple(weight.shape))
        if out != self.scale.numel() or features != n * b:
            raise BaseMismatch(
                f"a boft delta for {self.scale.numel()} outputs and {n * b} inputs was given a weight "
                f"{list(weight.shape)}"
            )
        blocks = self.blocks.to(weight)
        turns = cayley((0.5 * (blocks - blocks.transpose(2, 3))).flatten(0, 1)).reshape(blocks.shape)
        flat = weight.flatten(1)
        moved = flat
        for factor in range(factors):
            order = butterfly(n * b, b, factor, weight.device)
            mixed = blockwise(moved[:, order.argsort()], turns[factor].transpose(1, 2))
            moved = moved + mixed[:, order]
        gain = self.scale.reshape(-1, 1).to(weight)
        return (moved * gain - flat).reshape(weight.shape)

    def region(self, rows: Index, cols: Index) -> Self:
        """Any rows.

        Raises:
            NotLocal: the columns are cut.
        """
        all_columns(self.kind, cols)
        return replace(self, scale=take(self.scale, rows, 0 if self.scale.shape[1] == 1 else 1))

    def shape(self) -> None:
        """None: the blocks say how many inputs there are, not how they fall into channels and kernel."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """One factor of zeros in ``r`` blocks, or as many fewer as the inputs fall into, and scales of one.

        Raises:
            BaseMismatch: ``shape`` is no weight, or has a single input.
        """
        out, _, features = expect_matrix("boft", shape)
        n = number_of_blocks(features, r)
        blocks = torch.zeros(1, n, features // n, features // n, device=generator.device)
        return cls(blocks, torch.ones(scale_shape(shape, out), device=generator.device))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal blocks of two inputs in as many factors, up to three, as can be shuffled; scales from 0.5 to 2.

        Raises:
            BaseMismatch: ``shape`` is no weight, or has an odd number of inputs.
        """
        out, _, features = expect_matrix("boft", shape)
        if features % 2:
            raise BaseMismatch(f"blocks of two do not add up to {features} inputs")
        n = features // 2
        factors = next(count for count in (3, 2, 1) if n % 2 ** (count - 1) == 0)
        blocks = torch.randn(factors, n, 2, 2, generator=generator, device=generator.device)
        gain = torch.rand(scale_shape(shape, out), generator=generator, device=generator.device) * 1.5 + 0.5
        return cls(blocks, gain)


def scale_shape(shape: tuple[int, ...], out: int) -> tuple[int, int]:
    """As PEFT stores it beside a weight of ``shape``."""
    return (out, 1) if len(shape) == 2 else (1, out)


def butterfly(features: int, b: int, factor: int, device: torch.device) -> torch.Tensor:
    """Where each input of factor number ``factor`` is taken from.

    Within every stretch of ``b * 2**factor`` inputs, cut into pieces of ``b / 2``, the pieces with even numbers come
    first.  For the first factor that is the identity, whatever ``b``.
    """
    order = torch.arange(features, device=device)
    if not factor:
        return order
    pieces = order.reshape(-1, 2 * 2**factor, b // 2)
    return torch.cat([pieces[:, 0::2], pieces[:, 1::2]], dim=1).reshape(-1)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight.

    Raises:
        IntegrityError: the tensors cannot be blocks and scales of a butterfly.
    """
    blocks, scale = group.slots["blocks"], group.slots["scale"]
    factors, n, b, _ = blocks.shape
    if factors > 1 and (b % 2 or n % 2 ** (factors - 1)):
        raise IntegrityError(f"{blocks.key} {list(blocks.shape)}: {n} blocks of {b} cannot be shuffled {factors} times")
    if 1 not in scale.shape:
        raise IntegrityError(f"{scale.key} {list(scale.shape)} is no row or column of scales")
    dims = f"{max(scale.shape)} *{n * b}"
    return (Touch(parameter="weight", dims=dims, slots=("blocks", "scale"), additive=False),)


def build(_group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": Butterfly(tensors["blocks"], tensors["scale"])}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Butterfly(blocks=blocks, scale=scale), **others} if not others:
            return {"blocks": blocks, "scale": scale}, {}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        # the shape of the tensor says these; PEFT without its CUDA extension trains one factor whatever they say
        "boft_block_size": USED,
        "boft_block_num": USED,
        "boft_n_butterfly_factor": INERT,
        "boft_dropout": INERT,
        "fan_in_fan_out": INERT,  # PEFT adapts no layer that stores [in, out]
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """None: the tensors say everything, and a stated size or number of blocks must agree with them.

    Raises:
        IntegrityError: the config states another size or number of blocks.
    """
    blocks = slots["blocks"]
    for field, found in (("boft_block_num", blocks.shape[1]), ("boft_block_size", blocks.shape[2])):
        if config.get(field) not in (None, 0, found):
            raise IntegrityError(f"{module}: {field} is {config[field]!r}, and {blocks.key} is {list(blocks.shape)}")
    return {}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The fields under which PEFT makes modules of these shapes.

    Raises:
        CannotCarry: modules differ in the number of factors, or in both size and number of blocks.
    """
    factors = one_for_all(groups, "boft_n_butterfly_factor", lambda group: group.slots["blocks"].shape[0])
    shapes = {group.slots["blocks"].shape for group in groups.values()}
    numbers, sizes = ({shape[axis] for shape in shapes} for axis in (1, 2))
    if len(sizes) > 1 and len(numbers) > 1:
        found = ", ".join(f"{shape[1]} blocks of {shape[2]}" for shape in sorted(shapes))
        raise CannotCarry(f"PEFT has one boft_block_size or boft_block_num for all modules, not {found}")
    alike = len(sizes) == 1
    return {
        "boft_block_size": max(sizes) if alike else 0,
        "boft_block_num": 0 if alike else max(numbers),
        "boft_n_butterfly_factor": factors,
        "boft_dropout": 0.0,
        "init_weights": True,
    }


BOFT = Kind(
    name="boft",
    title="BOFT",
    source="https://arxiv.org/abs/2311.06243",
    # scale: [out, 1], beside convolutions [1, out]: no one pattern says that, see ``touches``
    slots=(Slot(name="blocks", dims="factors n b b"), Slot(name="scale", dims="first second")),
    deltas=(Butterfly,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="BOFT",
            leaves=(Leaf(slot="blocks", suffix="boft_R"), Leaf(slot="scale", suffix="boft_s")),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in BOFT."""
    return [BOFT]
