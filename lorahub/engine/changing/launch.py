"""Rows of many parameters folded together by their device's kernel, which takes hold of what they held as it goes.

On a device that has a kernel (``kernels.choice``), for weights that are copied there or have a journal.  What cannot go
along, or would not be exact enough, is folded by itself.  Knows no plans and no policies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

from lorahub.engine.changing.arranged import Folds
from lorahub.engine.crew import Workspace
from lorahub.engine.folding.fold import Change, Fold, Unit
from lorahub.engine.folding.recipes import Launching
from lorahub.engine.kernels.choice import merger, noter
from lorahub.engine.kernels.patches import Merge, Outcome, Patch, batches
from lorahub.engine.rounding.fast import has_kernel
from lorahub.engine.undoing.checksum import checksums
from lorahub.engine.undoing.copies import Copies
from lorahub.engine.undoing.journal import Journal
from lorahub.engine.undoing.keeper import Keeper
from lorahub.engine.undoing.noted import Ready, look, ready, write
from lorahub.lazy import torch

__all__ = ["Launch", "launch_for"]

Told: TypeAlias = "Callable[[str, slice, Change], None]"
"""Takes a parameter, some of its rows, and what became of them."""


class Launch(ABC):
    """Parameters of one device that are put into it are all folded or none; but for those that ``run`` leaves."""

    def __init__(self, folds: Folds) -> None:
        """Nothing is put into it yet.

        Args:
            folds: of what is done; they may remember what was made ready for it.
        """
        self._folds = folds

    @abstractmethod
    def take(self, keeper: Keeper, fold: Fold) -> bool:
        """Take a parameter along; False, with nothing done, where its rows cannot all be folded by the kernel.

        Args:
            keeper: its, of the class that ``launch_for`` was asked for; nothing of it was written yet.
            fold: what is done to it.
        """

    @abstractmethod
    def run(self, told: Told, space: Workspace) -> Sequence[str]:
        """Fold all rows, tell what became of them, and have their keepers know.

        Whatever is raised, the rows hold then what they held before anything was merged, and no keeper knows them.

        Returns:
            The parameters that were left as they were, since they want wider sums than the kernel has.

        Raises:
            NotFinite: as ``Fold.run``.
        """


def launch_for(keeper: Keeper, *, merged: bool) -> type[Launch] | None:
    """What folds a parameter together with others; None where it is folded by itself.

    Args:
        keeper: of what is about to be merged.
        merged: something is merged there now.
    """
    device, storage = keeper.tensor.device, keeper.tensor.dtype
    if isinstance(keeper, Copies) and keeper.copy.device == device and (keeper.full or not merged):
        return _Copying if has_kernel(device, storage) else None
    if isinstance(keeper, Journal) and not merged:  # otherwise what was there is restored a parameter at a time
        return _Noting if has_kernel(device, storage) and noter(device, storage).name != "torch" else None
    return None


@final
@dataclass(frozen=True, slots=True)
class _Entry:
    """Some rows of a parameter that go along."""

    keeper: Copies
    fold: Fold
    unit: Unit
    parts: tuple[Launching, ...]

    @property
    def live(self) -> torch.Tensor:
        """The rows in the model."""
        return self.keeper.tensor[self.unit.rows]

    @property
    def copy(self) -> torch.Tensor:
        """What they held before anything was merged: after the launch, if not before."""
        return self.keeper.copy[self.unit.rows]


@final
class _Copying(Launch):
    """One launch, which puts aside what rows held, or reads what was put aside."""

    def __init__(self, folds: Folds) -> None:
        super().__init__(folds)
        self._entries: list[_Entry] = []

    def take(self, keeper: Keeper, fold: Fold) -> bool:
        """See ``Launch``."""
        assert isinstance(keeper, Copies)
        lies = keeper.tensor.data_ptr(), keeper.copy.data_ptr(), keeper.full
        parts = self._folds.remember(("parts", keeper.name), lies, lambda: _parts(keeper, fold))
        if parts is None:
            return False
        self._entries += [_Entry(keeper, fold, unit, own) for unit, own in zip(fold.units, parts, strict=True)]
        return True

    def run(self, told: Told, space: Workspace) -> Sequence[str]:
        """See ``Launch``; what wants wider sums is folded again, from what was put aside."""
        patches = [part.patch for entry in self._entries for part in entry.parts]
        outcomes: dict[int, Outcome] = {}  # by position among the patches
        try:
            devices = frozenset(patch.weight.device for patch in patches)
            same = tuple(map(id, patches))  # which launches hold, so that no other ones can be called so
            for numbers, merge in self._folds.remember(("launches", devices), same, lambda: _ready(patches)):
                outcomes |= zip(numbers, merge(), strict=True)
            found = iter([outcomes[number] for number in range(len(patches))])
            for entry in self._entries:
                told(entry.keeper.name, entry.unit.rows, _settle(entry, [next(found) for _ in entry.parts], space))
            marks = checksums([entry.live for entry in self._entries])
            for entry, mark in zip(self._entries, marks, strict=True):
                entry.keeper.mark(entry.unit.rows, mark)
        except BaseException:
            _give_back(patches, outcomes)
            for entry in self._entries:
                entry.keeper.forget(entry.unit.rows)
            raise
        return ()


@final
class _Noting(Launch):
    """A launch that looks and one that writes, and notes the way back."""

    def __init__(self, folds: Folds) -> None:
        super().__init__(folds)
        self._entries: list[tuple[Journal, Ready]] = []

    def take(self, keeper: Keeper, fold: Fold) -> bool:
        """See ``Launch``."""
        assert isinstance(keeper, Journal)
        found = [ready(fold, unit, keeper.tensor[unit.rows], None) for unit in fold.units]
        if None in found:
            return False
        self._entries += [(keeper, each) for each in found if each is not None]
        return True

    def run(self, told: Told, space: Workspace) -> Sequence[str]:
        """See ``Launch``."""
        foreseen = look([each for _, each in self._entries])
        left = {keeper.name for (keeper, _), own in zip(self._entries, foreseen, strict=True) if own is None}
        going = [
            (keeper, each, own)
            for (keeper, each), own in zip(self._entries, foreseen, strict=True)
            if own is not None and keeper.name not in left
        ]
        entries = write([(each, own) for _, each, own in going])
        for (keeper, each, _), entry in zip(going, entries, strict=True):
            keeper.enter(each.unit.rows, entry.tiles, entry.before, entry.after)
            told(keeper.name, each.unit.rows, entry.change)
        return sorted(left)


def _parts(keeper: Copies, fold: Fold) -> list[tuple[Launching, ...]] | None:
    """The units of a parameter as its device's kernel takes them; None where it does not take them all."""
    result: list[tuple[Launching, ...]] = []
    for unit in fold.units:
        live, copy = keeper.tensor[unit.rows], keeper.copy[unit.rows]
        before, saved = (copy, None) if keeper.full else (live, copy)
        parts = fold.launching(unit, before, live, saved)
        if parts is None:
            return None
        result.append(tuple(parts))
    return result


def _ready(patches: Sequence[Patch]) -> list[tuple[Sequence[int], Merge]]:
    """Launches for patches: the positions of those that each merges, and what does it; they hold the patches."""
    result: list[tuple[Sequence[int], Merge]] = []
    for numbers in batches(patches):
        some = [patches[number] for number in numbers]
        result.append((numbers, merger(some[0].weight.device, some[0].weight.dtype).run(some)))
    return result


def _settle(entry: _Entry, outcomes: Sequence[Outcome], space: Workspace) -> Change:
    """What became of some rows; where the kernel's result does not do, they are folded again by themselves."""
    pairs = list(zip(entry.parts, outcomes, strict=True))
    if all(outcome.finite and part.suffices(outcome.change) for part, outcome in pairs):
        return sum((outcome.change for outcome in outcomes), Change())
    return entry.fold.run(entry.unit, entry.copy, entry.live, space)


def _give_back(patches: Sequence[Patch], written: dict[int, Outcome]) -> None:
    for number, patch in enumerate(patches):
        if patch.before is not None:
            patch.weight.copy_(patch.before)
        elif number in written:
            assert patch.saved is not None
            patch.weight.copy_(patch.saved)
