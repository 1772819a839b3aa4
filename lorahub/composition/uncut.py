"""What a method makes of several adapters, as it is: no factors are cut out of it, and nothing of it is kept.

For merging into a base.  A change is made when a merge asks for it, by the thread that adds it, and goes with the step
that it is for: each thread holds what a method makes of one target.  Knows no files and no base but its weights.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from lorahub.bases.layout import Target
from lorahub.composition.combining import Part, changes_of, order_of
from lorahub.composition.gathering import Mode, Weights, gather
from lorahub.composition.method import Method
from lorahub.composition.multiplicative import multiplies
from lorahub.deltas.delta import ALL, Delta, Index, LowRank, take
from lorahub.deltas.expert_lora import ExpertLoRA
from lorahub.errors import BaseMismatch, UnsupportedKind
from lorahub.lazy import torch

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Uncut", "addable"]


def addable(parts: Sequence[Part], mode: Mode, base: Weights) -> frozenset[Target]:
    """Targets whose changes are added to one matrix or vector of the base.

    Not those of stacks of experts, of values that the base has nothing for, and of changes that stay products: these
    become deltas of their own kinds.

    Raises:
        UnsupportedKind: changes do not go together, or look at the weight where that is refused.
    """
    found = set()
    for target in order_of(parts):
        deltas = [part.delta(target) for part in parts]
        there = [delta for delta in deltas if delta is not None]
        if any(isinstance(delta, ExpertLoRA) or (mode != "dense" and multiplies(delta)) for delta in there):
            continue
        replaced = any(delta.replacement() is not None for delta in there)
        if replaced and base(target) is None:
            continue
        if replaced or (mode != "dense" and not all(delta.additive for delta in there)):
            gather(target, deltas, [1.0] * len(deltas), [0] * len(deltas), mode=mode, base=base)  # raises where not
        found.add(target)
    return frozenset(found)


@final
class Uncut(Mapping[Target, Delta]):
    """The changes by target, each made when its factors, its values or a region of them are asked for.

    A delta holds what was made as long as it lives, and each time it is asked for it is another.  May be asked from
    several threads.

    Attributes:
        content: digest of all that the changes follow from.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        shapes: Mapping[Target, tuple[int, ...]],
        methods: Mapping[Target, Method],
        *,
        content: str,
        rest: Mapping[Target, Delta],
        mode: Mode = "refuse",
        base: Weights | None = None,
        whole: torch.Tensor | None = None,
    ) -> None:
        """Make ready; nothing is combined yet.

        Args:
            parts: the adapters, in order.
            shapes: target -> shape of its parameter, of those that ``addable`` gives.
            methods: how the changes of a target become one.
            content: digest of all that the changes follow from.
            rest: changes of other targets.
            mode: what becomes of changes that look at the weight.
            base: the base's weights.
            whole: what ``whole_for`` gives.
        """
        self.content = content
        self._parts, self._shapes, self._methods, self._rest = tuple(parts), dict(shapes), methods, dict(rest)
        self._mode, self._base, self._whole = mode, base, whole

    def __getitem__(self, target: Target) -> Delta:
        if target in self._rest:
            return self._rest[target]
        return Pending(_Box(self._shapes[target], lambda: self._made(target)), ALL, ALL)

    @property
    def deltas(self) -> Mapping[Target, Delta]:
        """The changes: this itself, as an adapter has them."""
        return self

    def __iter__(self) -> Iterator[Target]:
        return iter((*self._shapes, *self._rest))

    def __len__(self) -> int:
        return len(self._shapes) + len(self._rest)

    def _made(self, target: Target) -> LowRank | torch.Tensor:
        method = self._methods[target]
        gathered, (change,) = changes_of(target, self._parts, method, self._mode, self._base, self._whole)
        if gathered.shape != self._shapes[target]:
            told = f"{list(gathered.shape)}, and the base has {list(self._shapes[target])}"
            raise BaseMismatch(f"{target.name}: the adapters change a weight of shape {told}", "is it the base?")
        return change if isinstance(change, LowRank) else change.reshape(gathered.shape)


@final
class _Box:
    """A change that is made once, when it is asked for; as fields of deltas go, one is like the other."""

    def __init__(self, shape: tuple[int, ...], make: Callable[[], LowRank | torch.Tensor]) -> None:
        self.shape = shape
        self._make: Callable[[], LowRank | torch.Tensor] | None = make
        self._made: LowRank | torch.Tensor | None = None
        self._lock = threading.Lock()

    def made(self) -> LowRank | torch.Tensor:
        """It."""
        with self._lock:
            if self._made is None:
                assert self._make is not None  # let go of only once it has made something
                self._made, self._make = self._make(), None
            return self._made

    def dense(self) -> torch.Tensor:
        """It as a tensor of its shape."""
        made = self.made()
        if not isinstance(made, LowRank):
            return made
        return (made.up.double() @ made.down.double() * made.scale).reshape(self.shape)

    def __repr__(self) -> str:
        return f"uncut {list(self.shape)}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Box) and other.shape == self.shape

    def __hash__(self) -> int:
        return hash(self.shape)


@final
@dataclass(frozen=True, slots=True, eq=False)
class Pending(Delta):
    """A change that is made when it is asked for, or a region of one.

    Attributes:
        box: the whole of it.
        rows: which of its rows.
        cols: which of its columns; a vector has none.
    """

    box: _Box
    rows: Index
    cols: Index

    kind: ClassVar[str] = "full"
    additive: ClassVar[bool] = True

    def delta(self, weight: torch.Tensor, **siblings: torch.Tensor) -> torch.Tensor:
        """A new tensor in the weight's dtype."""
        return self._cut(self.box.dense()).to(weight, copy=True)

    def region(self, rows: Index, cols: Index) -> Self:
        """The same rows and columns of the change; a region of a region is cut from the values."""
        if self.rows == ALL and self.cols == ALL:
            return type(self)(self.box, rows, cols)
        part = self._cut(self.box.dense())
        return type(self)(_Box(tuple(part.shape), lambda: part), rows, cols)

    def low_rank(self) -> LowRank | None:
        """The factors, where the method gave some and this is the whole."""
        made = self.box.made() if len(self.box.shape) > 1 else None
        if not isinstance(made, LowRank):
            return None
        if self.rows != ALL or self.cols != ALL:
            return None if self.cols != ALL else LowRank(take(made.up, self.rows, 0), made.down, made.scale)
        return made

    def shape(self) -> tuple[int, ...]:
        """That of the parameter; of a region, what is left of it."""
        sizes = [*self.box.shape]
        for axis, index in enumerate((self.rows, self.cols)[: len(sizes)]):
            sizes[axis] = len(range(sizes[axis])[index]) if isinstance(index, slice) else len(index)
        return tuple(sizes)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The values."""
        return {"change": self._cut(self.box.dense())}

    def nbytes(self) -> int:
        """Bytes of the values in float32."""
        return 4 * math.prod(self.shape())

    def _cut(self, tensor: torch.Tensor) -> torch.Tensor:
        cut = take(tensor, self.rows, 0)
        return take(cut, self.cols, 1) if cut.dim() > 1 else cut

    @classmethod
    def fresh(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Not of itself."""
        raise UnsupportedKind("a change that is made when it is asked for comes of several: Uncut(parts, ...)")

    @classmethod
    def example(cls, shape: tuple[int, ...], *, r: int, generator: torch.Generator) -> Self:
        """Not of itself."""
        raise UnsupportedKind("a change that is made when it is asked for comes of several: Uncut(parts, ...)")
