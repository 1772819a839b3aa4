"""TinyLoRA: a few numbers mixed into a small matrix between fixed factors (https://arxiv.org/abs/2602.04118).

``W' = W + up @ (sum_i vector[i] * mixes[i]) @ down``.  The factors come from a decomposition of the base and are
always stored; the random ``mixes`` are stored or drawn again; the vectors are shared by modules.  Which vector and
which random numbers a module has follows from its place among the adapted modules, in the order in which the model is
built, and no file says that place.  Stored mixes tell it: they are what PEFT draws from the seed plus the place, and
nothing else. Without them the base must say in which order it builds its modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index, LowRank, take
from lorahub.deltas.factors import example_factors
from lorahub.deltas.fit import expect_shape
from lorahub.deltas.kind import (
    JSON,
    Completed,
    Field,
    Group,
    Kind,
    Leaf,
    Slot,
    Spelling,
    Surroundings,
    TensorRef,
    Touch,
)
from lorahub.deltas.peft_config import INERT, USED, one_for_all
from lorahub.deltas.peft_values import PLACES, number, seed
from lorahub.errors import BaseMismatch, BaseNeeded, CannotCarry, IntegrityError
from lorahub.findings import Finding, Verdict
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["TINYLORA", "Tiny", "drawn"]

_DRAWN = (
    "save_projection is false, so the random matrices are not in the file: each module's are drawn again from a seed "
    "and the module's place in the order in which the model is built"
)
_SAVE = "merge into the live model, or save the adapter again, in PEFT, with save_projection=True"

_FEW = 16
_MOST = 2**28
_MODULES = 4096


@final
@dataclass(frozen=True, slots=True, eq=False)
class Tiny(Delta):
    """``up @ (sum_i vector[i] * mixes[i]) @ down``.

    Attributes:
        up: ``[out, r]``; PEFT's ``tinylora_B``.
        down: ``[r, in]``; PEFT's ``tinylora_A``.
        mixes: ``[u, r, r]``; PEFT's ``tinylora_P``.
        vector: ``[u]``, shared by the modules of a set.
        which: the number of that set.
        seed: from which, with the module's place added, the mixes were drawn.
        tying: PEFT's ``weight_tying``, which says how many sets there are.
    """

    up: torch.Tensor
    down: torch.Tensor
    mixes: torch.Tensor
    vector: torch.Tensor
    which: str = "0"
    seed: int = 42
    tying: float = 0.0

    kind: ClassVar[str] = "tinylora"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """In the weight's dtype; the weight gives shape, dtype and device only."""
        expect_shape(self, weight)
        return self.up.to(weight) @ self._middle(weight) @ self.down.to(weight)

    def _middle(self, like: torch.Tensor) -> torch.Tensor:
        return torch.einsum("u,uij->ij", self.vector.to(like), self.mixes.to(like))

    def region(self, rows: Index, cols: Index) -> Self:
        """Rows of ``up``, columns of ``down``."""
        return replace(self, up=take(self.up, rows, 0), down=take(self.down, cols, 1))

    def low_rank(self) -> LowRank:
        """The mixed matrix on the side of ``up``, in float64."""
        up = self.up.double()
        return LowRank(up @ self._middle(up), self.down, 1.0)

    def shape(self) -> tuple[int, int]:
        """``[out, in]``."""
        return self.up.shape[0], self.down.shape[1]

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """A vector of zeros.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        like = cls.example(shape, r=r, generator=generator)
        return replace(like, vector=torch.zeros_like(like.vector))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors and vector, and mixes as PEFT draws them.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        if len(shape) != 2:
            raise BaseMismatch(f"a tinylora delta changes matrices [out, in], not {list(shape)}")
        up, down = example_factors("tinylora", shape, r, generator)
        vector = torch.randn(2 * r, generator=generator, device=generator.device)
        which = int(torch.randint(2, (), generator=generator, device=generator.device))
        return cls(up, down, drawn(5 + which, 2 * r, r).to(generator.device), vector, str(which), 5, 0.25)


def drawn(start: int, u: int, r: int) -> torch.Tensor:
    """The mixes ``[u, r, r]`` that PEFT 0.21.2 draws for a seed, by torch's CPU generator."""
    generator = torch.Generator().manual_seed(start)
    return torch.normal(mean=0.0, std=1 / math.sqrt(r), size=(u, r, r), generator=generator)


