"""PVeRA: VeRA whose inner vector is drawn from a trained normal distribution (https://arxiv.org/abs/2512.07703).

Merged, it is the mean of what it draws: the first half of ``mix`` and of ``down``'s rows, as in VeRA.  The second half
says how far samples scatter; it takes no part in the change and is kept for writing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas import projections
from lorahub.deltas.delta import Delta, Index, LowRank, take
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, stated_rank
from lorahub.errors import IntegrityError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

    from lorahub.bases.site import Site

__all__ = ["PVERA", "PVeRA"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class PVeRA(Delta):
    """``(gain * up[:out]) @ (mix[:r] * down[:r, :in])``.

    Attributes:
        gain: ``[out]``.
        mix: ``[2 r]``, means and then logarithms of variances.
        up: ``[>= out, r]``.
        down: ``[2 r, >= in]``.
    """

    gain: torch.Tensor
    mix: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    kind: ClassVar[str] = "pvera"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """See ``projected``; the weight gives shape, dtype and device only."""
        r = self.up.shape[1]
        return projections.projected(self.kind, self.gain, self.mix[:r], self.up, self.down[:r], weight)

    def low_rank_for(self, inputs: int) -> LowRank:
        """The means multiplied into the projections."""
        r = self.up.shape[1]
        return projections.factors(self.kind, self.gain, self.mix[:r], self.up, self.down[:r], inputs)

    def contribution(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor | None:
        """Of the mean, as merged, where PEFT may draw samples; see ``through``."""
        r = self.up.shape[1]
        return projections.through(self.gain, self.mix[:r], self.up, self.down[:r], x, y, site)

    def region(self, rows: Index, cols: Index) -> Self:
        """Rows of ``gain`` and ``up``, columns of ``down``.

        Raises:
            NotLocal: columns are counted from the end.
        """
        up = take(self.up[: self.gain.shape[0]], rows, 0)
        return type(self)(take(self.gain, rows, 0), self.mix, up, projections.columns_of(self.kind, self.down, cols))

    def shape(self) -> None:
        """None: nothing says how many of ``down``'s columns there are."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Gains of zero.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        up, down = projections.example_projections("pvera", shape, r, 2 * r, generator)
        mix = torch.full((2 * r,), 0.1, device=generator.device)
        return cls(torch.zeros(shape[0], device=generator.device), mix, up, down)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal vectors and projections.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        up, down = projections.example_projections("pvera", shape, r, 2 * r, generator)
        gain, mix = (torch.randn(size, generator=generator, device=generator.device) for size in (shape[0], 2 * r))
        return cls(gain, mix, up, down)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight."""
    rank = group.slots["mix"].shape[0] // 2
    slots = ("gain", "mix", "up", "down")
    return (Touch(parameter="weight", dims="out in", slots=slots, additive=True, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta, with the shared projections as they are, or drawn again where files lack them.

    Raises:
        IntegrityError: they do not fit the module's vectors.
    """
    gain, mix = tensors["gain"], tensors["mix"]
    rank = mix.shape[0] // 2
    if "up" in tensors and "down" in tensors:
        up, down = tensors["up"], tensors["down"]
    else:
        up, down = projections.drawn(*projections.facts(group), rank, mix.shape[0])
    projections.expect_sizes(group, gain, rank, up, down)
    return {"weight": PVeRA(gain, mix, up, down)}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": PVeRA() as weight, **others} if not others:
            return weight.tensors(), {"rank": weight.up.shape[1]}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **projections.FIELDS,
        "pvera_dropout": INERT,
        # of samples; PEFT merges the mean whatever they say
        "sample_at_inference": INERT,
        "generator_seed": INERT,
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """The rank, which the arithmetic does not need.

    Raises:
        IntegrityError: the config states another, or the vector has no two halves.
    """
    mix = slots["mix"]
    if mix.shape[0] % 2:
        raise IntegrityError(f"{module}: {mix.key} has {mix.shape[0]} numbers, which are not two for each rank")
    return {"rank": stated_rank(config, module, mix.shape[0] // 2, mix.key, patterns="")}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The inverse of ``options``.

    Raises:
        CannotCarry: ranks differ.
    """
    return projections.config(groups, "pvera_dropout")


PVERA = Kind(
    name="pvera",
    title="PVeRA",
    source="https://arxiv.org/abs/2512.07703",
    slots=(
        Slot(name="gain", dims="out"),
        Slot(name="mix", dims="both"),
        Slot(name="up", dims=">out r", shared=True, optional=True),
        Slot(name="down", dims="both >in", shared=True, optional=True),
    ),
    deltas=(PVeRA,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="PVERA",
            leaves=(
                Leaf(slot="gain", suffix="pvera_lambda_b"),
                Leaf(slot="mix", suffix="pvera_lambda_d"),
                Leaf(slot="up", suffix="pvera_B"),
                Leaf(slot="down", suffix="pvera_A"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
            complete=projections.complete,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in PVeRA."""
    return [PVERA]
