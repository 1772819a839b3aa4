"""LoHa: the elementwise product of two changes of low rank (FedPara, https://arxiv.org/abs/2108.06098).

``scale * (w1_a @ w1_b) * (w2_a @ w2_b)``, of rank up to r squared.  Beside a convolution the products are flattened,
``[out, in * prod(k)]``; with PEFT's ``use_effective_conv2d`` each is instead a core ``[r, r, *k]`` times a factor on
either axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.beginning import RANKS, flag, kaiming, rank, scaled, stands, zeros
from lorahub.deltas.cut import Cuts, columns, cut, then
from lorahub.deltas.delta import Delta, Index, LowRank
from lorahub.deltas.factors import scale_of
from lorahub.deltas.fit import bind_slots, expect_matrix
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED, alpha_over_rank, alphas_and_ranks, stated_rank
from lorahub.deltas.starting import Ground, Setting, Started, Starting
from lorahub.deltas.tucker import core_dims, core_fits, core_shape, core_times
from lorahub.errors import BaseMismatch, UsageError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch
from lorahub.shapes import ShapeMisfit

if TYPE_CHECKING:
    from typing import Self

__all__ = ["LOHA", "LoHa"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class LoHa(Delta):
    """``scale`` times the elementwise product of two low-rank changes.

    Attributes:
        w1_a, w2_a: ``[out, r]``, or ``[r, out]`` beside a core.
        w1_b, w2_b: ``[r, in * prod(k)]``, or ``[r, in]`` beside a core.
        scale: ``alpha / r``.
        t1, t2: cores ``[r, r, *k]``, both or none.
        rows, cols: cuts still to be made; see ``cut``.
    """

    w1_a: torch.Tensor
    w1_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    scale: float
    t1: torch.Tensor | None = None
    t2: torch.Tensor | None = None
    rows: Cuts = ()
    cols: Cuts = ()

    kind: ClassVar[str] = "loha"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The weight gives shape, dtype and device only.

        Raises:
            BaseMismatch: it is no weight of the sizes the factors have.
        """
        kernel = tuple(weight.shape[2:])
        if self.t1 is not None and not core_fits(self.t1, kernel):
            raise BaseMismatch(f"a loha core {list(self.t1.shape)} was given a weight {list(weight.shape)}")
        (up1, down1), (up2, down2) = self._pairs(weight.dtype, weight.device, kernel)
        if weight.dim() < 2 or (up1.shape[0], down1.shape[1]) != (weight.shape[0], math.prod(weight.shape[1:])):
            raise BaseMismatch(
                f"a loha delta for [{up1.shape[0]}, {down1.shape[1]}] was given a weight {list(weight.shape)}"
            )
        return (up1 @ down1).mul_(up2 @ down2).mul_(self.scale).reshape(weight.shape)

    def _pairs(
        self, dtype: torch.dtype, device: torch.device, kernel: tuple[int, ...]
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Both changes as factors ``[out, r]`` and ``[r, in * prod(k)]``, cut."""
        pairs = []
        for a, b, core in ((self.w1_a, self.w1_b, self.t1), (self.w2_a, self.w2_b, self.t2)):
            up, down = a.to(device, dtype), b.to(device, dtype)
            if core is None:
                pairs.append((cut(up, self.rows, 0), columns(down, self.cols, kernel)))
            else:
                down = core_times(core.to(device, dtype), cut(down, self.cols, 1))
                pairs.append((cut(up, self.rows, 1).T, down))
        return tuple(pairs)

    def region(self, rows: Index, cols: Index) -> Self:
        """Any rows and columns."""
        return replace(self, rows=then(self.rows, rows), cols=then(self.cols, cols))

    def multiplied_rank(self) -> int:
        """The product of both sides' r."""
        return self.w1_b.shape[0] * self.w2_b.shape[0]

    def low_rank(self) -> LowRank | None:
        """Row by row the Kronecker product of the factors, of rank r squared; None where that is not low.

        float64, in which products of two stored numbers of up to 32 bits are exact.
        """
        if self.cols and self.t1 is None:
            return None
        (up1, down1), (up2, down2) = self._pairs(torch.float64, self.w1_a.device, ())
        out, flat, rank = up1.shape[0], down1.shape[1], down1.shape[0] * down2.shape[0]
        if rank >= min(out, flat):
            return None
        up, down = up1[:, :, None] * up2[:, None, :], down1[:, None, :] * down2[None, :, :]
        return LowRank(up.reshape(out, rank), down.reshape(rank, flat), self.scale)

    def shape(self) -> tuple[int, ...] | None:
        """``[out, in, *k]`` where a core tells the kernel; None for flattened factors, which could be of any kernel."""
        if self.t1 is None or self.t1.shape[-1] == 1:
            return None
        sides = (cut(self.w1_a, self.rows, 1).shape[1], cut(self.w1_b, self.cols, 1).shape[1])
        return (*sides, *self.t1.shape[2:])

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """PEFT's default start: ``w2_b`` of zeros, Kaiming uniform everything else; scale 1.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        out, _, flat = expect_matrix("loha", shape)

        def uniform(*size: int) -> torch.Tensor:
            bound = 1 / math.sqrt(size[1])
            return torch.empty(size, device=generator.device).uniform_(-bound, bound, generator=generator)

        zeros = torch.zeros(r, flat, device=generator.device)
        return cls(uniform(out, r), uniform(r, flat), uniform(out, r), zeros, 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors; beside a convolution with cores or flattened.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        out, width, flat = expect_matrix("loha", shape)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=generator.device)

        if len(shape) == 2 or not int(torch.randint(2, (), generator=generator, device=generator.device)):
            return cls(normal(out, r), normal(r, flat), normal(out, r), normal(r, flat), 0.7 / r)
        core = (r, r, *core_shape(shape[2:]))
        sides = (normal(r, out), normal(r, width), normal(r, out), normal(r, width))
        return cls(*sides, 0.7 / r**2, normal(*core), normal(*core))


_FLAT = {"w1_a": "out r", "w1_b": "r flat", "w2_a": "out s", "w2_b": "s flat"}
_CORES = {"w1_a": "r out", "w1_b": "q in", "t1": "r q *k", "w2_a": "s out", "w2_b": "p in", "t2": "s p *k"}


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight: its rows and inputs, and the kernel as far as the tensors tell.

    Raises:
        ShapeMisfit: one core without the other, or factors that do not fit together.
    """
    if ("t1" in group.slots) != ("t2" in group.slots):
        raise ShapeMisfit("it has one of hada_t1 and hada_t2 without the other")
    form = _CORES if "t1" in group.slots else _FLAT
    bound = bind_slots(group, form)
    trailing = f"{bound['in']} {core_dims(group.slots['t1'])}" if form is _CORES else f"*{bound['flat']}"
    rank = group.slots["w1_b"].shape[0]
    return (Touch(parameter="weight", dims=f"{bound['out']} {trailing}", slots=tuple(form), additive=True, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    w1_a, w1_b, w2_a, w2_b = (tensors[name] for name in _FLAT)
    return {"weight": LoHa(w1_a, w1_b, w2_a, w2_b, scale_of(group), tensors.get("t1"), tensors.get("t2"))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``; a delta that was cut is no adapter's own any more."""
    match dict(deltas):
        case {"weight": LoHa(rows=(), cols=()) as weight, **others} if not others:
            return weight.tensors(), {"scale": weight.scale, "rank": weight.w1_b.shape[0]}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        "r": USED,
        "alpha": USED,
        "rank_pattern": USED,
        "alpha_pattern": USED,
        "use_effective_conv2d": INERT,  # whether there are cores shows in the tensors
        "rank_dropout": INERT,
        "module_dropout": INERT,
        "init_weights": INERT,  # PEFT starts from the base's own weights in either case
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Scale, alpha and rank.

    Raises:
        IntegrityError: the config states another rank than the tensors have.
        UnsupportedKind: a pattern that cannot be matched safely.
    """
    factor = slots["w1_b"]
    rank = stated_rank(config, module, factor.shape[0] if factor.shape else 0, factor.key)
    return alpha_over_rank(config, module, rank)


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The fields under which reading ``groups`` again gives bit-equal scales, and under which PEFT expects the cores.

    Raises:
        CannotCarry: no alpha gives a scale exactly.
    """
    cores = any("t1" in group.slots for group in groups.values())
    ranks = {name: group.slots["w1_b"].shape[0] for name, group in groups.items()}
    return {**alphas_and_ranks(groups, ranks), "use_effective_conv2d": cores, "init_weights": True}


_WHERE: Mapping[str, str] = MappingProxyType(
    {
        "embedding": "no tool has LoHa on embeddings, so nothing would load it",
        "experts": "its factors are those of one weight, and no stack of experts",
    }
)


def start(ground: Ground) -> Started:
    """PEFT's: ``w2_b`` of zeros, Kaiming uniform everything else.

    Raises:
        UsageError: it cannot stand there.
    """
    stands(ground, "LoHa", _WHERE)
    (out, width, *kernel), r = ground.shape, rank(ground)
    trained = {}
    if flag(ground, "use_effective_conv2d") and math.prod(kernel) > 1:  # PEFT keeps pointwise ones flat
        if len(kernel) > 2:
            raise UsageError(f"{ground.module}: use_effective_conv2d has cores for one and two dimensions only")
        for side in ("1", "2"):
            trained[f"w{side}_a"] = kaiming(ground, r, out)
            trained[f"w{side}_b"] = kaiming(ground, r, width)
            trained[f"t{side}"] = kaiming(ground, r, r, *core_shape(tuple(kernel)))
    else:
        for side in ("1", "2"):
            trained[f"w{side}_a"] = kaiming(ground, out, r)
            trained[f"w{side}_b"] = kaiming(ground, r, width * math.prod(kernel))
    trained["w2_b"] = zeros(ground, *trained["w2_b"].shape)
    return Started(trained=trained, options=scaled(ground))


_EFFECTIVE = Setting(default=False, says="Beside kernels, a core of rank r and a factor for each axis.")

LOHA = Kind(
    name="loha",
    title="LoHa",
    source="https://arxiv.org/abs/2108.06098",
    # which axis is which depends on whether there are cores: ``touches`` binds them
    slots=(
        *(Slot(name=name, dims=f"*{name}") for name in _FLAT),
        *(Slot(name=name, dims=f"*{name}", optional=True) for name in ("t1", "t2")),
    ),
    deltas=(LoHa,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="LOHA",
            leaves=tuple(Leaf(slot=name, suffix=f"hada_{name}") for name in (*_FLAT, "t1", "t2")),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
    starting=Starting(settings={**RANKS, "use_effective_conv2d": _EFFECTIVE}, start=start),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in LoHa."""
    return [LOHA]
