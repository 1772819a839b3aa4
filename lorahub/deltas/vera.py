"""VeRA: two trained vectors around fixed random projections (https://arxiv.org/abs/2310.11454).

``W' = W + (gain * up) @ (mix * down)``: ``up`` and ``down`` are the same for all modules and larger than most of them,
which use the first rows and columns.  PEFT's ``vera_lambda_b`` is ``gain``, ``vera_lambda_d`` is ``mix``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas import projections
from lorahub.deltas.beginning import number, rank, stands, whole, zeros
from lorahub.deltas.delta import Delta, Index, LowRank, take
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, stated_rank
from lorahub.deltas.starting import Ground, Setting, Started, Starting
from lorahub.errors import UsageError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

    from lorahub.bases.site import Site

__all__ = ["VERA", "VeRA"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class VeRA(Delta):
    """``(gain * up[:out]) @ (mix * down[:, :in])``.

    Attributes:
        gain: ``[out]``.
        mix: ``[r]``.
        up: ``[>= out, r]``.
        down: ``[r, >= in]``.
    """

    gain: torch.Tensor
    mix: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    kind: ClassVar[str] = "vera"
    additive: ClassVar[bool] = True
    drops: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """See ``projected``; the weight gives shape, dtype and device only."""
        return projections.projected(self.kind, self.gain, self.mix, self.up, self.down, weight)

    def low_rank_for(self, inputs: int) -> LowRank:
        """The vectors multiplied into the projections."""
        return projections.factors(self.kind, self.gain, self.mix, self.up, self.down, inputs)

    def contribution(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor | None:
        """See ``through``."""
        return projections.through(self.gain, self.mix, self.up, self.down, x, y, site)

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
        up, down = projections.example_projections("vera", shape, r, r, generator)
        mix = torch.full((r,), 0.1, device=generator.device)
        return cls(torch.zeros(shape[0], device=generator.device), mix, up, down)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal vectors and projections.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        up, down = projections.example_projections("vera", shape, r, r, generator)
        gain, mix = (torch.randn(size, generator=generator, device=generator.device) for size in (shape[0], r))
        return cls(gain, mix, up, down)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight."""
    rank = group.slots["mix"].shape[0]
    slots = ("gain", "mix", "up", "down")
    return (Touch(parameter="weight", dims="out in", slots=slots, additive=True, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta, with the shared projections as they are, or drawn again where files lack them.

    Raises:
        IntegrityError: they do not fit the module's vectors.
    """
    gain, mix = tensors["gain"], tensors["mix"]
    rank = mix.shape[0]
    if "up" in tensors and "down" in tensors:
        up, down = tensors["up"], tensors["down"]
    else:
        up, down = projections.drawn(*projections.facts(group), rank, mix.shape[0])
    projections.expect_sizes(group, gain, rank, up, down)
    return {"weight": VeRA(gain, mix, up, down)}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": VeRA() as weight, **others} if not others:
            return weight.tensors(), {"rank": weight.mix.shape[0]}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType({**projections.FIELDS, "vera_dropout": INERT})


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """The rank, which the arithmetic does not need.

    Raises:
        IntegrityError: the config states another.
    """
    mix = slots["mix"]
    return {"rank": stated_rank(config, module, mix.shape[0], mix.key, patterns="")}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The inverse of ``options``.

    Raises:
        CannotCarry: ranks differ.
    """
    return projections.config(groups, "vera_dropout")


_WHERE: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(("conv", "embedding", "experts"), "its shared projections are those of matrices [out, in]")
)


def start(ground: Ground) -> Started:
    """Gains of zero around ``d_initial``.

    Raises:
        UsageError: it stands on linear layers only.
    """
    stands(ground, "VeRA", _WHERE)
    mix = torch.full((rank(ground),), number(ground, "d_initial"), device=ground.device)
    return Started(trained={"gain": zeros(ground, ground.shape[0]), "mix": mix}, options={"rank": rank(ground)})


def shared(grounds: Sequence[Ground]) -> dict[str, torch.Tensor]:
    """The two projections, as large as the largest of the layers, drawn as PEFT draws them.

    Raises:
        UsageError: ranks or seeds differ between modules, or the rank is beyond reason.
    """
    ranks = {rank(ground) for ground in grounds}
    seeds = {whole(ground, "projection_prng_key", least=0) for ground in grounds}
    if len(ranks) != 1 or len(seeds) != 1:
        raise UsageError(
            "all modules of a VeRA share their projections, so they have one r and one projection_prng_key"
        )
    ((r,), (key,)) = ranks, seeds
    out, inputs = (max(ground.shape[axis] for ground in grounds) for axis in (0, 1))
    up, down = projections.drawn(out, inputs, key, r, r)
    return {"up": up.to(grounds[0].device), "down": down.to(grounds[0].device)}


STARTING = Starting(
    settings={
        "r": Setting(default=256, says="The rank: how many directions the two projections pass on."),
        "d_initial": Setting(default=0.1, says="What the inner gains begin with."),
        "projection_prng_key": Setting(default=0, says="The seed from which the shared projections are drawn."),
        "dropout": Setting(
            default=0.0, says="The chance of an input of the projections to be dropped while it trains."
        ),
    },
    start=start,
    shared=shared,
)

VERA = Kind(
    name="vera",
    title="VeRA",
    source="https://arxiv.org/abs/2310.11454",
    slots=(
        Slot(name="gain", dims="out"),
        Slot(name="mix", dims="r"),
        Slot(name="up", dims=">out r", shared=True, optional=True),
        Slot(name="down", dims="r >in", shared=True, optional=True),
    ),
    deltas=(VeRA,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="VERA",
            leaves=(
                Leaf(slot="gain", suffix="vera_lambda_b"),
                Leaf(slot="mix", suffix="vera_lambda_d"),
                Leaf(slot="up", suffix="vera_B"),
                Leaf(slot="down", suffix="vera_A"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
            complete=projections.complete,
        ),
    ),
    starting=STARTING,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in VeRA."""
    return [VERA]
