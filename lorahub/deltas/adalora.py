"""AdaLoRA: LoRA with trained singular values, of which the least useful were pruned.

https://arxiv.org/abs/2303.10512
``scale * up @ diag(values) @ down``, where PEFT's scale is ``alpha / (init_r + 1e-5)``: it stays that of the rank at
the start, however much was pruned.  Beside a convolution the change is flattened, ``[out, in * prod(k)]``.  A layer
may have been pruned to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas import peft_lora
from lorahub.deltas.cut import Cuts, columns, cut, then
from lorahub.deltas.delta import Delta, Index, LowRank
from lorahub.deltas.factors import scale_of
from lorahub.deltas.fit import expect_matrix
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED, alpha_for, chosen, one_for_all, stated_alpha
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["ADALORA", "AdaLoRA"]

_EPSILON = 1e-5
"""What PEFT adds to the initial rank before it divides."""


@final
@dataclass(frozen=True, slots=True, eq=False)
class AdaLoRA(Delta):
    """``scale * up @ diag(values) @ down``.

    Attributes:
        up: ``[out, r]``; PEFT's ``lora_B``.
        values: ``[r, 1]``; PEFT's ``lora_E``.
        down: ``[r, in * prod(k)]``; PEFT's ``lora_A``.
        scale: ``alpha / (init_r + 1e-5)``.
        rows, cols: cuts still to be made; see ``cut``.
    """

    up: torch.Tensor
    values: torch.Tensor
    down: torch.Tensor
    scale: float
    rows: Cuts = ()
    cols: Cuts = ()

    kind: ClassVar[str] = "adalora"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The weight gives shape, dtype and device only.

        Raises:
            BaseMismatch: it is no weight of the sizes the factors have.
        """
        up = cut(self.up, self.rows, 0).to(weight)
        down = columns(self.down, self.cols, tuple(weight.shape[2:])).to(weight)
        if weight.dim() < 2 or (up.shape[0], down.shape[1]) != (weight.shape[0], weight[0].numel()):
            raise BaseMismatch(
                f"an adalora delta for [{up.shape[0]}, {down.shape[1]}] was given a weight {list(weight.shape)}"
            )
        return (up @ (down * self.values.to(weight))).mul_(self.scale).reshape(weight.shape)

    def region(self, rows: Index, cols: Index) -> Self:
        """Any rows and columns."""
        return replace(self, rows=then(self.rows, rows), cols=then(self.cols, cols))

    def low_rank(self) -> LowRank | None:
        """The values multiplied into ``down``, in float64; None where columns were cut or nothing is left."""
        if self.cols or not self.values.numel():
            return None
        return LowRank(cut(self.up, self.rows, 0), self.down.double() * self.values.double(), self.scale)

    def shape(self) -> None:
        """None: a flattened ``down`` could be of any kernel."""

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """PEFT's start: values of zero between small normal factors; scale 1.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        out, _, flat = expect_matrix("adalora", shape)
        up, down = (
            torch.randn(size, generator=generator, device=generator.device) * 0.02 for size in ((out, r), (r, flat))
        )
        return cls(up, torch.zeros(r, 1, device=generator.device), down, 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal tensors.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        out, _, flat = expect_matrix("adalora", shape)
        up, values, down = (
            torch.randn(size, generator=generator, device=generator.device) for size in ((out, r), (r, 1), (r, flat))
        )
        return cls(up, values, down, 0.7)


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight: rows and the product of everything else; no rank where none is left."""
    rank, flat = group.slots["down"].shape
    slots = ("up", "values", "down")
    return (Touch(parameter="weight", dims=f"out *{flat}", slots=slots, additive=True, rank=rank or None),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": AdaLoRA(tensors["up"], tensors["values"], tensors["down"], scale_of(group))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``; a delta that was cut is no adapter's own any more."""
    match dict(deltas):
        case {"weight": AdaLoRA(rows=(), cols=()) as weight, **others} if not others:
            return weight.tensors(), {"scale": weight.scale, "rank": weight.values.shape[0]}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **peft_lora.FIELDS,  # PEFT's AdaLoraConfig is a LoraConfig
        "init_r": USED,
        "lora_alpha": USED,
        "rank_pattern": USED,  # here: parameter name -> which of the ranks were kept
        # AdaLoRA's layers do not look at these
        "r": INERT,
        "alpha_pattern": INERT,
        "use_rslora": INERT,
        "lora_bias": INERT,
        "init_lora_weights": INERT,  # every value but false gives the same start, which leaves the base alone
        "use_dora": Field(refuse="PEFT has no DoRA with pruned ranks"),
        # how ranks were pruned in training
        "target_r": INERT,
        "tinit": INERT,
        "tfinal": INERT,
        "deltaT": INERT,
        "beta1": INERT,
        "beta2": INERT,
        "orth_reg_weight": INERT,
        "total_step": INERT,
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Scale, alpha and the rank that is left.

    Raises:
        IntegrityError: the rank is neither the initial one nor what ``rank_pattern`` left of it, or no number.
    """
    down = slots["down"]
    rank = down.shape[0] if down.shape else 0
    given, _ = chosen(config, "", "init_r", module)
    initial = 12 if given is None else given  # what PEFT assumes
    kept = _kept(config, module)
    if rank != (initial if kept is None else kept):
        where = f"init_r is {initial:g}" if kept is None else f"rank_pattern keeps {kept} ranks"
        raise IntegrityError(f"{module}: {where}, and {down.key} has rank {rank}")
    alpha = stated_alpha(config, "", "lora_alpha", module)
    strength = alpha if alpha > 0 else rank  # PEFT: an alpha of 0 stands for the rank that is there
    return {
        "scale": strength / (initial + _EPSILON),
        "scale_rule": "alpha/(init_r+1e-5)",
        "alpha": alpha,
        "init_r": initial,
        "rank": rank,
    }


def _kept(config: Mapping[str, JSON], module: str) -> int | None:
    """How many ranks of a module were kept, or None where none were pruned.

    PEFT's names are those of the ``lora_E`` parameters, with the adapter's name at the end before it is saved.
    """
    table = config.get("rank_pattern") or {}
    if not isinstance(table, Mapping):
        raise IntegrityError(f"rank_pattern should map names to lists of true and false, not be {table!r}")
    start = f"{module}.lora_E"
    mask = next((each for name, each in table.items() if name == start or name.startswith(f"{start}.")), None)
    if mask is None:
        return None
    if not isinstance(mask, list) or not all(isinstance(each, bool) for each in mask):
        raise IntegrityError(f"rank_pattern[{start!r}] should be a list of true and false, not {mask!r}")
    return sum(each is True for each in mask)


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The fields under which reading ``groups`` again gives bit-equal scales.

    The initial rank is the least that the modules and a whole alpha allow; ranks that a module lacks were pruned.

    Raises:
        CannotCarry: scales differ, or no alpha gives theirs exactly.
    """
    if not groups:
        return {}
    scale = one_for_all(groups, "scale", lambda group: group.options["scale"])
    ranks = {name: group.slots["down"].shape[0] for name, group in groups.items()}
    most = max(1, *ranks.values())
    found = next(
        (
            (initial, alpha)
            for whole, up_to in ((True, 8 * most + 64), (False, 8 * most + 64))
            for initial in range(most, up_to)
            if (alpha := alpha_for(scale, None, initial + _EPSILON, whole=whole)) is not None and alpha > 0
        ),
        None,
    )
    if found is None:
        raise CannotCarry(f"no alpha over init_r + 1e-5 gives the scale {scale!r} exactly")
    initial, alpha = found
    masks: dict[str, JSON] = {
        f"{name}.lora_E": [at < rank for at in range(initial)] for name, rank in ranks.items() if rank < initial
    }
    return {
        "init_r": initial,
        "lora_alpha": alpha,
        "rank_pattern": masks or None,
        "target_r": most,
        "tinit": 0,
        "tfinal": 0,
        "total_step": 1,  # PEFT demands one above zero
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }


ADALORA = Kind(
    name="adalora",
    title="AdaLoRA",
    source="https://arxiv.org/abs/2303.10512",
    slots=(
        Slot(name="up", dims="out r", prunable=True),
        Slot(name="values", dims="r 1", prunable=True),
        Slot(name="down", dims="r flat", prunable=True),
    ),
    deltas=(AdaLoRA,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="ADALORA",
            leaves=(
                Leaf(slot="up", suffix="lora_B"),
                Leaf(slot="values", suffix="lora_E"),
                Leaf(slot="down", suffix="lora_A"),
            ),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in AdaLoRA."""
    return [ADALORA]
