"""GLoRA as LyCORIS has it: a change of low rank of the inputs, and one of the weight.

``scale * (W @ a1 @ a2 + b1 @ b2)`` on the inputs' axis of ``W`` (https://arxiv.org/abs/2306.07967), ``b`` with a core
between its factors where there is one.  Releases before 2.0 stored every pair the other way round (``a2`` before
``a1``); the shapes tell.  PEFT's GLoRA multiplies elementwise, and is another kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.deltas.delta import ALL, Delta, Index, take
from lorahub.deltas.factors import pointwise, scale_of
from lorahub.deltas.fit import expect_matrix
from lorahub.deltas.kind import JSON, Group, Kind, Slot, TensorRef, Touch
from lorahub.deltas.tucker import core_times
from lorahub.errors import BaseMismatch, NotLocal
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch
from lorahub.shapes import Binding, ShapeMisfit, unify

if TYPE_CHECKING:
    from typing import Self

__all__ = ["LYCORIS_GLORA", "Mixed", "rank_of"]


@final
@dataclass(frozen=True, slots=True, eq=False)
class Mixed(Delta):
    """``scale * (W @ a1 @ a2 + b1 @ b2)``.

    Attributes:
        a1: ``[in, r, *1]``.
        a2: ``[r, in, *1]``.
        b1: ``[out, r, *1]``.
        b2: ``[r, in, *k]``, or ``[r, in, *1]`` beside a core.
        scale: ``alpha / r``.
        core: ``[r, r, *k]``, or None.
    """

    a1: torch.Tensor
    a2: torch.Tensor
    b1: torch.Tensor
    b2: torch.Tensor
    scale: float
    core: torch.Tensor | None = None

    kind: ClassVar[str] = "lycoris-glora"
    additive: ClassVar[bool] = False

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The change, in the weight's dtype.

        Raises:
            BaseMismatch: the weight has other sizes.
        """
        kernel = (self.b2 if self.core is None else self.core).shape[2:]
        if tuple(weight.shape) != (self.b1.shape[0], self.a1.shape[0], *kernel):
            raise BaseMismatch(
                f"a lycoris-glora delta for {[self.b1.shape[0], self.a1.shape[0], *kernel]} was given a weight "
                f"{list(weight.shape)}"
            )
        a1, a2, b1, b2 = (each.flatten(1).to(weight) for each in (self.a1, self.a2, self.b1, self.b2))
        mixed = (weight.movedim(1, -1) @ a1 @ a2).movedim(-1, 1)
        if self.core is not None:
            b2 = core_times(self.core.to(weight), b2)
        return (mixed + (b1 @ b2).reshape(weight.shape)).mul_(self.scale)

    def region(self, rows: Index, cols: Index) -> Self:
        """Any rows.

        Raises:
            NotLocal: the columns are cut: ``a`` mixes the inputs.
        """
        if cols != ALL:
            raise NotLocal("a lycoris-glora delta mixes the inputs of a weight; it cannot be cut across them")
        return replace(self, b1=take(self.b1, rows, 0))

    def shape(self) -> tuple[int, ...]:
        """``[out, in, *k]``."""
        return (self.b1.shape[0], self.a1.shape[0], *(self.b2 if self.core is None else self.core).shape[2:])

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """``a2`` and ``b2`` of zeros, normal everything else; scale 1.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        made = cls.example(shape, r=r, generator=generator)
        b2 = torch.zeros(r, *shape[1:], device=generator.device)
        return cls(made.a1, torch.zeros_like(made.a2), made.b1, b2, 1.0)

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Normal tensors; beside a convolution with a core or without.

        Raises:
            BaseMismatch: ``shape`` is no weight ``[out, in, *k]``.
        """
        out, width, _ = expect_matrix("lycoris-glora", shape)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=generator.device)

        pairs = (pointwise(width, r, shape), pointwise(r, width, shape), pointwise(out, r, shape))
        a1, a2, b1 = (normal(*size) for size in pairs)
        if len(shape) > 2 and int(torch.randint(2, (), generator=generator, device=generator.device)):
            return cls(a1, a2, b1, normal(*pointwise(r, width, shape)), 0.3 / r, normal(r, r, *shape[2:]))
        return cls(a1, a2, b1, normal(r, *shape[1:]), 0.7 / r)


