"""DoRA over other kinds than LoRA: LyCORIS's weight decomposition of LoHa, LoKr and LoCon with a Tucker core.

``W' = magnitude * V / ||V||`` with ``V = W + change``, the norm running over every axis but ``axis``
(https://arxiv.org/abs/2402.09353): per output, or per input in files of older LyCORIS releases and of OneTrainer.  The
change itself is the other kind's, and so are its tensors.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, TypeAlias, final

from lorahub.deltas import locon, loha, lokr
from lorahub.deltas.cut import Cuts, then
from lorahub.deltas.delta import ALL, Delta, Directed, Index, ratio, take
from lorahub.deltas.dora import lengths
from lorahub.deltas.factors import scale_of
from lorahub.deltas.kind import JSON, Group, Kind, Slot, TensorRef, Touch
from lorahub.errors import NotLocal, UnsupportedKind
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch
from lorahub.shapes import ShapeMisfit

if TYPE_CHECKING:
    from typing import Self

__all__ = ["DORA_LOCON", "DORA_LOHA", "DORA_LOKR", "DoLoCon", "DoLoHa", "DoLoKr", "axis_of"]


class Decomposed(Delta):
    """A change decomposed into direction and length; see the module.

    Every subclass has ``magnitude``, ``[out, *1]`` or ``[1, in, *1]`` as stored, and ``axis``, 0 or 1.
    """

    __slots__ = ()

    magnitude: torch.Tensor
    axis: int
    additive: ClassVar[bool] = False

    @abstractmethod
    def inner(self) -> Delta:
        """The change that is decomposed, with the cuts that were made."""

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """``W' - W``; a vector that already has the wanted length keeps it exactly.

        Raises:
            BaseMismatch: the weight has other sizes.
        """
        moved = weight + self.inner().delta(weight)
        found, wanted = lengths(moved, self.axis).detach(), self.magnitude.reshape(-1).to(weight)
        return (
            moved * ratio(wanted, found).reshape([-1 if dim == self.axis else 1 for dim in range(weight.dim())])
            - weight
        )

    def directed(self) -> Directed | None:
        """All of it where lengths belong to outputs, and the inner change is of low rank."""
        low = None if self.axis else self.inner().low_rank()
        return None if low is None else Directed(low, self.magnitude.reshape(-1))

    def multiplied_rank(self) -> int:
        """The inner change's."""
        return self.inner().multiplied_rank()

    def kept(self, rows: Index, cols: Index) -> torch.Tensor:
        """The lengths that a cut leaves.

        Raises:
            NotLocal: it takes part of a vector, whose norm needs all of it.
        """
        along, across = (rows, cols) if self.axis == 0 else (cols, rows)
        if across != ALL:
            raise NotLocal(
                f"a {self.kind} delta normalises whole {('rows', 'columns')[self.axis]}; it cannot be cut across them"
            )
        return take(self.magnitude.reshape(-1), along, 0)

    def shape(self) -> tuple[int, ...] | None:
        """The inner change's."""
        return self.inner().shape()

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Refused: lengths that change nothing are the weight's own, and a shape does not tell them.

        Raises:
            UnsupportedKind: always.
        """
        raise UnsupportedKind(
            f"a {cls.kind} delta that changes nothing has the weight's own lengths, which a shape {list(shape)} does "
            "not tell",
            "make it from the weight, with the lengths of its rows as magnitude",
        )


@final
@dataclass(frozen=True, slots=True, eq=False)
class DoLoHa(Decomposed):
    """A decomposed LoHa; see ``LoHa`` for what is not said here."""

    w1_a: torch.Tensor
    w1_b: torch.Tensor
    w2_a: torch.Tensor
    w2_b: torch.Tensor
    scale: float
    magnitude: torch.Tensor
    axis: int
    t1: torch.Tensor | None = None
    t2: torch.Tensor | None = None
    rows: Cuts = ()
    cols: Cuts = ()

    kind: ClassVar[str] = "dora-loha"

    def inner(self) -> loha.LoHa:
        """The LoHa."""
        factors = (self.w1_a, self.w1_b, self.w2_a, self.w2_b)
        return loha.LoHa(*factors, self.scale, self.t1, self.t2, self.rows, self.cols)

    def region(self, rows: Index, cols: Index) -> Self:
        """Whole vectors only."""
        kept = self.kept(rows, cols)
        return replace(self, magnitude=kept, rows=then(self.rows, rows), cols=then(self.cols, cols))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """An example of LoHa, and lengths for either axis.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        inner = loha.LoHa.example(shape, r=r, generator=generator)
        magnitude, axis = some_lengths(shape, generator)
        factors = (inner.w1_a, inner.w1_b, inner.w2_a, inner.w2_b)
        return cls(*factors, inner.scale, magnitude, axis, inner.t1, inner.t2)


