"""RoAd: the outputs of a layer turned and stretched in pairs (https://arxiv.org/abs/2409.00119).

``W' = R W`` and ``b' = R b``: within every group of outputs, number ``i`` of the first half is paired with number ``i``
of the second, and ``R`` holds ``[[a1 cos t1, -a1 sin t1], [a2 sin t2, a2 cos t2]]`` for each pair.  The variant says
how many of those angles ``t`` and lengths ``a`` are numbers of their own: one per pair (``road_1``), one per output
(``road_2``), or two per output, for the cosine and for the sine (``road_4``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import ALL, Delta, Index
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import USED, one_for_all
from lorahub.deltas.peft_values import PLACES, integer
from lorahub.errors import BaseMismatch, IntegrityError, NotLocal
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["ROAD", "Pairs"]

HALVES: Mapping[str, int] = MappingProxyType({"road_1": 1, "road_2": 2, "road_4": 4})
"""Variant -> numbers of each sort for every two outputs."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Pairs(Delta):
    """``R W`` in place of ``W``, or ``R b`` in place of a bias.

    Attributes:
        angles, lengths: vectors of ``out / 2``, ``out`` or ``2 * out`` numbers, group after group.
        variant: ``road_1``, ``road_2`` or ``road_4``.
        group: how many outputs are paired among each other, an even number that divides ``out``.
    """

    angles: torch.Tensor
    lengths: torch.Tensor
    variant: str
    group: int

    kind: ClassVar[str] = "road"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """``(R - I) W`` on axis 0, whatever axes follow.

        Raises:
            BaseMismatch: the weight has another number of outputs.
        """
        if not weight.dim() or weight.shape[0] != self.outputs:
            raise BaseMismatch(f"a road delta for {self.outputs} outputs was given a weight {list(weight.shape)}")
        own, other = self._factors(weight)
        halves = weight.reshape(-1, 2, self.group // 2, *weight.shape[1:])
        partner = torch.stack([-halves[:, 1], halves[:, 0]], dim=1).reshape(weight.shape)
        column = (-1, *(1 for _ in weight.shape[1:]))
        return (own - 1).reshape(column) * weight + other.reshape(column) * partner

    @property
    def outputs(self) -> int:
        """How many outputs it is for."""
        return 2 * self.angles.numel() // HALVES[self.variant]

    def _factors(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For every output the factor of its own row, and that of its partner's."""
        angles, lengths = self.angles.to(weight), self.lengths.to(weight)
        if self.variant == "road_4":
            t, a = (each.reshape(-1, 2, self.group) for each in (angles, lengths))
            return (a[:, 0] * t[:, 0].cos()).flatten(), (a[:, 1] * t[:, 1].sin()).flatten()
        if self.variant == "road_1":
            angles, lengths = (
                each.reshape(-1, 1, self.group // 2).expand(-1, 2, -1).flatten() for each in (angles, lengths)
            )
        return lengths * angles.cos(), lengths * angles.sin()

    def region(self, rows: Index, cols: Index) -> Self:
        """Whole groups of outputs, in any order of groups, and any columns.

        Raises:
            NotLocal: a pair would be torn apart.
        """
        if rows == ALL:
            return self
        positions = range(self.outputs)[rows] if isinstance(rows, slice) else rows
        first = positions[:: self.group]
        whole = [start + step for start in first for step in range(self.group)]
        if list(positions) != whole or any(start % self.group for start in first):
            raise NotLocal(f"a road delta pairs outputs in groups of {self.group}; it cannot be cut inside a group")
        kept = torch.tensor([start // self.group for start in first], device=self.angles.device)
        angles, lengths = (
            each.reshape(self.outputs // self.group, -1).index_select(0, kept).flatten()
            for each in (self.angles, self.lengths)
        )
        return replace(self, angles=angles, lengths=lengths)

    def shape(self) -> None:
        """None: the numbers say how many outputs there are, and nothing else."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """No angle, length one, for each pair of one group; there is no rank.

        Raises:
            BaseMismatch: an odd number of outputs has no pairs.
        """
        out = even_outputs(shape)
        angles, lengths = (make(out // 2, device=generator.device) for make in (torch.zeros, torch.ones))
        return cls(angles, lengths, "road_1", out)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal angles and lengths of any variant, in groups of 2 or 4.

        Raises:
            BaseMismatch: a vector on its own, or an odd number of outputs.
        """
        out = even_outputs(shape)
        if len(shape) < 2:
            raise BaseMismatch("a road delta for a bias goes with one for the weight")
        variant = [*HALVES][int(torch.randint(3, (), generator=generator, device=generator.device))]
        size = out * HALVES[variant] // 2
        angles, lengths = (torch.randn(size, generator=generator, device=generator.device) for _ in range(2))
        return cls(angles, lengths + 1, variant, 2 if out % 4 else 4)


def even_outputs(shape: tuple[int, ...]) -> int:
    """The number of outputs of a parameter of ``shape``.

    Raises:
        BaseMismatch: it is odd, or there are none.
    """
    if not shape or shape[0] % 2:
        raise BaseMismatch(f"a road delta pairs outputs; {list(shape)} has no even number of them")
    return shape[0]


def variant_of(group: Group) -> tuple[str, int, int]:
    """Variant, group size and number of outputs."""
    variant, size = group.options["variant"], group.options["group"]
    assert isinstance(variant, str)
    assert isinstance(size, int)
    return variant, size, 2 * group.slots["angles"].shape[0] // HALVES[variant]


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, and the bias where there is one: PEFT turns what the layer gives out, bias included."""
    _, _, out = variant_of(group)
    slots = ("angles", "lengths")
    return (
        Touch(parameter="weight", dims=f"{out} in *k", slots=slots, additive=False, local=False),
        Touch(parameter="bias", dims=str(out), slots=slots, additive=False, local=False, if_present=True),
    )


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The same delta for the weight and for the bias."""
    variant, size, _ = variant_of(group)
    pairs = Pairs(tensors["angles"], tensors["lengths"], variant, size)
    return {"weight": pairs, "bias": pairs}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``: the file format cannot say weight without bias."""
    match dict(deltas):
        case {"weight": Pairs() as weight, "bias": Pairs() as bias, **others} if not others:
            if (weight.variant, weight.group) != (bias.variant, bias.group):
                return None
            pairs = ((weight.angles, bias.angles), (weight.lengths, bias.lengths))
            if not all(torch.equal(one, other) for one, other in pairs):
                return None
            said: dict[str, JSON] = {"variant": weight.variant, "group": weight.group}
            return {"angles": weight.angles, "lengths": weight.lengths}, said
    return None


FIELDS: Mapping[str, Field] = MappingProxyType({**PLACES, "variant": USED, "group_size": USED})


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Variant and group size.

    Raises:
        IntegrityError: there is no such variant, or the numbers do not fall into such groups.
    """
    variant, size = config.get("variant", "road_1"), integer(config, "group_size", 64)
    if not isinstance(variant, str) or variant not in HALVES:
        raise IntegrityError(f"variant should be one of {', '.join(HALVES)}, not {variant!r}")
    angles = slots["angles"]
    if size < 2 or size % 2 or angles.shape[0] % (size * HALVES[variant] // 2):
        raise IntegrityError(
            f"{module}: {angles.key} {list(angles.shape)} does not fall into groups of {size} outputs ({variant})"
        )
    return {"variant": variant, "group": size}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """One variant and one group size for all modules.

    Raises:
        CannotCarry: modules differ in either.
    """
    return {
        "variant": one_for_all(groups, "variant", lambda group: group.options["variant"]),
        "group_size": one_for_all(groups, "group_size", lambda group: group.options["group"]),
        "init_weights": True,
    }


ROAD = Kind(
    name="road",
    title="RoAd",
    source="https://arxiv.org/abs/2409.00119",
    slots=(Slot(name="angles", dims="numbers"), Slot(name="lengths", dims="numbers")),
    deltas=(Pairs,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="ROAD",
            leaves=(Leaf(slot="angles", suffix="road_theta"), Leaf(slot="lengths", suffix="road_alpha")),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in RoAd."""
    return [ROAD]