_NEW = {"a1": "in r *1", "a2": "r in *1", "b1": "out r *1", "b2": "r in *k"}
_OLD = {"a2": "in r *1", "a1": "r in *1", "b2": "out r *1", "b1": "r in *k"}
_NEW_CORE = {**_NEW, "b2": "r in *1", "core": "r r *k"}
_OLD_CORE = {**_OLD, "b1": "r in *1", "core": "r r *k"}


def order_of(slots: Mapping[str, TensorRef]) -> tuple[Mapping[str, str], Binding]:
    """What the axes of the tensors are, and their sizes.

    Beside a square weight either order fits; then the rank is the smaller size.

    Raises:
        ShapeMisfit: neither fits, or all tensors are square.
    """
    forms = (_NEW_CORE, _OLD_CORE) if "core" in slots else (_NEW, _OLD)
    fitting: list[tuple[Mapping[str, str], Binding]] = []
    fault = None
    for form in forms:
        bound: Binding = {}
        try:
            for name, pattern in form.items():
                bound = unify(pattern, slots[name].shape, bound, name=slots[name].key)
        except ShapeMisfit as misfit:
            fault = fault or misfit
        else:
            fitting.append((form, bound))
    if not fitting:
        raise fault or ShapeMisfit("it has no factors")
    if len(fitting) == 1:
        return fitting[0]
    narrow = [each for each in fitting if _size(each[1], "r") < _size(each[1], "in")]
    if len(narrow) != 1:
        raise ShapeMisfit(f"{slots['a1'].key} and its like are all square, in the old order or in the new one")
    return narrow[0]


def _size(bound: Binding, name: str) -> int:
    size = bound[name]
    assert isinstance(size, int)
    return size


def rank_of(slots: Mapping[str, TensorRef]) -> int:
    """The rank, whichever order the factors are in.

    Raises:
        ShapeMisfit: they do not fit together.
    """
    return _size(order_of(slots)[1], "r")


def touches(group: Group) -> tuple[Touch, ...]:
    """The weight.

    Raises:
        ShapeMisfit: the factors do not fit together, in either order, or fit in both.
    """
    form, bound = order_of(group.slots)
    kernel = bound["k"]
    sizes = [bound["out"], bound["in"], *(kernel if isinstance(kernel, tuple) else ())]
    return (
        Touch(
            parameter="weight",
            dims=" ".join(map(str, sizes)),
            slots=tuple(form),
            additive=False,
            rank=_size(bound, "r"),
        ),
    )


def build(group: Group, tensors: Mapping[str, torch.Tensor]) -> dict[str, Delta]:
    """The weight's delta, its factors in the new order."""
    old = order_of(group.slots)[0] in (_OLD, _OLD_CORE)
    a1, a2, b1, b2 = (tensors[name] for name in (("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")))
    return {"weight": Mixed(a1, a2, b1, b2, scale_of(group), tensors.get("core"))}


def dissolve(deltas: Mapping[str, Delta]) -> tuple[dict[str, torch.Tensor], dict[str, JSON]] | None:
    """The inverse of ``build``, in the new order."""
    match dict(deltas):
        case {"weight": Mixed() as weight, **others} if not others:
            return weight.tensors(), {"scale": weight.scale, "rank": weight.a2.shape[0]}
    return None


LYCORIS_GLORA = Kind(
    name="lycoris-glora",
    title="GLoRA as LyCORIS has it",
    source="https://arxiv.org/abs/2306.07967",
    # which axis is which depends on the release that wrote them: ``touches`` binds them
    slots=(
        *(Slot(name=name, dims=f"*{name}") for name in _NEW),
        Slot(name="core", dims="*core", optional=True),
    ),
    deltas=(Mixed,),
    touches=touches,
    build=build,
    dissolve=dissolve,
)


@hookimpl
def lorahub_kinds() -> list[Kind]:
    """The built-in GLoRA of LyCORIS."""
    return [LYCORIS_GLORA]
