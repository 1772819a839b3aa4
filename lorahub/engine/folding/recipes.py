"""What happens to rows over which the same ingredients are active: nothing, a new value, or a sum.

What a recipe can do besides folding is said by its class: ``Notable`` ones note the way back in passing, ``Launchable``
ones let a device fold their rows in one launch with those of others.  Changes of low rank alone are summed in a way
that depends on the mode (``rounding``).  Knows no plans, files or models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, final

from lorahub.deltas.delta import ALL, Delta
from lorahub.engine.crew import Workspace
from lorahub.engine.folding.sums import Change, Sums
from lorahub.engine.folding.windows import sample
from lorahub.engine.kernels.merge_c import Notes
from lorahub.engine.kernels.patches import Patch
from lorahub.lazy import torch

__all__ = [
    "Factors",
    "Keep",
    "Launchable",
    "Launching",
    "Notable",
    "Noting",
    "Put",
    "Recipe",
    "Stretch",
    "Sum",
    "joined",
    "leading",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Consecutive rows of a recipe that are folded in one go.

    Attributes:
        rows: which, counted from the recipe's first.
        windows: what is summed at a time, counted from the stretch's first row.
        before: these rows of the untouched weight, or None where the result does not depend on it.
        out: where they go, in storage dtype; may be the memory of ``before``.
        first: how many elements of the stored parameter lie before them.
        space: scratch memory.
    """

    rows: slice
    windows: tuple[slice, ...]
    before: torch.Tensor | None
    out: torch.Tensor
    first: int
    space: Workspace

    def parts(self) -> Iterator[Stretch]:
        """The stretch window by window."""
        wide = self.out[0].numel()
        for window in self.windows:
            yield Stretch(
                rows=slice(self.rows.start + window.start, self.rows.start + window.stop),
                windows=(slice(0, window.stop - window.start),),
                before=None if self.before is None else self.before[window],
                out=self.out[window],
                first=self.first + window.start * wide,
                space=self.space,
            )

    def start(self, pick: slice, dtype: torch.dtype) -> torch.Tensor:
        """A copy of some rows as they would be stored with nothing added to them: what changes are measured from."""
        return self.untouched[pick].to(self.out.dtype).to(self.out.device, dtype, copy=True)

    @property
    def untouched(self) -> torch.Tensor:
        """``before``, where it is known to be there."""
        assert self.before is not None
        return self.before

    @property
    def lies_together(self) -> bool:
        """Whether the rows before and after are contiguous."""
        return self.out.is_contiguous() and self.untouched.is_contiguous()

    @property
    def stays(self) -> bool:
        """Whether the rows have one dtype and one device before and after."""
        return self.untouched.dtype == self.out.dtype and self.untouched.device == self.out.device

    def patch(self, up: torch.Tensor, down: torch.Tensor, scale: float, saved: torch.Tensor | None) -> Patch:
        """``scale * up @ down`` onto these rows, which lie together and stay, as a device's kernel takes it."""
        shape = len(self.out), -1
        return Patch(
            weight=self.out.view(shape),
            up=up,
            down=down,
            scale=scale,
            before=None if self.out.data_ptr() == self.untouched.data_ptr() else self.untouched.view(shape),
            saved=None if saved is None else saved.view(shape),
        )

    def scratch(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """Scratch memory in the shape of ``out``."""
        return self.space.take(name, self.out.shape, dtype, self.out.device)

    def together(self) -> Stretch:
        """The stretch where its rows are contiguous: itself, or a copy in scratch memory; see ``take``."""
        if self.lies_together:
            return self
        before = self.scratch("before", self.out.dtype).copy_(self.untouched)
        return replace(self, before=before, out=self.scratch("out", self.out.dtype))

    def take(self, other: Stretch) -> None:
        """Take over the result of what ``together`` gave."""
        if other is not self:
            self.out.copy_(other.out)


class Recipe(Protocol):
    """What happens to some rows."""

    def fold(self, at: Stretch, sums: Sums) -> Change:
        """Fold a stretch; whether the result is finite is looked at by the caller."""


@final
@dataclass(frozen=True, slots=True)
class Noting:
    """A stretch that is ready to be folded with the way back noted; nothing is written yet.

    Attributes:
        write: folds it; takes notes, and how many elements were noted there before; whether all results are finite.
        change: what became of the weights, after ``write``.
    """

    write: Callable[[Notes, int], bool]
    change: Callable[[], Change]


class Notable(ABC):
    """A recipe that can note the way back in the pass that folds."""

    @abstractmethod
    def fold(self, at: Stretch, sums: Sums) -> Change:
        """See ``Recipe``."""

    @abstractmethod
    def noting(self, at: Stretch, sums: Sums) -> Noting | None:
        """The stretch made ready; None where nobody can note the way back, or not of these numbers."""

    @abstractmethod
    def put(self, at: Stretch, sign: float = 1.0) -> None:
        """Do ``sign`` times what ``noting`` does where it can, as it does it, and note nothing."""

    @abstractmethod
    def operands(self, at: Stretch, sign: float = 1.0) -> tuple[torch.Tensor, ...]:
        """What ``put`` of rows on the CPU reads besides these: with the same bits in both, it gives the same bits."""


@final
@dataclass(frozen=True, slots=True)
class Launching:
    """A stretch that is ready to be folded by its device's kernel; nothing is written yet.

    Attributes:
        patch: what the kernel takes.
        suffices: whether its result is as exact as the mode promises, by what happened.
    """

    patch: Patch
    suffices: Callable[[Change], bool]


class Launchable(ABC):
    """A recipe whose stretches a device can fold in one launch with others."""

    @abstractmethod
    def launching(self, at: Stretch, saved: torch.Tensor | None) -> Launching | None:
        """The stretch made ready; None where the device has no kernel for it.

        Args:
            at: the stretch.
            saved: where the kernel puts the untouched rows aside; of the shape and dtype of ``at.out``, contiguous.
        """


@dataclass(frozen=True, slots=True)
class Factors:
    """``weight * up @ down``: ``up`` [rows, r], ``down`` [r, columns], in stored dtypes."""

    up: torch.Tensor
    down: torch.Tensor
    weight: float


def leading(factors: Sequence[Factors]) -> float:
    """The weight that ``joined`` leaves out: the largest, so that no ratio to it overflows; zero where all are."""
    return max((each.weight for each in factors), key=abs)


def joined(factors: Sequence[Factors], device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Up and down of one product that is the sum of all, over the ``leading`` weight; float64 until the end."""
    whole = leading(factors)
    ups, downs = [], []
    for each in factors:
        ratio = each.weight / whole if whole else 1
        ups.append(each.up.to(device, dtype) if ratio == 1 else (each.up.to(device).double() * ratio).to(dtype))
        downs.append(each.down.to(device, dtype))
    if len(factors) == 1:
        return ups[0].contiguous(), downs[0].contiguous()
    return torch.cat(ups, 1), torch.cat(downs)


@final
@dataclass(frozen=True, slots=True)
class Keep(Notable, Launchable):
    """Nothing happens, but for a cast where the result is stored in another dtype."""

    def fold(self, at: Stretch, sums: Sums) -> Change:
        """See ``Recipe``."""
        if at.untouched.dtype == at.out.dtype:
            at.out.copy_(at.untouched)
        else:
            sums.mode.round(at.untouched, at.out, sums.name, at.first)
        return self._measured(at, sums)

    def noting(self, at: Stretch, sums: Sums) -> Noting:
        """See ``Notable``."""

        def write(notes: Notes, _: int) -> bool:
            self.put(at)
            notes.keep(at.out)
            return True  # as in ``fold``: nobody asks of what nothing is done to

        return Noting(write, partial(self._measured, at, sums))

    def put(self, at: Stretch, sign: float = 1.0) -> None:
        """See ``Notable``."""
        if at.out.data_ptr() != at.untouched.data_ptr():
            at.out.copy_(at.untouched)

    def operands(self, at: Stretch, sign: float = 1.0) -> tuple[torch.Tensor, ...]:
        """See ``Notable``."""
        return ()

    def launching(self, at: Stretch, saved: torch.Tensor | None) -> Launching | None:
        """See ``Launchable``: a product of no factors."""
        if not at.stays or not at.lies_together:
            return None
        rows, columns = len(at.out), at.out[0].numel()
        up, down = (
            torch.empty(shape, dtype=torch.float32, device=at.out.device) for shape in ((rows, 0), (0, columns))
        )
        return Launching(at.patch(up, down, 0.0, saved), lambda _: True)

    @staticmethod
    def _measured(at: Stretch, sums: Sums) -> Change:
        if not at.out.is_floating_point():
            return Change()
        pick, share = sample(at.out.shape)
        some = at.start(pick, sums.dtype).reshape(-1)
        return Change(float(torch.dot(some, some)) * share)


@final
@dataclass(frozen=True, slots=True)
class Put:
    """A replacement alone: its value is copied, with one rounding where it is stored wider."""

    value: torch.Tensor

    def fold(self, at: Stretch, sums: Sums) -> Change:
        """See ``Recipe``."""
        value = self.value[at.rows]
        pick, share = sample(at.out.shape)
        measured = at.before is not None and at.out.is_floating_point()
        kept = at.start(pick, sums.dtype) if measured else None
        if value.is_floating_point() and value.dtype.itemsize > at.out.dtype.itemsize:
            sums.mode.round(value.to(at.out.device), at.out, sums.name, at.first)
        else:
            at.out.copy_(value)
        if kept is None:
            return Change()
        return Change.of(kept, sums.cast(value[pick]) - kept, sums.cast(at.out[pick]), share)


@final
class Sum:
    """Anything: a value or the weights as they were, and all that is added to them."""

    def __init__(
        self,
        value: torch.Tensor | None,
        factors: Sequence[Factors],
        deltas: Sequence[tuple[float, Delta]],
        sums: Sums,
    ) -> None:
        self._value, self._deltas = value, deltas
        self._product = (*joined(factors, sums.device, sums.dtype), leading(factors)) if factors else None

    def fold(self, at: Stretch, sums: Sums) -> Change:
        """See ``Recipe``."""
        change = Change()
        for part in at.parts():
            change += self._window(part, sums)
        return change

    def _window(self, at: Stretch, sums: Sums) -> Change:
        pick, share = sample(at.out.shape)
        untouched, kept = at.scratch("untouched", sums.dtype).copy_(at.untouched), at.start(pick, sums.dtype)
        total = at.scratch("total", sums.dtype)
        total.copy_(untouched if self._value is None else self._value[at.rows])
        if self._product is not None:
            up, down, weight = self._product
            total.view(total.shape[0], -1).addmm_(up[at.rows], down, alpha=weight)
        for weight, delta in self._deltas:
            total.add_(delta.region(at.rows, ALL).delta(untouched), alpha=weight)
        sums.mode.round(total, at.out, sums.name, at.first)
        return Change.of(kept, total[pick] - untouched[pick], sums.cast(at.out[pick]), share)
