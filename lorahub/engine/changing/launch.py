"""Rows of many parameters folded in one launch of their device's kernel, which puts aside what they held as it goes.

For weights that are copied to be undone, on a device that has a kernel (``kernels.choice``).  What cannot go along, or
would not be exact enough, is folded by itself.  Knows no plans and no policies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard, final

from lorahub.engine.crew import Workspace
from lorahub.engine.folding.fold import Change, Fold, Unit
from lorahub.engine.folding.recipes import Launching
from lorahub.engine.kernels.choice import merger
from lorahub.engine.kernels.patches import Outcome, Patch, batches
from lorahub.engine.undoing.checksum import checksums
from lorahub.engine.undoing.copies import Copies
from lorahub.engine.undoing.keeper import Keeper
from lorahub.lazy import torch

__all__ = ["Launch", "launches"]

Told: TypeAlias = "Callable[[str, slice, Change], None]"
"""Takes a parameter, some of its rows, and what became of them."""


def launches(keeper: Keeper) -> TypeGuard[Copies]:
    """Whether a parameter may be folded in one launch with others: its device has a kernel, and it is copied there."""
    device = keeper.tensor.device
    return isinstance(keeper, Copies) and keeper.copy.device == device and merger(device).name != "torch"


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
class Launch:
    """One launch; parameters of one device are put into it, and all of them are folded or none."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []

    def take(self, keeper: Copies, fold: Fold) -> bool:
        """Take a parameter along; False, with nothing done, where its rows cannot all be folded by the kernel.

        Args:
            keeper: its, holding a copy of all of it or of nothing.
            fold: what is done to it.
        """
        entries: list[_Entry] = []
        for unit in fold.units:
            live, copy = keeper.tensor[unit.rows], keeper.copy[unit.rows]
            before, saved = (copy, None) if keeper.full else (live, copy)
            parts = fold.launching(unit, before, live, saved)
            if parts is None:
                return False
            entries.append(_Entry(keeper, fold, unit, tuple(parts)))
        self._entries += entries
        return True

    def run(self, told: Told, space: Workspace) -> None:
        """Fold all rows, tell what became of them, and have their keepers know.

        Whatever is raised, the rows hold then what they held before anything was merged, and no keeper knows them.

        Raises:
            NotFinite: as ``Fold.run``.
        """
        patches = [part.patch for entry in self._entries for part in entry.parts]
        outcomes: dict[int, Outcome] = {}  # by position among the patches
        try:
            for numbers in batches(patches):
                some = [patches[number] for number in numbers]
                outcomes |= zip(numbers, merger(some[0].weight.device).run(some), strict=True)
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
