"""DEFT: part of a weight's output space projected out and filled anew, as PEFT defines it (see ``source``).

``W' = (I - q @ right.T) @ W + q @ (scale * fill)``.  With ``qr``, q is an orthonormal basis of what ``basis`` spans and
``right`` is q; with ``relu``, q is ``basis`` and ``right`` its positive part.  Without ``fill`` (PEFT's ``para``)
the part is only projected out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import ALL, Delta, Index, take
from lorahub.deltas.factors import scale_of
from lorahub.deltas.kind import JSON, Field, Group, Kind, Leaf, Slot, Spelling, TensorRef, Touch
from lorahub.deltas.peft_config import INERT, USED, alpha_for, one_for_all
from lorahub.deltas.peft_values import PLACES, integer, number, switch
from lorahub.errors import BaseMismatch, CannotCarry, IntegrityError, NotLocal, UnsupportedKind
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["DEFT", "Refill"]

METHODS = ("qr", "relu")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Refill(Delta):
    """``q @ (scale * fill - right.T @ W)``.

    Attributes:
        basis: ``[out, r]``; PEFT's ``deft_P``.
        fill: ``[r, in]``, PEFT's ``deft_R``; or None.
        scale: multiplies ``fill``.
        method: "qr" or "relu".
    """

    basis: torch.Tensor
    fill: torch.Tensor | None
    scale: float
    method: str

    kind: ClassVar[str] = "deft"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """In the weight's dtype, the decomposition too.

        Raises:
            BaseMismatch: the weight has other sizes, or is no matrix.
        """
        fits = weight.dim() == 2 and weight.shape[0] == self.basis.shape[0]
        if not fits or (self.fill is not None and self.fill.shape[1] != weight.shape[1]):
            inputs = "any number of" if self.fill is None else self.fill.shape[1]
            raise BaseMismatch(
                f"a deft delta for {self.basis.shape[0]} outputs and {inputs} inputs was given a weight "
                f"{list(weight.shape)}"
            )
        basis = self.basis.to(weight)
        q = torch.linalg.qr(basis).Q if self.method == "qr" else basis
        right = q if self.method == "qr" else basis.relu()
        within = right.T @ weight
        return q @ (-within if self.fill is None else self.fill.to(weight) * self.scale - within)

    def region(self, rows: Index, cols: Index) -> Self:
        """Any columns; all rows, which every element of a column depends on.

        Raises:
            NotLocal: a cut through the rows.
        """
        if rows != ALL:
            raise NotLocal("a deft delta projects whole columns of its weight; it cannot be cut through its rows")
        return self if self.fill is None else replace(self, fill=take(self.fill, cols, 1))

    def shape(self) -> tuple[int, ...] | None:
        """``[out, in]``, or None without ``fill``."""
        return None if self.fill is None else (self.basis.shape[0], self.fill.shape[1])

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """A basis of zeros, by the ``relu`` method: a ``qr`` basis is never empty.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        like = cls.example(shape, r=r, generator=generator)
        fill = torch.randn(like.basis.shape[1], shape[1], generator=generator, device=generator.device)
        return cls(torch.zeros_like(like.basis), fill, 1.0, "relu")

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal tensors, either method, with and without ``fill``.

        Raises:
            BaseMismatch: ``shape`` is no matrix.
        """
        if len(shape) != 2:
            raise BaseMismatch(f"a deft delta changes matrices [out, in], not {list(shape)}")
        rank, device = min(r, shape[0]), generator.device
        relu, filled = torch.randint(2, (2,), generator=generator, device=device).tolist()
        basis = torch.randn(shape[0], rank, generator=generator, device=device)
        fill = torch.randn(rank, shape[1], generator=generator, device=device)
        return cls(basis, fill if filled else None, 0.7 if filled else 1.0, METHODS[relu])


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight."""
    slots = tuple(name for name in ("basis", "fill") if name in group.slots)
    rank = group.slots["basis"].shape[1]
    return (Touch(parameter="weight", dims="out in", slots=slots, additive=False, local=False, rank=rank),)


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": Refill(tensors["basis"], tensors.get("fill"), scale_of(group), str(group.options["method"]))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``."""
    match dict(deltas):
        case {"weight": Refill() as weight, **others} if not others:
            return weight.tensors(), {"scale": weight.scale, "method": weight.method, "rank": weight.basis.shape[1]}
    return None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        **PLACES,
        "r": USED,
        "alpha": USED,
        "decomposition_method": USED,
        "para": USED,
        "init_scale": INERT,
        "deft_dropout": INERT,
        # how the base stores its weights: the layer type decides, and PEFT overrides the flag by it
        "fan_in_fan_out": INERT,
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Method and scale.

    Raises:
        IntegrityError: the config states another rank, or contradicts whether there is a ``deft_R``.
        UnsupportedKind: the method is none that is known.
    """
    basis = slots["basis"]
    out, rank = basis.shape
    stated = integer(config, "r", 8)
    if min(stated, out) != rank or rank < 1:  # PEFT takes no more than there are outputs
        raise IntegrityError(f"{module}: r says rank {min(stated, out)}, and {basis.key} has rank {rank}")
    if switch(config, "para", False) == ("fill" in slots):
        has = "a" if "fill" in slots else "no"
        raise IntegrityError(f"{module}: para is {str('fill' in slots).lower()}, and the file has {has} deft_R")
    method = config.get("decomposition_method") or "relu"
    if method not in METHODS:
        raise UnsupportedKind(f"{module}: decomposition_method is {method!r}, and only qr and relu are known")
    alpha = number(config, "alpha", 0.0)
    return {"scale": alpha / rank if alpha else 1.0, "method": method, "rank": rank}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The inverse of ``options``.

    Raises:
        CannotCarry: modules differ in what PEFT keeps once, or no alpha gives the scales exactly.
    """
    ranks = {name: group.slots["basis"].shape[1] for name, group in groups.items()}
    r = max(ranks.values())
    if apart := [name for name in groups if ranks[name] != min(r, groups[name].slots["basis"].shape[0])]:
        raise CannotCarry(f"PEFT has one r for all modules, and these have another rank: {', '.join(sorted(apart))}")
    scales = {name: group.options["scale"] for name, group in groups.items()}
    alpha: JSON = None
    if any(scale != 1.0 for scale in scales.values()):
        first = next(iter(groups))
        near = (alpha_for(scales[first], None, float(ranks[first]), whole=whole) for whole in (True, False))
        found = next((each for each in near if each is not None), None)
        if found is None or any(found / ranks[name] != scale for name, scale in scales.items()):
            raise CannotCarry("PEFT has one alpha for all modules, and none gives these scales exactly")
        alpha = found
    return {
        "r": r,
        "alpha": alpha,
        "decomposition_method": one_for_all(groups, "decomposition_method", lambda group: group.options["method"]),
        "para": one_for_all(groups, "para", lambda group: "fill" not in group.slots),
        "deft_dropout": 0.0,
        "init_weights": True,
    }


DEFT = Kind(
    name="deft",
    title="DEFT",
    source="https://github.com/huggingface/peft/tree/main/src/peft/tuners/deft",
    slots=(Slot(name="basis", dims="out r"), Slot(name="fill", dims="r in", optional=True)),
    deltas=(Refill,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="DEFT",
            leaves=(Leaf(slot="basis", suffix="deft_P"), Leaf(slot="fill", suffix="deft_R")),
            fields=FIELDS,
            options=options,
            config=config,
        ),
    ),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in DEFT."""
    return [DEFT]
