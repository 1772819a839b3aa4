"""A journal: what taking a change off again gets wrong, instead of what was there.

Adding a change and rounding, then taking it off and rounding, gives back nearly what was there.  The difference is
recorded when the change is made (``residual``), by doing exactly what undoing will do.  It is exact as long as the
same arithmetic gives the same bits, which a checksum of what was there proves before anything is written.  Serves
changes that do not look at the weight.

Where a compiled kernel folds, it notes the difference on its way, and no copy of what was there is made.  The CPU's is
always the same code, so that it will give back what was there is known of what it reads, without trying.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, final

from lorahub.engine.crew import Workspace
from lorahub.engine.folding.fold import Change, Fold, Unit
from lorahub.engine.folding.planes import Noted
from lorahub.engine.folding.sums import all_finite
from lorahub.engine.kernels.choice import restore
from lorahub.engine.kernels.tiles import Tiles
from lorahub.engine.undoing.checksum import checksum, checksums
from lorahub.engine.undoing.keeper import Keeper, Policy
from lorahub.engine.undoing.noted import look, ready, write
from lorahub.engine.undoing.residual import Residual, Steps, Verbatim, encode
from lorahub.errors import IntegrityError, NotFinite
from lorahub.lazy import torch

__all__ = ["Journal"]


class Journal(Keeper):
    """The journal of one parameter.

    Attributes:
        entries: first row of a unit -> what it holds of the way back, and a checksum of what was there.
    """

    policy: ClassVar[Policy] = "journal"
    encodes: ClassVar[bool] = True
    """Whether rows that nobody noted in passing are folded again and compared; otherwise they are copied."""

    def __init__(self, name: str, tensor: torch.Tensor, reverse: Callable[[], Fold]) -> None:
        """Nothing is held yet.

        Args:
            name: of the parameter.
            tensor: the parameter, with an axis 0.
            reverse: makes the fold that takes the change off again.
        """
        super().__init__(name, tensor)
        self._reverse = reverse
        self.entries: dict[int, tuple[Residual | _Noted, torch.Tensor]] = {}

    def open(self) -> _Open:
        """The fold is made when it is first needed."""
        return _Open(self, self._reverse)

    @property
    def held(self) -> int:
        """Bytes of all entries; factors that they need are not counted."""
        return sum(residual.nbytes for residual, _ in self.entries.values())

    def enter(
        self,
        rows: slice,
        noted: Steps | Sequence[Tiles],
        before: torch.Tensor,
        after: torch.Tensor,
        read: torch.Tensor | None = None,
    ) -> None:
        """Remember rows that a kernel merged.

        Args:
            rows: which.
            noted: by the CPU's, of all rows; or by a device's, one for each part of the rows.
            before: a checksum of what they held.
            after: of what they hold.
            read: checksums of all that is read besides the rows to restore them, where they prove that it can be done.
        """
        self.entries[rows.start] = _Noted(noted, read), before
        self.mark(rows, after)

    def drop(self) -> None:
        """Free the entries."""
        super().drop()
        self.entries.clear()


@final
class InPassing(Journal):
    """A journal where a kernel notes it in the pass that folds, and a copy where none does."""

    encodes: ClassVar[bool] = False

    def account(self) -> Mapping[Policy, int]:
        """Bytes of each; see ``Keeper``."""
        copied = sum(entry.nbytes for entry, _ in self.entries.values() if isinstance(entry, Verbatim))
        noted = self.held - copied
        held: dict[Policy, int] = {"copy": copied, "journal": noted}
        return {policy: count for policy, count in held.items() if count or policy == "journal"}


@final
class _Open:
    """A journal and the fold that takes its change off."""

    def __init__(self, journal: Journal, reverse: Callable[[], Fold]) -> None:
        self._journal, self._reverse = journal, reverse

    @cached_property
    def _fold(self) -> Fold:
        return self._reverse()

    @cached_property
    def _units(self) -> dict[int, Unit]:
        return {unit.rows.start: unit for unit in self._fold.units}

    def fold(self, fold: Fold, unit: Unit, untouched: torch.Tensor | None, space: Workspace) -> Change | None:
        """Note the difference in the pass that folds; see ``Way``."""
        rows, live = unit.rows, self._journal.tensor[unit.rows]
        noted = None
        try:
            noted = fold.run_noting(unit, live if untouched is None else untouched, live, space)
            if noted is None:
                return self._fold_there(fold, unit, untouched)
            residual = noted.notes.residual.copy()
            read = checksums([*fold.operands(unit, live, sign=-1.0), *residual.tensors])
            self._journal.enter(rows, residual, *noted.notes.checksums(), read)
            _demand_finite(noted, fold, unit, live, space)
            return noted.change()
        except BaseException:
            if untouched is None and noted is not None:
                untouched = _untouched(fold, unit, live, noted.notes.residual, space)
            if untouched is not None:
                live.copy_(untouched)
            self._journal.entries.pop(rows.start, None)
            self._journal.forget(rows)
            raise

    def _fold_there(self, fold: Fold, unit: Unit, untouched: torch.Tensor | None) -> Change | None:
        """The same by the kernel of a device beyond the CPU."""
        there = ready(fold, unit, self._journal.tensor[unit.rows], untouched)
        foreseen = None if there is None else look([there])[0]
        if there is None or foreseen is None:
            return None
        (entry,) = write([(there, foreseen)])
        self._journal.enter(unit.rows, entry.tiles, entry.before, entry.after)
        return entry.change

    def keep(self, rows: slice, untouched: torch.Tensor | None, space: Workspace) -> torch.Tensor:
        live = self._journal.tensor[rows]
        return _scratch("undo: kept", live, space).copy_(live) if untouched is None else untouched

    def written(self, rows: slice, before: torch.Tensor, space: Workspace) -> None:
        back = self._taken_off(rows, "undo: back", space) if self._journal.encodes else None
        residual = Verbatim(before.clone()) if back is None else encode(before, back)
        self._journal.entries[rows.start] = residual, checksum(before)
        self._journal.mark(rows)

    def demand(self, rows: slice, space: Workspace) -> None:
        residual, unit = self._journal.entries[rows.start][0], self._unit(rows)
        if not isinstance(residual, _Noted) or residual.read is None or unit is None:
            self.recover(rows, space)
            return
        assert isinstance(residual.by, Steps)
        operands = self._fold.operands(unit, self._journal.tensor[rows])
        if not torch.equal(residual.read, checksums([*operands, *residual.by.tensors])):
            raise IntegrityError(
                f"{self._journal.name} cannot be restored from its journal: the tensors that were merged into it, or "
                "the journal itself, hold other numbers now",
                "give the adapter's tensors back what they held, or load the base again",
            )

    def recover(self, rows: slice, space: Workspace) -> torch.Tensor:
        (residual, expected), live = self._journal.entries[rows.start], self._journal.tensor[rows]
        if isinstance(residual, Verbatim):
            return residual.value
        if isinstance(residual, _Noted):
            unit = self._unit(rows)
            assert unit is not None  # of the same step as the one that was folded
            back: torch.Tensor | None = _restored(self._fold, unit, live, residual.by, space)
        elif (back := self._taken_off(rows, "undo: restored", space)) is not None:
            residual.apply(back)
        if back is None or not torch.equal(checksum(back), expected):
            raise IntegrityError(
                f"{self._journal.name} cannot be restored from its journal: taking the change off gives other numbers "
                "than it did when it was merged",
                "if a setting of PyTorch's arithmetic changed since (torch.set_float32_matmul_precision, "
                "torch.backends.mkldnn), set it back; otherwise load the base again",
            )
        return back

    def _taken_off(self, rows: slice, name: str, space: Workspace) -> torch.Tensor | None:
        """The rows less the change, or None where that is no number or the rows are cut in another way."""
        unit, live = self._unit(rows), self._journal.tensor[rows]
        if unit is None:
            return None
        back = _scratch(name, live, space)
        try:
            self._fold.run(unit, live, back, space)
        except NotFinite:
            return None
        return back

    def _unit(self, rows: slice) -> Unit | None:
        unit = self._units.get(rows.start)
        return unit if unit is not None and unit.rows == rows else None


@final
@dataclass(frozen=True, slots=True)
class _Noted:
    """A difference that a kernel noted, to be made up for by the same kernel; see ``Journal.enter``."""

    by: Steps | Sequence[Tiles]
    read: torch.Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.by.nbytes if isinstance(self.by, Steps) else sum(each.nbytes for each in self.by)


def _demand_finite(noted: Noted, fold: Fold, unit: Unit, live: torch.Tensor, space: Workspace) -> None:
    if not noted.finite:
        raise fold.not_finite(before=not all_finite(_untouched(fold, unit, live, noted.notes.residual, space)))


def _untouched(fold: Fold, unit: Unit, live: torch.Tensor, steps: Steps, space: Workspace) -> torch.Tensor:
    """What rows held before ``fold`` changed them and noted ``steps``."""
    return _restored(fold, unit, live, steps, space, sign=-1.0)


def _restored(
    fold: Fold,
    unit: Unit,
    live: torch.Tensor,
    noted: Steps | Sequence[Tiles],
    space: Workspace,
    *,
    sign: float = 1.0,
) -> torch.Tensor:
    back = _scratch("undo: restored", live, space)
    fold.put(unit, live, back, space, sign=sign)
    restore(noted, back)
    return back


def _scratch(name: str, like: torch.Tensor, space: Workspace) -> torch.Tensor:
    return space.take(name, like.shape, like.dtype, like.device)
