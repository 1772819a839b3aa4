"""RandLoRA: a full-rank change from scaled random bases (https://arxiv.org/abs/2502.00987).

``up`` ``[>= long, >= n, r]`` and ``down`` ``[r, 1, >= short]`` are random, fixed and shared by all modules; ``short``
and ``long`` are the smaller and the larger side of a weight.  Trained are ``scales`` ``[r, n]`` and ``gamma``
``[n, short]``.  PEFT up to 0.21.2 also stores the shared pair once more for every module; such files are read, the
copies compared, and written back in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import ALL, Delta, Index
from lorahub.deltas.factors import scale_of
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED, alpha_for, one_for_all, stated_rank
from lorahub.deltas.peft_values import PLACES, number
from lorahub.deltas.projections import LACKING
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError, NotLocal
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["RANDLORA", "RandLoRA"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class RandLoRA(Delta):
    """``scale * B @ A``, transposed where the weight has more columns than rows.

    ``A`` is ``scales * down * gamma`` over (r, n, short) and ``B`` is ``up`` over (long, n, r), each flattened to a
    matrix; so the two count ranks and bases in different orders, which is how PEFT trains them.

    Attributes:
        scales: ``[r, n]``.
        gamma: ``[n, short]``.
        up: ``[>= long, >= n, r]``.
        down: ``[r, 1, >= short]``.
        scale: ``alpha / r``.
        copied: files hold copies of ``up`` and ``down`` for this module.
    """

    scales: torch.Tensor
    gamma: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    scale: float
    copied: bool = False

    kind: ClassVar[str] = "randlora"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The weight gives shape, dtype and device only.

        Raises:
            BaseMismatch: it is no matrix, its smaller side is not ``gamma``'s, or its larger one exceeds ``up``.
        """
        n, short = self.gamma.shape
        if weight.dim() != 2 or min(weight.shape) != short or max(weight.shape) > self.up.shape[0]:
            raise BaseMismatch(
                f"a randlora delta for sides of {short} and up to {self.up.shape[0]} was given a weight "
                f"{list(weight.shape)}"
            )
        scales, gamma = self.scales.to(weight), self.gamma.to(weight)
        right = (scales[:, :, None] * self.down[:, :, :short].to(weight) * gamma).flatten(0, 1)
        left = self.up[: max(weight.shape), :n].to(weight).flatten(1)
        change = (left @ right).mul_(self.scale)
        return change if weight.shape[1] == short else change.T.contiguous()

    def region(self, rows: Index, cols: Index) -> Self:
        """Only the whole.

        Raises:
            NotLocal: any cut: which side of the weight is the larger one, a part does not tell.
        """
        if rows != ALL or cols != ALL:
            raise NotLocal("a randlora delta follows from the shape of the whole weight; it cannot be cut")
        return self

    def shape(self) -> None:
        """None: only the smaller side is known."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Scales of zero.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        like = cls.example(shape, r=r, generator=generator)
        gamma = torch.full_like(like.gamma, 1 / max(shape))
        return cls(torch.zeros_like(like.scales), gamma, like.up, like.down, 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal values, in projections larger than the weight.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        if len(shape) != 2:
            raise BaseMismatch(f"a randlora delta changes matrices [out, in], not {list(shape)}")
        short, long = sorted(shape)
        n = math.ceil(short / r)
        sizes = ((r, n), (n, short), (long + 2, n + 1, r), (r, 1, short + 3))
        tensors = [torch.randn(size, generator=generator, device=generator.device) for size in sizes]
        copied = bool(torch.randint(2, (), generator=generator, device=generator.device))
        return cls(tensors[0], tensors[1], tensors[2], tensors[3], 0.7 / math.sqrt(n * r), copied)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight, whole; its smaller side is known."""
    _, short = group.slots["gamma"].shape
    slots = ("scales", "gamma", "up", "down")
    dims, rank = f"*<{short}", group.slots["scales"].shape[0]
    return (Touch(parameter="weight", dims=dims, slots=slots, additive=True, local=False, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta, with the shared projections as they are.

    Raises:
        IntegrityError: a module's copy of them differs, or they do not fit its own tensors.
    """
    scales, gamma, up, down = (tensors[name] for name in ("scales", "gamma", "up", "down"))
    for name in ("up", "down"):
        copy = tensors.get(f"{name}_copy")
        if copy is not None and not torch.equal(copy, tensors[name]):
            key = group.slots[f"{name}_copy"].key
            raise IntegrityError(f"{key} differs from the projection that all modules share")
    r, n = scales.shape
    fits = up.dim() == down.dim() == 3 and up.shape[1] >= n and down.shape[1] == 1 and down.shape[2] >= gamma.shape[1]
    if not fits or up.shape[2] != r or down.shape[0] != r:
        raise IntegrityError(
            f"{group.module}: scales {[r, n]} and gamma {list(gamma.shape)} do not fit the shared projections "
            f"{list(down.shape)} and {list(up.shape)}"
        )
    return {"weight": RandLoRA(scales, gamma, up, down, scale_of(group), "up_copy" in tensors)}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": RandLoRA() as weight, **others} if not others:
            tensors = weight.tensors()
            if weight.copied:
                tensors |= {"up_copy": weight.up, "down_copy": weight.down}
            return tensors, {"scale": weight.scale, "rank": weight.scales.shape[0]}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "r": USED,
        "randlora_alpha": USED,
        "randlora_dropout": INERT,
        # the projections themselves are read; without them the missing slots are what is to be said
        "projection_prng_key": INERT,
        "save_projection": INERT,
        "sparse": INERT,
        "very_sparse": INERT,
        # how the base stores its weights: the layer type decides, and PEFT overrides the flag by it
        "fan_in_fan_out": INERT,
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Scale, alpha and rank.

    Raises:
        IntegrityError: the config states another rank, or an alpha that is no number.
    """
    if ("up_copy" in slots) != ("down_copy" in slots):
        raise IntegrityError(f"{module}: the file has a copy of one shared projection and not of the other")
    scales = slots["scales"]
    rank = stated_rank(config, module, scales.shape[0], scales.key, patterns="")
    alpha = number(config, "randlora_alpha", 640)
    return {"scale": alpha / rank, "scale_rule": "alpha/r", "alpha": alpha, "rank": rank}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The inverse of ``options``.

    Raises:
        CannotCarry: modules differ in rank or scale, or no alpha gives the scale exactly.
    """
    rank = one_for_all(groups, "r", lambda group: group.options["rank"])
    scale = one_for_all(groups, "randlora_alpha", lambda group: group.options["scale"])
    assert isinstance(rank, int)
    alpha = next(
        (found for whole in (True, False) if (found := alpha_for(scale, None, float(rank), whole=whole)) is not None),
        None,
    )
    if alpha is None:
        raise CannotCarry(f"no randlora_alpha over rank {rank} gives the scale {scale!r} exactly")
    return {
        "r": rank,
        "randlora_alpha": alpha,
        "randlora_dropout": 0.0,
        "save_projection": True,
        "projection_prng_key": 0,  # of no effect: the projections are stored
        "init_weights": True,
    }


RANDLORA = Kind(
    name="randlora",
    title="RandLoRA",
    source="https://arxiv.org/abs/2502.00987",
    slots=(
        Slot(name="scales", dims="r n"),
        Slot(name="gamma", dims="n short"),
        Slot(name="up", dims="long >n r", shared=True, lacking=LACKING),
        Slot(name="down", dims="r 1 >short", shared=True, lacking=LACKING),
        Slot(name="up_copy", dims="long >n r", optional=True),
        Slot(name="down_copy", dims="r 1 >short", optional=True),
    ),
    deltas=(RandLoRA,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="RANDLORA",
            leaves=(
                Leaf(slot="scales", suffix="randlora_lambda"),
                Leaf(slot="gamma", suffix="randlora_gamma"),
                Leaf(slot="up", suffix="randlora_B"),
                Leaf(slot="down", suffix="randlora_A"),
                Leaf(slot="up_copy", suffix="randlora_B"),
                Leaf(slot="down_copy", suffix="randlora_A"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in RandLoRA."""
    return [RANDLORA]