@lru_cache(maxsize=4096)  # as many as there may be modules: each looks for its own among all of them
def _first(start: int, u: int, r: int) -> tuple[float, ...]:
    """The first few of these numbers, enough to tell one draw from another."""
    return tuple(drawn(start, u, r).flatten()[:_FEW].tolist())


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight."""
    slots = tuple(name for name in group.slots if not name.startswith("vector."))
    rank = group.slots["down"].shape[0]
    return (Touch(parameter="weight", dims="out in", slots=slots, additive=True, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta, with the vector of the set that its module is in.

    Raises:
        IntegrityError: the mixes are none that PEFT draws for this adapter, or do not fit the vector.
    """
    said = group.options
    start, tying = said["seed"], said["tying"]
    assert isinstance(start, int)
    assert isinstance(tying, int | float)
    down, mixes = tensors["down"], tensors.get("mixes")
    which = said.get("which")
    if mixes is None:
        place = said["place"]
        assert isinstance(place, int)
        mixes = drawn(start + place, tensors[f"vector.{which}"].shape[0], down.shape[0])
    elif which is None:
        which = str(_set_of(_place(group, mixes, start), _count(said["modules"]), _count(said["sets"])))
    vector = tensors[f"vector.{which}"]
    if tuple(mixes.shape) != (vector.shape[0], down.shape[0], down.shape[0]):
        raise IntegrityError(
            f"{group.module}: {list(mixes.shape)} random numbers do not fit a vector {list(vector.shape)} and rank "
            f"{down.shape[0]}"
        )
    return {"weight": Tiny(tensors["up"], down, mixes, vector, str(which), start, float(tying))}


def _count(value: JSON) -> int:
    assert isinstance(value, int)
    return value


def _place(group: Group, mixes: torch.Tensor, start: int) -> int:
    """The place whose random numbers these are."""
    modules = _count(group.options["modules"])
    place = _found(mixes, start, modules)
    if place is not None:
        return place
    raise IntegrityError(
        f"{group.module}: {group.slots['mixes'].key} is none of the {modules} that projection_seed {start} gives, so "
        "it does not tell which vector the module has",
        "save the adapter again with the version of PEFT that trained it, all vectors tied (weight_tying=1)",
    )


def _found(mixes: torch.Tensor, start: int, modules: int) -> int | None:
    """Which of the first places these random numbers are drawn for."""
    u, r = mixes.shape[:2]
    few = mixes.flatten()[:_FEW]
    for place in range(modules):
        alike = torch.equal(torch.tensor(_first(start + place, u, r)).to(few), few)
        if alike and torch.equal(drawn(start + place, u, r).to(mixes), mixes):
            return place
    return None


def _sets(modules: int, tying: float) -> int:
    """How many vectors PEFT 0.21.2 makes."""
    return max(1, round(modules * (1.0 - tying)))


def _set_of(place: int, modules: int, sets: int) -> int:
    """Which of them the module at a place has."""
    return min(place // max(1, modules // sets), sets - 1)


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Tiny() as weight, **others} if not others:
            tensors = {"up": weight.up, "down": weight.down, "mixes": weight.mixes}
            tensors[f"vector.{weight.which}"] = weight.vector
            place = _found(weight.mixes, weight.seed, _MODULES)
            return tensors, {"seed": weight.seed, "tying": weight.tying, "which": weight.which, "place": place}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "projection_seed": USED,
        "save_projection": USED,
        "weight_tying": USED,
        # the shapes say these; PEFT takes a smaller rank where a layer is smaller
        "r": INERT,
        "u": INERT,
        "init_v_bound": INERT,
        "tinylora_dropout": INERT,
        # how the base stores its weights: the layer type decides, and PEFT overrides the flag by it
        "fan_in_fan_out": INERT,
    }
)


