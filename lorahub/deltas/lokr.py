"""LoKr: the Kronecker product of two small matrices (https://arxiv.org/abs/2309.14859).

``scale * kron(w1, w2)`` with ``w1`` ``[a, c]`` and ``w2`` ``[b, d, *k]`` for a weight ``[a b, c d, *k]``.  Either may
be kept whole or as a product of factors of rank r, and ``w2`` also as a core between two factors; which of them it is,
the tensors say.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas import lokr_starting, peft_lokr
from lorahub.deltas.cut import Cuts, cut, positions, then
from lorahub.deltas.delta import ALL, Delta, Index, LowRank
from lorahub.deltas.factors import scale_of
from lorahub.deltas.fit import bind_slots, expect_matrix
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, Slot, Spelling, Touch
from lorahub.deltas.peft_lokr import factorization, rank_of
from lorahub.deltas.tucker import core_dims, core_fits, core_shape, core_times
from lorahub.errors import BaseMismatch, NotLocal
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch
from lorahub.shapes import ShapeMisfit

if TYPE_CHECKING:
    from typing import Self

    from lorahub.bases.site import Site

__all__ = ["LOKR", "LoKr"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class LoKr(Delta):
    """``scale * kron(w1, w2)``.

    Attributes:
        scale: ``alpha / r``.
        w1: ``[a, c]``; or None, and its factors
        w1_a, w1_b: ``[a, s]`` and ``[s, c]``.
        w2: ``[b, d, *k]``; or None, and its factors
        w2_a, w2_b: ``[b, r]`` and ``[r, d * prod(k)]``; beside a core ``[r, b]`` and ``[r, d]``.
        t2: the core ``[r, r, *k]``, or None.
        trailing: ``w1`` stands against the last two of the three axes of ``w2``, not the first two; see ``peft_lokr``.
        rows, cols: cuts still to be made; see ``cut``.
    """

    scale: float
    w1: torch.Tensor | None = None
    w1_a: torch.Tensor | None = None
    w1_b: torch.Tensor | None = None
    w2: torch.Tensor | None = None
    w2_a: torch.Tensor | None = None
    w2_b: torch.Tensor | None = None
    t2: torch.Tensor | None = None
    trailing: bool = False
    rows: Cuts = ()
    cols: Cuts = ()

    kind: ClassVar[str] = "lokr"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The weight gives shape, dtype and device only.

        Raises:
            BaseMismatch: it is no weight of the sizes the factors have.
        """
        kernel = tuple(weight.shape[2:])
        left, right = (_product(parts) for parts in self._sides(weight.dtype, weight.device))
        (a, c), (b, flat) = left.shape, right.shape
        count = math.prod(kernel)
        if weight.dim() < 2 or not self._knows(kernel) or flat % count:
            raise BaseMismatch(f"a lokr delta of [{a}, {c}] and [{b}, {flat}] was given a weight {list(weight.shape)}")
        out, width = a * b, c * (flat // count)
        rows, cols = (positions(size, cuts, weight.device) for size, cuts in ((out, self.rows), (width, self.cols)))
        if tuple(weight.shape[:2]) != (len(rows), len(cols)):
            raise BaseMismatch(
                f"a lokr delta for {[len(rows), len(cols), *kernel]} was given a weight {list(weight.shape)}"
            )
        if self.trailing:
            change = _kron(left, right.reshape(b, -1, count))
        elif self.rows and not self.cols:
            change = left[rows // b][:, :, None] * right[rows % b][:, None, :]
        elif self.cols:
            right = right.reshape(b, -1, count)
            first = left[rows // b][:, cols // right.shape[1]]
            change = first[:, :, None] * right[rows % b][:, cols % right.shape[1]]
        else:
            change = _kron(left, right)
        return change.mul_(self.scale).reshape(weight.shape)

    def _knows(self, kernel: tuple[int, ...]) -> bool:
        """Whether the weight's kernel is the one that the tensors are for, as far as they tell."""
        if self.t2 is not None:
            return core_fits(self.t2, kernel)
        return self.w2 is None or self.w2.dim() == 2 or tuple(self.w2.shape[2:]) == kernel

    def _sides(self, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
        """``w1`` and ``w2``, each as one matrix or as two to be multiplied; ``w2`` flattened, ``[b, d * prod(k)]``."""
        for whole, one, other in ((self.w1, self.w1_a, self.w1_b), (self.w2, self.w2_a, self.w2_b)):
            if whole is not None:
                yield (whole.flatten(1).to(device, dtype),)
                continue
            assert one is not None
            assert other is not None  # ``touches`` saw to it
            left, right = one.to(device, dtype), other.to(device, dtype)
            if self.t2 is not None and one is self.w2_a:
                left, right = left.T, core_times(self.t2.to(device, dtype), right)
            yield left, right

    def region(self, rows: Index, cols: Index) -> Self:
        """Any rows and columns.

        Raises:
            NotLocal: the axes are ``trailing``, so that neighbours in the weight come from everywhere.
        """
        if self.trailing and (rows != ALL or cols != ALL):
            raise NotLocal("a lokr delta for a Conv1d as PEFT multiplies it out cannot be cut")
        return replace(self, rows=then(self.rows, rows), cols=then(self.cols, cols))

    def low_rank(self) -> LowRank | None:
        """The Kronecker products of both sides' factors; None where that is not low, or the kernel is not known.

        float64, in which products of two stored numbers of up to 32 bits are exact.
        """
        if self.trailing or self.cols:
            return None
        device = next(iter(self.tensors().values())).device
        (up1, down1), (up2, down2) = (_factors(parts) for parts in self._sides(torch.float64, device))
        rank, size = up1.shape[1] * up2.shape[1], (up1.shape[0] * up2.shape[0], down1.shape[1] * down2.shape[1])
        if rank >= min(size):
            return None
        return LowRank(cut(_kron(up1, up2), self.rows, 0), _kron(down1, down2), self.scale)

    def multiplied_rank(self) -> int:
        """The product of both sides' ranks; a whole matrix has its shorter side for one."""
        sides = self._sides(torch.float64, torch.device("meta"))
        return math.prod(parts[0].shape[1] if len(parts) == 2 else min(parts[0].shape) for parts in sides)

    def contribution(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor | None:
        """One side after the other, which are never multiplied out: inputs ``[c, d]``, outputs ``[a, b]``."""
        if self.trailing or self.rows or self.cols or site.groups > 1:
            return Delta.contribution(self, x, y, site)
        first, second = self._sides(y.dtype, y.device)
        left = _product(first)
        c = left.shape[1]
        if site.op == "embedding":
            b = second[0].shape[0]
            right = _product((torch.nn.functional.embedding(x % b, second[0]), *second[1:]))
            return (left[x // b][..., None] * right[..., None, :]).flatten(-2) * self.scale
        axis = -1 - len(site.kernel)
        inputs = torch.unflatten(x.to(y.dtype), axis, (c, -1))
        if site.op == "linear":
            for part in reversed(second):
                inputs = torch.nn.functional.linear(inputs, part)
            return (left @ inputs).flatten(-2) * self.scale
        planes = inputs.flatten(0, axis - 1)  # every one of the c meets the same kernels
        if len(second) == 1:
            outputs = site.call(planes, second[0].reshape(-1, planes.shape[1], *site.kernel))
        else:
            outputs = site.outer(site.inner(planes, *second), *second)
        outputs = left @ torch.unflatten(outputs, 0, (*x.shape[:axis], c)).flatten(axis)
        return outputs.reshape(y.shape) * self.scale

    def shape(self) -> tuple[int, ...] | None:
        """``[a b, c d, *k]`` where the tensors tell the kernel, else None."""
        whole = self.t2 if self.w2 is None else self.w2
        if whole is None or whole.dim() == 2 or (whole is self.t2 and whole.shape[-1] == 1):
            return None
        kernel = tuple(whole.shape[2:])
        left, right = (_size(parts) for parts in self._sides(torch.float32, torch.device("meta")))
        out, width = left[0] * right[0], left[1] * right[1] // math.prod(kernel)
        cpu = torch.device("cpu")
        return (len(positions(out, self.rows, cpu)), len(positions(width, self.cols, cpu)), *kernel)

    @classmethod
    def of(cls, scale: float, tensors: Mapping[str, torch.Tensor], *, trailing: bool = False) -> Self:
        """A delta of the tensors that are there, by the names of the attributes."""
        w1, w1_a, w1_b, w2, w2_a, w2_b, t2 = (tensors.get(slot) for slot in _SLOTS)
        return cls(scale, w1, w1_a, w1_b, w2, w2_a, w2_b, t2, trailing)

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """PEFT's default start: ``w1`` of zeros, ``w2`` Kaiming uniform, factored where r is small; scale 1.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        a, b, c, d, kernel = _split(shape)
        zeros = torch.zeros(a, c, device=generator.device)

        def uniform(*size: int) -> torch.Tensor:
            bound = 1 / math.sqrt(math.prod(size[1:]))
            return torch.empty(size, device=generator.device).uniform_(-bound, bound, generator=generator)

        if r >= max(b, d) / 2:
            return cls(1.0, w1=zeros, w2=uniform(b, d, *kernel))
        return cls(1.0, w1=zeros, w2_a=uniform(b, r), w2_b=uniform(r, d * math.prod(kernel)))

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal tensors in any of the forms.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        a, b, c, d, kernel = _split(shape)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=generator.device)

        def coin() -> bool:
            return bool(torch.randint(2, (), generator=generator, device=generator.device))

        tensors = {"w1": normal(a, c)} if coin() else {"w1_a": normal(a, r), "w1_b": normal(r, c)}
        trailing = False
        if coin():
            tensors["w2"] = normal(b, d, *kernel)
            trailing = len(kernel) == 1 and coin()
        elif kernel and coin():
            tensors |= {"w2_a": normal(r, b), "w2_b": normal(r, d), "t2": normal(r, r, *core_shape(kernel))}
        else:
            tensors |= {"w2_a": normal(b, r), "w2_b": normal(r, d * math.prod(kernel))}
        return cls.of(0.7, tensors, trailing=trailing)


def _kron(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The Kronecker product of ``left`` and the last two axes of ``right``.

    ``torch.kron`` (2.15) raises on some strides that transposing and ``einsum`` leave behind.
    """
    product = left[:, None, :, None] * right[..., None, :, None, :]
    return product.reshape(*right.shape[:-2], left.shape[0] * right.shape[-2], left.shape[1] * right.shape[-1])


def _product(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else parts[0] @ parts[1]


def _size(parts: tuple[torch.Tensor, ...]) -> tuple[int, int]:
    return parts[0].shape[0], parts[-1].shape[1]


def _factors(parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two factors; the identity beside a whole matrix, on its shorter side."""
    if len(parts) == 2:
        return parts[0], parts[1]
    (whole,) = parts
    eye = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)
    return (eye, whole) if whole.shape[0] <= whole.shape[1] else (whole, eye)


def _split(shape: tuple[int, ...]) -> tuple[int, int, int, int, tuple[int, ...]]:
    out, width, _ = expect_matrix("lokr", shape)
    return *factorization(out, -1), *factorization(width, -1), shape[2:]


_SIDES: Mapping[tuple[str, ...], Mapping[str, str]] = MappingProxyType(
    {
        ("w1",): {"w1": "a c"},
        ("w1_a", "w1_b"): {"w1_a": "a s", "w1_b": "s c"},
        ("w2",): {"w2": "b d *k"},
        ("w2_a", "w2_b"): {"w2_a": "b r", "w2_b": "r flat"},
        ("w2_a", "w2_b", "t2"): {"w2_a": "r b", "w2_b": "q d", "t2": "r q *k"},
    }
)
"""The tensors that a side can consist of -> what their axes are."""


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight: its rows, and its inputs and kernel as far as the tensors tell them apart.

    Raises:
        ShapeMisfit: a side has too many tensors or too few, or they do not fit together.
    """
    patterns: dict[str, str] = {}
    for side in ("1", "2"):
        present = tuple(slot for slot in _SLOTS if slot in group.slots and slot[1] == side)
        if present not in _SIDES:
            has = ", ".join(f"lokr_{slot}" for slot in present) or "nothing"
            raise ShapeMisfit(f"of the Kronecker factor {side} it has {has}, which makes none")
        patterns |= _SIDES[present]
    size = {name: each for name, each in bind_slots(group, patterns).items() if isinstance(each, int)}
    whole = group.slots.get("w2") or group.slots.get("t2")
    if whole is None:
        trailing = f"*{size['c'] * size['flat']}"
    elif len(whole.shape) == 2:
        trailing = f"*{size['c'] * size['d']}"
    else:
        kernel = core_dims(whole) if "t2" in patterns else " ".join(map(str, whole.shape[2:]))
        trailing = f"{size['c'] * size['d']} {kernel}"
    return (
        Touch(
            parameter="weight",
            dims=f"{size['a'] * size['b']} {trailing}",
            slots=tuple(patterns),
            additive=True,
            local=not group.options.get("trailing"),
            rank=rank_of(group.slots),
        ),
    )


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta."""
    return {"weight": LoKr.of(scale_of(group), tensors, trailing=group.options.get("trailing") is True)}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``; a delta that was cut is no adapter's own any more."""
    match dict(deltas):
        case {"weight": LoKr(rows=(), cols=()) as weight, **others} if not others:
            return weight.tensors(), {"scale": weight.scale, "trailing": weight.trailing}
    return None


_SLOTS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")

LOKR = Kind(
    name="lokr",
    title="LoKr",
    source="https://arxiv.org/abs/2309.14859",
    # each side has one of several forms: ``touches`` binds the one that is there
    slots=tuple(Slot(name=name, dims=f"*{name}", optional=True) for name in _SLOTS),
    deltas=(LoKr,),
    touches=touches,
    build=build,
    dissolve=dissolve,
    spellings=(
        Spelling(
            format="peft",
            tag="LOKR",
            leaves=tuple(Leaf(slot=name, suffix=f"lokr_{name}") for name in _SLOTS),
            fields=peft_lokr.FIELDS,
            options=peft_lokr.options,
            config=peft_lokr.config,
        ),
    ),
    starting=lokr_starting.STARTING,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in LoKr."""
    return [LOKR]
