"""RandLoRA: a full-rank change from scaled random bases (https://arxiv.org/abs/2502.00987).

``up`` ``[>= long, >= n, r]`` and ``down`` ``[r, 1, >= short]`` are random, fixed and shared by all modules; ``short``
and ``long`` are the smaller and the larger side of a weight.  Trained are ``scales`` ``[r, n]`` and ``gamma`` ``[n,
short]``.  PEFT up to 0.21.2 also stores the shared pair once more for every module; such files are read, the copies
compared, and written back in the same way.  Files may lack the pair (``save_projection`` false); then it is drawn
again as PEFT draws it wherever bfloat16 is at hand: on a machine without, PEFT itself draws another in float16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas import projections
from lorahub.deltas.delta import ALL, Delta, Index
from lorahub.deltas.factors import scale_of
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
from lorahub.deltas.peft_config import INERT, USED, alpha_for, one_for_all, stated_rank
from lorahub.deltas.peft_values import PLACES, number, switch
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError, NotLocal
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

    from lorahub.bases.site import Site

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
        short = self.gamma.shape[1]
        if weight.dim() != 2 or min(weight.shape) != short or max(weight.shape) > self.up.shape[0]:
            raise BaseMismatch(
                f"a randlora delta for sides of {short} and up to {self.up.shape[0]} was given a weight "
                f"{list(weight.shape)}"
            )
        left, right = self._sides(max(weight.shape), weight)
        change = (left @ right).mul_(self.scale)
        return change if weight.shape[1] == short else change.T.contiguous()

    def _sides(self, long: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``B`` [long, n * r] and ``A`` [r * n, short], in the dtype and on the device of ``like``."""
        n, short = self.gamma.shape
        right = self.scales.to(like)[:, :, None] * self.down[:, :, :short].to(like) * self.gamma.to(like)
        return self.up[:long, :n].to(like).flatten(1), right.flatten(0, 1)

    def contribution(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor | None:
        """To a linear layer: one side of the product after the other, which is never multiplied out."""
        if site.op != "linear":
            return None
        x, width = x.to(y.dtype), x.shape[-1]
        left, right = self._sides(max(width, y.shape[-1]), y)
        linear = torch.nn.functional.linear
        if width == self.gamma.shape[1]:
            return linear(linear(x, right), left) * self.scale
        return linear(linear(x, left.T), right.T) * self.scale

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
    """The weight's delta, with the shared projections as they are, or drawn again where files lack them.

    Raises:
        IntegrityError: a module's copy of them differs, or they do not fit its own tensors.
    """
    scales, gamma = tensors["scales"], tensors["gamma"]
    if "up" in tensors and "down" in tensors:
        up, down = tensors["up"], tensors["down"]
    else:
        up, down = drawn(*projections.facts(group), scales.shape[0], str(group.options["draw"]))
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
        # how projections are drawn, where they are not in the file
        "projection_prng_key": USED,
        "save_projection": USED,
        "sparse": USED,
        "very_sparse": USED,
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


def complete(
    config: Mapping[str, JSON],
    groups: Sequence[Group],
    shared: Mapping[str, TensorRef],
    base: Surroundings | None,
) -> Completed:
    """See ``projections.complete``; and how the pair is drawn.

    Raises:
        BaseNeeded, IntegrityError: as there; or modules have copies of what they share and the adapter does not.
    """
    completed = projections.complete(config, groups, shared, base)
    if shared:
        return completed
    if copied := [group.slots["up_copy"].key for group in groups if "up_copy" in group.slots]:
        raise IntegrityError(f"{copied[0]} is a copy of a projection that all modules share, and that is not there")
    draw = (
        "very sparse" if switch(config, "very_sparse", False) else "sparse" if switch(config, "sparse", False) else ""
    )
    groups = [replace(group, options={**group.options, "draw": draw}) for group in completed.groups]
    return Completed(groups=tuple(groups), findings=completed.findings)


@lru_cache(maxsize=2)  # the same for all modules of an adapter
def drawn(out: int, inputs: int, seed: int, r: int, draw: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``up`` and ``down`` as PEFT 0.21.2 draws them for layers of up to ``out`` outputs and ``inputs`` inputs.

    Args:
        out: outputs of the largest layers.
        inputs: theirs too.
        seed: of torch's CPU generator.
        r: the rank.
        draw: "sparse" and "very sparse" give -1, 0 and 1, "" a uniform distribution in bfloat16; all are then divided
            by their standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    short, long = sorted((out, inputs))
    n = math.ceil(short / r)
    if draw:
        sparsity = math.sqrt(short) if draw == "very sparse" else 3
        down, up = (
            _signs(torch.rand(size, generator=generator), 1 / (2 * sparsity)) for size in ((r, 1, short), (long, n, r))
        )
    else:
        down = _uniform((r, 1, short), generator)
        up = torch.cat([_uniform((long, 1, r), generator) for _ in range(n)], dim=1)
    return up / up.std(), down / down.std()


def _signs(drawn: torch.Tensor, share: float) -> torch.Tensor:
    signs = torch.zeros(drawn.shape)
    signs[drawn < share] = -1
    signs[drawn > 1 - share] = 1
    return signs


def _uniform(size: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(size[1] * size[2]))
    return torch.empty(size, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


RANDLORA = Kind(
    name="randlora",
    title="RandLoRA",
    source="https://arxiv.org/abs/2502.00987",
    slots=(
        Slot(name="scales", dims="r n"),
        Slot(name="gamma", dims="n short"),
        Slot(name="up", dims="long >n r", shared=True, optional=True),
        Slot(name="down", dims="r 1 >short", shared=True, optional=True),
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
            complete=complete,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in RandLoRA."""
    return [RANDLORA]