def options(config: Mapping[str, JSON], module: str, _slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """The seed, and how far vectors are shared.

    Raises:
        IntegrityError: shares of less than nothing or more than all.
    """
    tying = number(config, "weight_tying", 0.0)
    if not 0 <= tying <= 1:
        raise IntegrityError(f"{module}: weight_tying should be from 0 to 1, not {tying:g}")
    return {"seed": seed(config, "projection_seed", 42), "tying": tying}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The inverse of ``options``.

    Raises:
        CannotCarry: modules differ in what PEFT keeps once, or have not the vectors that it would give them.
    """
    start = one_for_all(groups, "projection_seed", lambda group: group.options["seed"])
    count, tying = len(groups), _number(groups)
    sets = _sets(count, tying)
    places = {name: group.options["place"] for name, group in groups.items()}
    if sets > 1 and {*places.values()} != {*range(count)}:
        raise CannotCarry(f"PEFT gives vectors out by place, and the random numbers of {count} modules do not say all")
    given = {name: _set_of(place, count, sets) if isinstance(place, int) else 0 for name, place in places.items()}
    if apart := sorted(name for name, group in groups.items() if group.options["which"] != str(given[name])):
        raise CannotCarry(f"PEFT would give other vectors to {', '.join(apart)}")

    def u(group: Group) -> int:
        return group.slots["mixes"].shape[0]

    return {
        "r": max(group.slots["down"].shape[0] for group in groups.values()),
        "u": one_for_all(groups, "u", u),
        "weight_tying": tying,
        "projection_seed": start,
        "save_projection": True,
        "tinylora_dropout": 0.0,
        "init_weights": True,
    }


def _number(groups: Mapping[str, Group]) -> float:
    """The one ``weight_tying`` of all groups."""
    tying = one_for_all(groups, "weight_tying", lambda group: group.options["tying"])
    assert isinstance(tying, int | float)
    return float(tying)


def complete(
    _config: Mapping[str, JSON],
    groups: Sequence[Group],
    shared: Mapping[str, TensorRef],
    base: Surroundings | None,
) -> Completed:
    """Which vector every module has, or what ``build`` needs to find it by the module's mixes.

    Raises:
        BaseNeeded: mixes were not saved, and nobody says in which order the base builds its modules.
        IntegrityError: some were saved and others not, or there are not as many vectors as the modules need.
    """
    count, tying = len(groups), groups[0].options["tying"]
    assert isinstance(tying, int | float)
    sets = _sets(count, float(tying))
    wanted = {f"vector.{_set_of(place, count, sets)}" for place in range(count)}
    if shared.keys() != wanted:
        raise IntegrityError(
            f"{count} modules with weight_tying {tying:g} have {len(wanted)} vectors, and the file has {len(shared)}"
        )
    if flat := [ref.key for ref in shared.values() if len(ref.shape) != 1]:
        raise IntegrityError(f"{flat[0]} is no vector")
    stored = [group.module for group in groups if "mixes" in group.slots]
    if stored and len(stored) < count:
        raise IntegrityError(f"{len(stored)} of {count} modules have a tinylora_P")
    if stored:
        facts: dict[str, JSON] = {"which": "0"} if len(wanted) == 1 else {"modules": count, "sets": sets}
        return Completed(groups=tuple(replace(group, options={**group.options, **facts}) for group in groups))
    if base is None or base.targeted is None:
        raise BaseNeeded(_DRAWN, _SAVE)
    places = {module: place for place, module in enumerate(base.targeted)}
    if places.keys() != {group.module for group in groups}:
        raise BaseNeeded(f"{_DRAWN}, and target_modules picks other modules of this base than the file has", _SAVE)
    completed = []
    if max(_drawn_for(group, shared) for group in groups) > _MOST:
        raise IntegrityError(f"rank and vectors ask for more than {_MOST} random numbers for one module")
    for group in groups:
        place = places[group.module]
        about: dict[str, JSON] = {"place": place, "which": str(_set_of(place, count, sets))}
        completed.append(replace(group, options={**group.options, **about}))
    note = Finding(
        code="drawn-again",
        axis="base",
        level=Verdict.UNVERIFIED,
        message=f"{_DRAWN}; torch does not promise the same numbers in every release",
        where=tuple(group.module for group in groups),
        remedy="save the adapter again, which keeps them",
    )
    return Completed(groups=tuple(completed), findings=(note,))


def _drawn_for(group: Group, shared: Mapping[str, TensorRef]) -> int:
    """The most random numbers that a module may have."""
    return max(ref.shape[0] for ref in shared.values()) * group.slots["down"].shape[0] ** 2


TINYLORA = Kind(
    name="tinylora",
    title="TinyLoRA",
    source="https://arxiv.org/abs/2602.04118",
    slots=(
        Slot(name="up", dims="out r"),
        Slot(name="down", dims="r in"),
        Slot(name="mixes", dims="u r r", optional=True),
        Slot(name="vector", dims="u", shared=True, many=True, optional=True),
    ),
    deltas=(Tiny,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="TINYLORA",
            leaves=(
                Leaf(slot="up", suffix="tinylora_B"),
                Leaf(slot="down", suffix="tinylora_A"),
                Leaf(slot="mixes", suffix="tinylora_P"),
                Leaf(slot="vector", suffix="tinylora_v.*"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
            complete=complete,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in TinyLoRA."""
    return [TINYLORA]
