"""BOFT on the outputs: a product of block rotations with the outputs shuffled between them, as LyCORIS has it.

https://arxiv.org/abs/2311.06243
Stage ``i`` exchanges the two axes of every stretch of ``2**i * b`` outputs seen as two halves, turns neighbours by
blocks ``(I + Q)(I - Q)^-1``, and shuffles back; ``rescale`` follows the last stage.  PEFT's BOFT turns the inputs, the
other way round and with another shuffle, and is another kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta
from lorahub.deltas.fit import expect_matrix
from lorahub.deltas.kind import JSON, Group, Kind, Slot, Touch
from lorahub.deltas.output_turns import OutputRotation, constraint_of, demand_factors, dissolved, spread
from lorahub.deltas.rotation import cayley
from lorahub.errors import BaseMismatch, IntegrityError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["LYCORIS_BOFT", "OutputButterfly"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class OutputButterfly(OutputRotation):
    """Several turns of the outputs; ``blocks`` are ``[stages, n, b, b]``, ``b`` even."""

    kind: ClassVar[str] = "lycoris-boft"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """Stage after stage on flattened trailing axes, and then ``rescale``.

        Raises:
            BaseMismatch: the blocks do not add up to the weight's outputs.
        """
        flat = self.flat(weight)
        stages, n, b, _ = self.blocks.shape
        turns = cayley(-self.skewed(weight).flatten(0, 1)).reshape(stages, n, b, b)
        moved = flat
        for stage in range(stages):
            order = halves(n * b, b, stage, weight.device)
            parts = moved[order].reshape(n, b, -1)
            moved = moved.index_add(0, order, torch.bmm(turns[stage], parts).reshape(flat.shape))
        return self.changed(weight, moved - flat)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """All stages of zeros, in blocks of two.

        Raises:
            BaseMismatch: ``shape`` is no weight, or has an odd number of outputs.
        """
        return cls(torch.zeros(blocks_shape(shape), device=generator.device))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal blocks; with factors and a bound at random.

        Raises:
            BaseMismatch: ``shape`` is no weight, or has an odd number of outputs.
        """
        blocks = torch.randn(blocks_shape(shape), generator=generator, device=generator.device) * 0.4
        return cls(*spread(shape, generator, blocks))


def blocks_shape(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """``[stages, n, 2, 2]`` for a weight of ``shape``: as many stages, up to three, as can be shuffled."""
    out, _, _ = expect_matrix("lycoris-boft", shape)
    if out % 2:
        raise BaseMismatch(f"blocks of two do not add up to {out} outputs")
    n = out // 2
    return next(count for count in (3, 2, 1) if n % 2 ** (count - 1) == 0), n, 2, 2


def halves(outputs: int, b: int, stage: int, device: torch.device) -> torch.Tensor:
    """Which outputs stand side by side in a stage: of every ``2**stage * b``, one of each half in turn."""
    return torch.arange(outputs, device=device).reshape(-1, 2, 2**stage * b // 2).transpose(1, 2).reshape(-1)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight.

    Raises:
        IntegrityError: the tensor cannot be the blocks of a butterfly.
        ShapeMisfit: ``rescale`` is not a factor for each output.
    """
    blocks = group.slots["blocks"]
    stages, n, b, _ = blocks.shape
    if not stages or b % 2 or n % 2 ** (stages - 1):
        raise IntegrityError(f"{blocks.key} {list(blocks.shape)}: {n} blocks of {b} cannot be shuffled {stages} times")
    demand_factors(group, n * b)
    slots = tuple(name for name in ("blocks", "rescale") if name in group.slots)
    return (Touch(parameter="weight", dims=f"{n * b} in *k", slots=slots, additive=False, local=False),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": OutputButterfly(tensors["blocks"], tensors.get("rescale"), constraint_of(group))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": OutputButterfly() as turn, **others}:
            return dissolved(turn, others)
    return None


LYCORIS_BOFT = Kind(
    name="lycoris-boft",
    title="BOFT on the outputs",
    source="https://arxiv.org/abs/2311.06243",
    slots=(Slot(name="blocks", dims="stages n b b"), Slot(name="rescale", dims="*factors", optional=True)),
    deltas=(OutputButterfly,),
    touches=touches,
    build=build,
    dissolve=dissolve,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in BOFT on the outputs."""
    return [LYCORIS_BOFT]
