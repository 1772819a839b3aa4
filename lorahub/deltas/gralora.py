"""GraLoRA: a weight cut into k by k blocks, each with a change of low rank of its own.

https://arxiv.org/abs/2505.20355
Block (j, l) is ``up_jl.T @ down_jl.T`` of rank r / k, where the factors of all blocks are kept together: those of the
inputs l in one tensor, those of the outputs j in another.  The hybrid form adds an ordinary LoRA.  All of it times
``alpha / (r + hybrid_r)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.cut import Cuts, cut, positions, then
from lorahub.deltas.delta import Delta, Index, LowRank
from lorahub.deltas.factors import scale_of
from lorahub.deltas.fit import bind_slots, expect_shape
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED, alpha_for, chosen, one_for_all
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch
from lorahub.shapes import ShapeMisfit

if TYPE_CHECKING:
    from typing import Self

    from lorahub.bases.site import Site

__all__ = ["GRALORA", "GraLoRA"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class GraLoRA(Delta):
    """``scale`` times the blocks' products, and the general one where there is one.

    Attributes:
        down: ``[k, in / k, r]``; PEFT's ``gralora_A``.
        up: ``[k, r, out / k]``; PEFT's ``gralora_B``.
        scale: ``alpha / (r + hybrid_r)``.
        general_down, general_up: ``[h, in]`` and ``[out, h]``, or None.
        rows, cols: cuts still to be made; see ``cut``.
    """

    down: torch.Tensor
    up: torch.Tensor
    scale: float
    general_down: torch.Tensor | None = None
    general_up: torch.Tensor | None = None
    rows: Cuts = ()
    cols: Cuts = ()

    kind: ClassVar[str] = "gralora"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The weight gives shape, dtype and device only."""
        expect_shape(self, weight)
        rows, cols = self._left(weight.device)
        downs, ups = self._blocks(weight.dtype, weight.device)
        change = torch.empty_like(weight, memory_format=torch.contiguous_format)
        height = self.up.shape[2]
        for j in range(self.up.shape[0]):
            mine = rows // height == j
            block = torch.einsum("liq,lqo->oli", downs[:, :, j], ups[j][:, :, rows[mine] % height])
            change[mine] = block.flatten(1)[:, cols]
        if self.general_down is not None and self.general_up is not None:
            general = self.general_up.to(weight)[rows] @ self.general_down.to(weight)[:, cols]
            change += general
        return change.mul_(self.scale)

    def _left(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows and columns that are left."""
        out, width = self.up.shape[0] * self.up.shape[2], self.down.shape[0] * self.down.shape[1]
        return positions(out, self.rows, device), positions(width, self.cols, device)

    def _blocks(self, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors as ``[l, in / k, j, q]`` and ``[j, l, q, out / k]``, where q is ``r / k``."""
        k = self.down.shape[0]
        down, up = self.down.to(device, dtype), self.up.to(device, dtype)
        return down.reshape(k, down.shape[1], k, -1), up.reshape(k, k, -1, up.shape[2])

    def region(self, rows: Index, cols: Index) -> Self:
        """Any rows and columns."""
        return replace(self, rows=then(self.rows, rows), cols=then(self.cols, cols))

    def low_rank(self) -> LowRank | None:
        """The blocks' factors side by side with zeros between, rank ``k r + h``; None where that is not low."""
        down, up = self._blocks(self.down.dtype, self.down.device)
        k, width, _, q = down.shape
        height = up.shape[3]
        extra = 0 if self.general_down is None else self.general_down.shape[0]
        if k * k * q + extra >= min(k * width, k * height):
            return None
        wide, tall = down.new_zeros(k, k, q, k, width), up.new_zeros(k, height, k, k, q)
        for block in range(k):
            wide[:, block, :, block] = down[block].permute(1, 2, 0)
            tall[block, :, block] = up[block].permute(2, 0, 1)
        ups, downs = [tall.reshape(k * height, -1)], [wide.reshape(-1, k * width)]
        if self.general_down is not None and self.general_up is not None:
            ups.append(self.general_up)
            downs.append(self.general_down)
        return LowRank(cut(torch.cat(ups, 1), self.rows, 0), cut(torch.cat(downs), self.cols, 1), self.scale)

    def contribution(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor | None:
        """To a linear layer: block by block, without the zeros between."""
        if site.op != "linear" or self.rows or self.cols:
            return Delta.contribution(self, x, y, site)
        x, k = x.to(y.dtype), self.down.shape[0]
        inner = torch.einsum("...li,lir->...lr", torch.unflatten(x, -1, (k, -1)), self.down.to(y))
        mixed = torch.unflatten(inner, -1, (k, -1)).transpose(-3, -2).flatten(-2)
        outputs = torch.einsum("...jr,jro->...jo", mixed, self.up.to(y)).flatten(-2)
        if self.general_down is not None and self.general_up is not None:
            outputs = outputs + x @ self.general_down.to(y).T @ self.general_up.to(y).T
        return outputs * self.scale

    def shape(self) -> tuple[int, ...]:
        """``[out, in]``."""
        rows, cols = self._left(torch.device("cpu"))
        return len(rows), len(cols)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """``up`` of zeros and ``down`` Kaiming uniform, in as few blocks as the sizes allow; scale 1.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        k, q, device = _grid(shape), r, generator.device
        bound = (shape[1] // k) ** -0.5
        down = torch.empty(k, shape[1] // k, k * q, device=device).uniform_(-bound, bound, generator=generator)
        return cls(down, torch.zeros(k, k * q, shape[0] // k, device=device), 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal factors, with or without a general part.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        k = _grid(shape)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=generator.device)

        down, up = normal(k, shape[1] // k, k), normal(k, k, shape[0] // k)
        if not int(torch.randint(2, (), generator=generator, device=generator.device)):
            return cls(down, up, 0.7)
        return cls(down, up, 0.7, normal(r, shape[1]), normal(shape[0], r))


def _grid(shape: tuple[int, ...]) -> int:
    """The least number of blocks along either side, above one where that is possible."""
    if len(shape) != 2:
        raise BaseMismatch(f"a gralora delta changes matrices [out, in], not {list(shape)}")
    return next((k for k in range(2, min(shape) + 1) if shape[0] % k == 0 and shape[1] % k == 0), 1)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight.

    Raises:
        ShapeMisfit: the rank is no multiple of k, or the general factors do not fit or are not both there.
    """
    general = [slot for slot in ("general_down", "general_up") if slot in group.slots]
    if len(general) == 1:
        raise ShapeMisfit("it has one of gralora_A_general and gralora_B_general without the other")
    k, width, r = group.slots["down"].shape
    out, width = k * group.slots["up"].shape[2], k * width
    if r % k:
        raise ShapeMisfit(f"{group.slots['down'].key} has rank {r}, which its {k} blocks cannot share")
    if general:
        bind_slots(group, {"general_down": f"h {width}", "general_up": f"{out} h"})
    return (Touch(parameter="weight", dims=f"{out} {width}", slots=("down", "up", *general), additive=True, rank=r),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    general = tensors.get("general_down"), tensors.get("general_up")
    return {"weight": GraLoRA(tensors["down"], tensors["up"], scale_of(group), *general)}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``; a delta that was cut is no adapter's own any more."""
    match dict(deltas):
        case {"weight": GraLoRA(rows=(), cols=()) as weight, **others} if not others:
            return weight.tensors(), {"scale": weight.scale, "rank": weight.down.shape[2]}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        "r": USED,
        "hybrid_r": USED,
        "gralora_k": USED,
        "alpha": USED,
        "gralora_dropout": INERT,
        "fan_in_fan_out": INERT,  # the layer type decides, and PEFT overrides the flag by it
        "init_weights": INERT,
    }
)


def _stated(slots: Mapping[str, TensorRef]) -> dict[str, int]:
    """What the config has to say of tensors like these."""
    k, _, r = slots["down"].shape
    return {"gralora_k": k, "r": r, "hybrid_r": slots["general_down"].shape[0] if "general_down" in slots else 0}


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Scale, alpha and rank.

    Raises:
        IntegrityError: the config states another rank or number of blocks than the tensors have.
    """
    found = _stated(slots)
    for field, value in found.items():
        stated, _ = chosen(config, "", field, module)
        if stated is not None and stated != value:
            raise IntegrityError(f"{module}: {field} is {stated}, and {slots['down'].key} and its like say {value}")
    stated, _ = chosen(config, "", "alpha", module)
    alpha = 64 if stated is None else stated  # what PEFT assumes
    rank = found["r"] + found["hybrid_r"]
    if rank < 1:
        raise IntegrityError(f"{slots['down'].key} has no rank")
    return {"scale": alpha / rank, "scale_rule": "alpha/(r+hybrid_r)", "alpha": alpha, "rank": found["r"]}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The fields under which reading ``groups`` again gives bit-equal scales.

    Raises:
        CannotCarry: modules differ in rank, blocks or scale, or no alpha gives the scale exactly.
    """
    if not groups:
        return {}
    one_for_all(groups, "gralora_k, r and hybrid_r", lambda group: [*_stated(group.slots).values()])
    stated = _stated(next(iter(groups.values())).slots)
    scale = one_for_all(groups, "scale", lambda group: group.options["scale"])
    divisor = float(stated["r"] + stated["hybrid_r"])
    alpha = alpha_for(scale, None, divisor, whole=False)
    if alpha is None:
        raise CannotCarry(f"no alpha over {divisor:g} gives the scale {scale!r} exactly")
    return {**stated, "alpha": alpha, "gralora_dropout": 0.0, "init_weights": True}


GRALORA = Kind(
    name="gralora",
    title="GraLoRA",
    source="https://arxiv.org/abs/2505.20355",
    slots=(
        Slot(name="down", dims="k inner r"),
        Slot(name="up", dims="k r outer"),
        Slot(name="general_down", dims="h in", optional=True),
        Slot(name="general_up", dims="out h", optional=True),
    ),
    deltas=(GraLoRA,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="GRALORA",
            leaves=(
                Leaf(slot="down", suffix="gralora_A"),
                Leaf(slot="up", suffix="gralora_B"),
                Leaf(slot="general_down", suffix="gralora_A_general.weight"),
                Leaf(slot="general_up", suffix="gralora_B_general.weight"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in GraLoRA."""
    return [GRALORA]