@final
@dataclass(frozen=True, slots=True, eq=False)
class DoLoKr(Decomposed):
    """A decomposed LoKr; see ``LoKr`` for what is not said here."""

    scale: float
    magnitude: torch.Tensor
    axis: int
    w1: torch.Tensor | None = None
    w1_a: torch.Tensor | None = None
    w1_b: torch.Tensor | None = None
    w2: torch.Tensor | None = None
    w2_a: torch.Tensor | None = None
    w2_b: torch.Tensor | None = None
    t2: torch.Tensor | None = None
    rows: Cuts = ()
    cols: Cuts = ()

    kind: ClassVar[str] = "dora-lokr"

    def inner(self) -> lokr.LoKr:
        """The LoKr."""
        sides = (self.w1, self.w1_a, self.w1_b, self.w2, self.w2_a, self.w2_b, self.t2)
        return lokr.LoKr(self.scale, *sides, rows=self.rows, cols=self.cols)

    def region(self, rows: Index, cols: Index) -> Self:
        """Whole vectors only."""
        kept = self.kept(rows, cols)
        return replace(self, magnitude=kept, rows=then(self.rows, rows), cols=then(self.cols, cols))

    @classmethod
    def of(cls, scale: float, magnitude: torch.Tensor, axis: int, tensors: Mapping[str, torch.Tensor]) -> Self:
        """A delta of the tensors that are there, by the names of the attributes."""
        w1, w1_a, w1_b, w2, w2_a, w2_b, t2 = (tensors.get(name) for name in _LOKR)
        return cls(scale, magnitude, axis, w1, w1_a, w1_b, w2, w2_a, w2_b, t2)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """An example of LoKr, and lengths for either axis.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        tensors = lokr.LoKr.example(shape, r=r, generator=generator).tensors()
        magnitude, axis = some_lengths(shape, generator)
        whole = "w1" in tensors and "w2" in tensors
        return cls.of(1.0 if whole else 0.7, magnitude, axis, tensors)


@final
@dataclass(frozen=True, slots=True, eq=False)
class DoLoCon(Decomposed):
    """A decomposed LoCon with a Tucker core; see ``LoCon`` for what is not said here."""

    up: torch.Tensor
    mid: torch.Tensor
    down: torch.Tensor
    scale: float
    magnitude: torch.Tensor
    axis: int

    kind: ClassVar[str] = "dora-locon"

    def inner(self) -> locon.LoCon:
        """The LoCon."""
        return locon.LoCon(self.up, self.mid, self.down, self.scale)

    def region(self, rows: Index, cols: Index) -> Self:
        """Whole vectors only."""
        kept = self.kept(rows, cols)
        return replace(self, up=take(self.up, rows, 0), down=take(self.down, cols, 1), magnitude=kept)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """An example of LoCon, and lengths for either axis.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        inner = locon.LoCon.example(shape, r=r, generator=generator)
        return cls(inner.up, inner.mid, inner.down, inner.scale, *some_lengths(shape, generator))


