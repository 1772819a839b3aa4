"""Uni-LoRA: one vector for a whole adapter, its numbers spread over the factors of all modules (see ``source``).

``W' = W + up @ down`` with ``up = vector[up_places] * up_scales`` and ``down`` likewise.  A number's scale is one over
the root of how often it is used.  PEFT stores the places and scales (``save_indices``) or leaves all but the vector
out; then they are drawn again from a seed, for all modules in one go, along the order in which the model is built.
Only a base that says this order will do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import Delta, Index, LowRank, take
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
from lorahub.deltas.peft_config import INERT, USED, one_for_all, stated_rank
from lorahub.deltas.peft_values import PLACES, integer, seed, switch
from lorahub.deltas.projections import expect_reason
from lorahub.errors import BaseMismatch, BaseNeeded, IntegrityError
from lorahub.findings import Finding, Verdict
from lorahub.hookspecs import hookimpl
from lorahub.lazy import np, torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["UNILORA", "Spread"]

_DRAWN = (
    "save_indices is false, so the file holds one vector and nothing that says where its numbers go: that is drawn "
    "again from a seed, for all modules in the order in which the model is built"
)
_SAVE = "merge into the live model, or save the adapter again, in PEFT, with save_indices=True"

_ROUNDED = {"F16": "float16", "BF16": "bfloat16"}
"""Dtypes of a weight in which PEFT keeps the scales beside it."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class Spread(Delta):
    """``(vector[up_places] * up_scales) @ (vector[down_places] * down_scales)``.

    Attributes:
        up_places: ``[out, r]`` whole numbers; PEFT's ``unilora_indices_B``.
        up_scales: ``[out, r]``.
        down_places: ``[r, in]``.
        down_scales: ``[r, in]``.
        vector: ``[n]``, the adapter's; PEFT's ``unilora_theta_d``.
    """

    up_places: torch.Tensor
    up_scales: torch.Tensor
    down_places: torch.Tensor
    down_scales: torch.Tensor
    vector: torch.Tensor

    kind: ClassVar[str] = "unilora"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """In the weight's dtype; the weight gives shape, dtype and device only."""
        expect_shape(self, weight)
        up, down = self._factors(weight)
        return up @ down

    def _factors(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        vector, device = self.vector.to(like), like.device
        up = vector[self.up_places.to(device, torch.long)] * self.up_scales.to(like)
        return up, vector[self.down_places.to(device, torch.long)] * self.down_scales.to(like)

    def region(self, rows: Index, cols: Index) -> Self:
        """Rows of what makes ``up``, columns of what makes ``down``."""
        return replace(
            self,
            up_places=take(self.up_places, rows, 0),
            up_scales=take(self.up_scales, rows, 0),
            down_places=take(self.down_places, cols, 1),
            down_scales=take(self.down_scales, cols, 1),
        )

    def low_rank(self) -> LowRank:
        """The factors, put together in float64."""
        return LowRank(*self._factors(self.vector.double()), 1.0)

    def shape(self) -> tuple[int, int]:
        """``[out, in]``."""
        return self.up_places.shape[0], self.down_places.shape[1]

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
        """Five normal numbers at random places, with normal scales.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        if len(shape) != 2:
            raise BaseMismatch(f"a unilora delta changes matrices [out, in], not {list(shape)}")
        device, sizes = generator.device, ((shape[0], r), (r, shape[1]))
        up, down = (torch.randint(5, size, generator=generator, device=device) for size in sizes)
        scales = [torch.randn(size, generator=generator, device=device) for size in sizes]
        return cls(up, scales[0], down, scales[1], torch.randn(5, generator=generator, device=device))


@lru_cache(maxsize=1)  # the same for all modules of an adapter
def drawn(total: int, length: int, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of ``total`` numbers in a vector of ``length``, and a scale for each number of the vector.

    As PEFT 0.21.2: every number as often as every other, or once more, shuffled by numpy's default generator.
    """
    random = np.random.default_rng(start)
    places = np.repeat(np.arange(length), total // length)
    if more := total % length:
        places = np.concatenate([places, random.choice(length, size=more, replace=False)])
    random.shuffle(places)
    found = torch.as_tensor(places, dtype=torch.long)
    counts = torch.bincount(found, minlength=length)
    return found, torch.where(counts > 0, counts.float().rsqrt(), 0.0)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight; where nothing of the module is stored, of the size that the base has said."""
    if group.slots:
        slots, dims, rank = tuple(group.slots), "out in", group.slots["up_places"].shape[1]
    else:
        slots, dims, rank = ("vector",), f"{group.options['out']} {group.options['inputs']}", _whole(group, "rank")
    return (Touch(parameter="weight", dims=dims, slots=slots, additive=True, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta, with places as they are or drawn again.

    Raises:
        IntegrityError: a place beyond the vector.
    """
    vector = tensors["vector"]
    if not group.slots:
        return {"weight": _drawn_for(group, vector)}
    own = [tensors[name] for name in ("up_places", "up_scales", "down_places", "down_scales")]
    for name in ("up_places", "down_places"):
        places = tensors[name]
        if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < vector.shape[0]:
            raise IntegrityError(f"{group.slots[name].key} reaches beyond the shared vector of {vector.shape[0]}")
    return {"weight": Spread(own[0], own[1], own[2], own[3], vector)}


def _drawn_for(group: Group, vector: torch.Tensor) -> Spread:
    r, out, inputs, before = (_whole(group, name) for name in ("rank", "out", "inputs", "before"))
    found, scales = drawn(_whole(group, "total"), vector.shape[0], _whole(group, "seed"))
    middle = before + r * inputs
    down = found[before:middle].reshape(r, inputs)
    up = found[middle : middle + out * r].reshape(out, r)
    if rounded := _ROUNDED.get(str(group.options["dtype"])):
        scales = scales.to(getattr(torch, rounded)).float()
    return Spread(up, scales[up], down, scales[down], vector)


def _whole(group: Group, name: str) -> int:
    value = group.options[name]
    assert isinstance(value, int)
    return value


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Spread() as weight, **others} if not others:
            return weight.tensors(), {"rank": weight.up_places.shape[1], "length": weight.vector.shape[0]}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "r": USED,
        "proj_seed": USED,
        "save_indices": USED,
        "theta_d_length": INERT,  # the vector says it
        "init_theta_d_bound": INERT,
        "unilora_dropout": INERT,
        # how the base stores its weights: the layer type decides, and PEFT overrides the flag by it
        "fan_in_fan_out": INERT,
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """The rank, which the arithmetic has from the shapes.

    Raises:
        IntegrityError: the config states another.
    """
    up = slots["up_places"]
    return {"rank": stated_rank(config, module, up.shape[1], up.key, patterns="")}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The fields under which PEFT makes room for the tensors of ``groups``.

    Raises:
        CannotCarry: ranks differ.
    """
    return {
        "r": one_for_all(groups, "r", lambda group: group.options["rank"]),
        "theta_d_length": one_for_all(groups, "theta_d_length", lambda group: group.options["length"]),
        "proj_seed": 0,  # of no effect: the places are stored
        "save_indices": True,
        "unilora_dropout": 0.0,
        "init_weights": True,
    }


def complete(
    config: Mapping[str, JSON],
    groups: Sequence[Group],
    shared: Mapping[str, TensorRef],
    base: Surroundings | None,
) -> Completed:
    """The groups as they are where places were saved; else one for every module that the config names in the base.

    Raises:
        BaseNeeded: they were not saved, and nobody says in which order the base builds its modules.
        IntegrityError: the vector is missing or none, the config says that places are there or names no module, or the
            rank is beyond reason.
    """
    vector = shared.get("vector")
    if vector is None or len(vector.shape) != 1 or not vector.shape[0]:
        raise IntegrityError("the modules share one vector, unilora_theta_d, and the file has none")
    if groups:
        return Completed(groups=tuple(groups))
    if switch(config, "save_indices", False):
        raise IntegrityError("save_indices is true, and the file has no unilora_indices_A and unilora_indices_B")
    if base is None or base.targeted is None:
        raise BaseNeeded(_DRAWN, _SAVE)
    if not base.targeted:
        raise IntegrityError("target_modules names no matrix of this base", "give the base that it was trained on")
    r, total = integer(config, "r", 4), 0
    matrices = [base.matrices[module] for module in base.targeted]
    if r < 1:
        raise IntegrityError(f"r should be a rank, not {r}")
    expect_reason(r, max(each.out for each in matrices), max(each.inputs for each in matrices))
    made = []
    for module in base.targeted:
        matrix = base.matrices[module]
        about: dict[str, JSON] = {"rank": r, "before": total, "out": matrix.out, "inputs": matrix.inputs}
        made.append((module, {**about, "dtype": matrix.dtype, "seed": seed(config, "proj_seed", 42)}))
        total += r * (matrix.out + matrix.inputs)
    note = Finding(
        code="drawn-again",
        axis="base",
        level=Verdict.UNVERIFIED,
        message=f"{_DRAWN}; numpy does not promise the same numbers in every release",
        where=tuple(module for module, _ in made),
        remedy="save the adapter again, which keeps them",
    )
    completed = (
        Group(module=module, kind="unilora", slots={}, options={**about, "total": total}) for module, about in made
    )
    return Completed(groups=tuple(completed), findings=(note,))


UNILORA = Kind(
    name="unilora",
    title="Uni-LoRA",
    source="https://arxiv.org/abs/2506.00799",
    slots=(
        Slot(name="up_places", dims="out r", holds="integers"),
        Slot(name="up_scales", dims="out r"),
        Slot(name="down_places", dims="r in", holds="integers"),
        Slot(name="down_scales", dims="r in"),
        Slot(name="vector", dims="n", shared=True),
    ),
    deltas=(Spread,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="UNILORA",
            leaves=(
                Leaf(slot="up_places", suffix="unilora_indices_B"),
                Leaf(slot="up_scales", suffix="unilora_scales_B"),
                Leaf(slot="down_places", suffix="unilora_indices_A"),
                Leaf(slot="down_scales", suffix="unilora_scales_A"),
                Leaf(slot="vector", suffix="unilora_theta_d"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
            complete=complete,
            implied=True,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in Uni-LoRA."""
    return [UNILORA]
