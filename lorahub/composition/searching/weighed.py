"""Changes at weights that are tensors, through which gradients flow; and which targets share such a weight.

As LoRA Soups' CAT learns them (https://arxiv.org/abs/2410.13025): a weight for each adapter in each layer multiplies
the whole change, and factors stay as they are.  Knows deltas and targets; no models, no training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, final

from lorahub.bases.layout import Target
from lorahub.bases.site import Site
from lorahub.deltas.delta import Delta, Index, LowRank
from lorahub.errors import UnsupportedKind
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["GRANULARITIES", "Granularity", "Group", "groups_of", "on_device", "weighed"]

Granularity: TypeAlias = Literal["layer", "target", "adapter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Targets of one adapter that share a weight.

    Attributes:
        label: what they have in common ("model.layers.0"), or "" for all.
        targets: which, sorted.
        filters: patterns that fit them and no other target of a model.
    """

    label: str
    targets: tuple[Target, ...]
    filters: tuple[str, ...]


def groups_of(targets: Collection[Target], granularity: Granularity) -> tuple[Group, ...]:
    """The targets of one adapter by what shares a weight.

    A layer is what a name has up to its first number (``encoder.layer.0``); a module without one is a layer by itself.
    """
    found: dict[str, list[Target]] = {}
    for target in sorted(targets):
        found.setdefault(GRANULARITIES[granularity](target), []).append(target)
    return tuple(
        Group(label=label, targets=tuple(each), filters=_filters(granularity, label, each))
        for label, each in found.items()
    )


def _layer(target: Target) -> str:
    parts = target.module.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    path = ".".join(parts[: number + 1])
    return f"{target.component}:{path}" if target.component else path


GRANULARITIES: Mapping[Granularity, Callable[[Target], str]] = {
    "layer": _layer,
    "target": lambda target: target.name,
    "adapter": lambda _target: "",
}
"""What shares a weight -> the label that targets have alike then."""


def _filters(granularity: Granularity, label: str, targets: Collection[Target]) -> tuple[str, ...]:
    if granularity == "adapter":
        return ("*",)
    if granularity == "layer" and label.rpartition(":")[2].rpartition(".")[2].isdecimal():
        return (f"{label}.*",)
    return tuple(target.name for target in targets)  # a pattern of the module would fit what lies below it too


def weighed(delta: Delta, weight: torch.Tensor) -> Delta:
    """The change times a tensor of no axes, which may change in place and want gradients.

    Where the change has factors, ``up`` is multiplied: what its gradient takes is of the rank's size.
    """
    return (_Sum if delta.additive else _Bent)(weight, _Box(delta))


@final
class _Box:
    """A delta that is named, and not printed, where its holder is."""

    __slots__ = ("delta",)

    def __init__(self, delta: Delta) -> None:
        self.delta = delta

    def __repr__(self) -> str:
        return self.delta.kind


@dataclass(frozen=True, slots=True, eq=False)
class _Weighed(Delta):
    """``weight * delta``."""

    weight: torch.Tensor
    box: _Box

    kind = "weighed"

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The whole change times the weight, whatever its kind."""
        return self.box.delta.delta(weight, **siblings) * self.weight.to(weight)

    def region(self, rows: Index, cols: Index) -> Self:
        """The same region of the change."""
        return type(self)(self.weight, _Box(self.box.delta.region(rows, cols)))

    def expert(self, position: int) -> Delta:
        """The change of one matrix of the stack, at the same weight."""
        return type(self)(self.weight, _Box(self.box.delta.expert(position)))

    def low_rank(self) -> LowRank | None:
        """The factors, ``up`` times the weight in float32 at least."""
        low = self.box.delta.low_rank()
        if low is None:
            return None
        wide = low.up.to(torch.promote_types(low.up.dtype, torch.float32))
        return LowRank(wide * self.weight.to(wide), low.down, low.scale)

    def contribution(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor | None:
        """What the change adds, times the weight."""
        found = self.box.delta.contribution(x, y, site)
        return None if found is None else found * self.weight.to(found)

    def shape(self) -> tuple[int, ...] | None:
        """That of the change."""
        return self.box.delta.shape()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those of the change, and the weight."""
        return {"": self.weight, **self.box.delta.tensors()}

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Not of itself."""
        raise UnsupportedKind("a weighed change is made of another one: weighed(delta, weight)")

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Not of itself."""
        raise UnsupportedKind("a weighed change is made of another one: weighed(delta, weight)")


@final
class _Sum(_Weighed):
    """Of a change that does not look at the weight's values."""

    __slots__ = ()
    additive = True


@final
class _Bent(_Weighed):
    """Of a change that does."""

    __slots__ = ()
    additive = False


def on_device(delta: Delta, device: torch.device) -> Delta:
    """The delta with its tensors there; itself where they are."""
    tensors = delta.tensors()
    if all(tensor.device == device for tensor in tensors.values()):
        return delta
    return replace(delta, **{name: tensor.to(device) for name, tensor in tensors.items()})  # type: ignore[type-var]  # every delta is a dataclass
