"""The one obligation of an adapter kind: how a weight changes.

A delta is a value: frozen tensors and numbers, and a pure function from the untouched weight to its change.  It
knows nothing of files, models, layouts or other adapters.  Weights are ``[out, in, *k]`` (``*k`` empty for linear
layers; a vector parameter is ``[out]``), factors have rank ``r``.

PEFT's ``lora_A`` is ``down``, ``lora_B`` is ``up``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from lorahub.bases.site import Site
from lorahub.errors import NotLocal, UnsupportedKind
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Around", "Delta", "Directed", "Index", "LowRank", "Route", "ratio", "take"]

Index: TypeAlias = "slice | tuple[int, ...]"
"""Which rows or columns: a slice, or positions in order (a permutation or a selection)."""

ALL = slice(None)


def take(tensor: torch.Tensor, index: Index, dim: int) -> torch.Tensor:
    """``tensor`` restricted to ``index`` along ``dim``: a view for a slice, a copy for positions."""
    if isinstance(index, slice):
        if index == ALL:
            return tensor
        return tensor[(ALL,) * dim + (index,)]
    return tensor.index_select(dim, torch.tensor(index, dtype=torch.long, device=tensor.device))


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change that is exactly ``scale * up @ down``: ``up`` [out, r], ``down`` [r, in * prod(k)], stored dtype."""

    up: torch.Tensor
    down: torch.Tensor
    scale: float


def ratio(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """``wanted / found``; 1 where both are zero.  Equal lengths give exactly 1, and gradients all the same."""
    empty = (wanted == 0) & (found == 0)
    return torch.where(empty, 1.0, wanted / torch.where(empty, 1.0, found))


@dataclass(frozen=True, slots=True)
class Directed:
    """A change that turns every row of the weight and gives it a length: ``ratio(lengths, ||V||) * V``, by rows.

    Attributes:
        low: ``V = W + scale * up @ down``.
        lengths: the new 2-norms of the rows, [out].
    """

    low: LowRank
    lengths: torch.Tensor


@dataclass(frozen=True, slots=True)
class Around:
    """What a changed weight gives, by what the untouched one gives: ``factor * (W inputs(x) + scale * up @ down x)``.

    Attributes:
        factor: along the axis of the outputs, [out]; of an embedding [in]; None: 1.
        low: what is added before the factor, or None.
        inputs: what the module's input becomes, or None.
        change: what acts beside the weight, as ``Delta.delta``, or None.
    """

    factor: torch.Tensor | None = None
    low: LowRank | None = None
    inputs: Callable[[torch.Tensor], torch.Tensor] | None = None
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """How to find the way around a weight, anew at each call, for the delta's tensors change in training.

    Attributes:
        of: from what gives the untouched weight, logical orientation and stored dtype, to what is done instead.
        enters: that is to change the module's inputs, and nothing else.
    """

    of: Callable[[Callable[[], torch.Tensor]], Around]
    enters: bool = False


class Delta(ABC):
    """One adapter's change to one parameter.  Subclasses are frozen dataclasses and final.

    Class attributes:
        kind: the registered name, as ``lora``.
        additive: the change does not look at the weight's values; such deltas commute and add.
        drops: while it trains, inputs of its own path may be dropped (PEFT's ``lora_dropout``).
        reads: names of sibling parameters of the same module whose values the change needs, passed by keyword.
    """

    __slots__ = ()

    kind: ClassVar[str]
    additive: ClassVar[bool]
    drops: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """The change at weight 1.

        Args:
            weight: the untouched parameter, ``[out, in, *k]`` or ``[out]``, float32 or float64.
            siblings: the parameters named in ``reads``, in the same dtype.

        Returns:
            A tensor of the weight's shape, dtype and device.  Pure: ``weight`` is not written to.
        """

    def region(self, rows: Index, cols: Index) -> Self:
        """The delta cut to a region: ``region(r, c).delta(W[r][:, c]) == delta(W)[r][:, c]``.

        Raises:
            NotLocal: an element of the change depends on weights outside its row or column window.
        """
        raise NotLocal(f"a {self.kind} delta cannot be cut to a region of its weight")

    def low_rank(self) -> LowRank | None:
        """The change as exact factors, or None."""
        return None

    def low_rank_for(self, inputs: int) -> LowRank | None:
        """The same of a matrix with so many inputs, for kinds whose tensors serve matrices of several sizes."""
        return self.low_rank()

    def multiplied_rank(self) -> int:
        """The rank of the factors of ``low_rank`` or ``directed`` where products make it more than r; else 0."""
        return 0

    def directed(self) -> Directed | None:
        """The change as new directions and lengths of the weight's rows, or None."""
        return None

    def contribution(self, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor | None:
        """What the change at weight 1 adds to a module's output, for changes that do not look at the weight.

        It is ``site.call(x, delta(W))`` by a shorter way.  Whether there is one follows from delta and site alone, and
        never from ``x`` and ``y``, which may have no rows at all.

        Args:
            x: the module's input, [..., in]; for embeddings ids, for convolutions [batch, in, *places].
            y: its output, which other changes may be in already: for shape, dtype and device, in which it computes.
            site: how the output comes from the weight, of which this is the whole change.

        Returns:
            A tensor like ``y``, through which gradients flow to ``x`` and to factors; or None: use the changed weight.
        """
        low = self.low_rank()
        if low is None:
            return None
        up, down = low.up.to(y), low.down.to(y)
        inputs = x if site.op == "embedding" else x.to(y.dtype)
        return site.outer(site.inner(inputs, up, down) * low.scale, up, down)

    def around(self, site: Site) -> Route | None:
        """How training avoids the changed weight, which would be rounded as the weight is and kept for the way back.

        Whether there is a way follows from delta and site alone.  Through what it gives, gradients flow to the
        delta's tensors.  A change that does not look at the weight can always act beside it.  None: the changed weight
        has to be made.
        """
        return Route(lambda _: Around(change=self.delta)) if self.additive and site.op != "bias" else None

    def expert(self, position: int) -> Delta:
        """The change of one matrix of a stack, for kinds that say so in ``Touch.stacks``.

        Raises:
            NotLocal: it is the change of one matrix.
        """
        raise NotLocal(f"a {self.kind} delta changes one weight, and no stack of experts")

    def strengthened(self, factor: float) -> Self:
        """The delta with its factors multiplied, for kinds that say so in ``Touch.inside``.

        Raises:
            UnsupportedKind: it is no such kind; a weight multiplies the whole change.
        """
        raise UnsupportedKind(f"a {self.kind} delta has no factors to multiply apart from its change")

    def replacement(self) -> torch.Tensor | None:
        """The parameter's whole new value if that is what this delta is, in its stored dtype, or None."""
        return None

    @abstractmethod
    def shape(self) -> tuple[int, ...] | None:
        """The shape of the parameter this delta fits, or None where the tensors alone do not determine it."""

    @classmethod
    @abstractmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """A delta of rank ``r`` for a parameter of ``shape`` that changes nothing yet, ready to train."""

    @classmethod
    @abstractmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """A random valid instance with a change that is not small; the laws run on it."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The delta's own tensors by field name, in declaration order."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))  # type: ignore[arg-type]  # every subclass is a dataclass
        return {name: value for name, value in values if isinstance(value, torch.Tensor)}

    def nbytes(self) -> int:
        """Bytes held by the delta's tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


Deltas: TypeAlias = Mapping[str, Delta]
"""What one module's group of tensors does: parameter name ("weight", "bias", ...) to delta."""