def some_lengths(shape: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """Lengths between a half and twice what random vectors have, as stored, and their axis."""
    axis = int(torch.randint(2, (), generator=generator, device=generator.device))
    stored = [size if dim == axis else 1 for dim, size in enumerate(shape)]
    spread = torch.rand(stored, generator=generator, device=generator.device) * 1.5 + 0.5
    return spread * math.sqrt(math.prod(shape) / shape[axis]), axis


def axis_of(magnitude: TensorRef) -> int:
    """Which axis keeps its lengths: the one of the first two that is not 1, and rows where both are.

    Raises:
        ShapeMisfit: another axis is longer than 1 or two are, or the only one tells nothing.
    """
    shape = magnitude.shape
    if len(shape) < 2:
        raise ShapeMisfit(f"{magnitude.key} {list(shape)} could hold lengths of the rows or of the columns")
    axis = 1 if shape[0] == 1 != shape[1] else 0
    if math.prod(shape) != shape[axis]:
        raise ShapeMisfit(f"{magnitude.key} {list(shape)} holds neither lengths of the rows nor of the columns")
    return axis


def _axis(group: Group) -> int:
    axis = group.options["axis"]
    assert axis in (0, 1)
    return int(axis)


def _touches(inner: Callable[[Group], tuple[Touch, ...]]) -> Callable[[Group], tuple[Touch, ...]]:
    """What the inner kind touches, normalised.

    Raises:
        ShapeMisfit: there are not as many lengths as the weight has rows, or inputs.
    """

    def touches(group: Group) -> tuple[Touch, ...]:
        magnitude, axis = group.slots["magnitude"], _axis(group)
        (touch,) = inner(replace(group, slots={name: ref for name, ref in group.slots.items() if name != "magnitude"}))
        known = {"out": ("up", 0), "in": ("down", 1)}
        named = {dim: str(group.slots[slot].shape[at]) for dim, (slot, at) in known.items() if slot in group.slots}
        dims = [named.get(dim, dim) for dim in touch.dims.split()]
        count, wanted = math.prod(magnitude.shape), dims[axis].removeprefix("*")
        fits = int(wanted) % count == 0 if dims[axis].startswith("*") else int(wanted) == count
        if not fits:
            raise ShapeMisfit(
                f"{magnitude.key} {list(magnitude.shape)} should hold a length for each of {wanted} "
                f"{('rows', 'columns')[axis]}"
            )
        if dims[axis].startswith("*"):
            dims[axis:] = [str(count), f"*{int(wanted) // count}"]
        slots = (*touch.slots, "magnitude")
        return (replace(touch, dims=" ".join(dims), slots=slots, additive=False, local=axis == 0),)

    return touches


_LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


def build_loha(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    w1_a, w1_b, w2_a, w2_b = (tensors[name] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    scale, magnitude, axis = scale_of(group), tensors["magnitude"], _axis(group)
    cores = (tensors.get("t1"), tensors.get("t2"))
    return {"weight": DoLoHa(w1_a, w1_b, w2_a, w2_b, scale, magnitude, axis, *cores)}


def build_lokr(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": DoLoKr.of(scale_of(group), tensors["magnitude"], _axis(group), tensors)}


def build_locon(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    up, mid, down = (tensors[name] for name in ("up", "mid", "down"))
    return {"weight": DoLoCon(up, mid, down, scale_of(group), tensors["magnitude"], _axis(group))}


Dissolved: TypeAlias = "tuple[dict[str, torch.Tensor], dict[str, JSON]] | None"


def _dissolve(cls: type[DoLoHa | DoLoKr | DoLoCon]) -> Callable[[Mapping[str, Delta]], Dissolved]:
    """The inverse of ``build``; a delta that was cut is no adapter's own any more."""

    def dissolve(deltas: Mapping[str, Delta]) -> Dissolved:
        weight = deltas.get("weight")
        if not isinstance(weight, cls) or len(deltas) > 1:
            return None
        if not isinstance(weight, DoLoCon) and (weight.rows or weight.cols):
            return None
        return weight.tensors(), {"scale": weight.scale, "axis": weight.axis}

    return dissolve


# [out, *1] or [1, in, *1], which no one pattern says: ``touches`` counts the lengths
_LENGTHS = Slot(name="magnitude", dims="*lengths")
_SOURCE = "https://arxiv.org/abs/2402.09353"

DORA_LOHA = Kind(
    name="dora-loha",
    title="DoRA over LoHa",
    source=_SOURCE,
    slots=(*loha.LOHA.slots, _LENGTHS),
    deltas=(DoLoHa,),
    touches=_touches(loha.touches),
    build=build_loha,
    dissolve=_dissolve(DoLoHa),
)
DORA_LOKR = Kind(
    name="dora-lokr",
    title="DoRA over LoKr",
    source=_SOURCE,
    slots=(*lokr.LOKR.slots, _LENGTHS),
    deltas=(DoLoKr,),
    touches=_touches(lokr.touches),
    build=build_lokr,
    dissolve=_dissolve(DoLoKr),
)
DORA_LOCON = Kind(
    name="dora-locon",
    title="DoRA over LoCon",
    source=_SOURCE,
    slots=(*locon.LOCON.slots, _LENGTHS),
    deltas=(DoLoCon,),
    touches=_touches(locon.touches),
    build=build_locon,
    dissolve=_dissolve(DoLoCon),
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in decomposed kinds."""
    return [DORA_LOHA, DORA_LOKR, DORA_LOCON]
