"""A journal: what taking a change off again gets wrong, instead of what was there.

Adding a change and rounding, then taking it off and rounding, gives back nearly what was there.  The difference is
recorded when the change is made (``residual``), by doing exactly what undoing will do.  It is exact as long as the
same arithmetic gives the same bits, which a checksum of what was there proves before anything is written.  Serves
changes that do not look at the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, final

from lorahub.engine.crew import Workspace
from lorahub.engine.folding.fold import Fold
from lorahub.engine.undoing.checksum import checksum
from lorahub.engine.undoing.keeper import Keeper, Policy
from lorahub.engine.undoing.residual import Residual, Verbatim, encode
from lorahub.errors import IntegrityError, NotFinite
from lorahub.lazy import torch

__all__ = ["Journal"]


@final
class Journal(Keeper):
    """The journal of one parameter."""

    policy: ClassVar[Policy] = "journal"

    def __init__(self, name: str, tensor: torch.Tensor, reverse: Callable[[], Fold]) -> None:
        """Nothing is held yet.

        Args:
            name: of the parameter.
            tensor: the parameter, with an axis 0.
            reverse: makes the fold that takes the change off again.
        """
        super().__init__(name, tensor)
        self._reverse = reverse
        self.entries: dict[int, tuple[Residual, torch.Tensor]] = {}

    def open(self) -> _Open:
        """Make the fold."""
        return _Open(self, self._reverse())

    @property
    def held(self) -> int:
        """Bytes of all entries; factors that they need are not counted."""
        return sum(residual.nbytes for residual, _ in self.entries.values())

    def drop(self) -> None:
        """Free the entries."""
        super().drop()
        self.entries.clear()


@final
class _Open:
    """A journal and the fold that takes its change off."""

    def __init__(self, journal: Journal, fold: Fold) -> None:
        self._journal, self._fold = journal, fold
        self._units = {unit.rows.start: unit for unit in fold.units}

    def keep(self, rows: slice, untouched: torch.Tensor | None, space: Workspace) -> torch.Tensor:
        live = self._journal.tensor[rows]
        return _scratch("undo: kept", live, space).copy_(live) if untouched is None else untouched

    def written(self, rows: slice, before: torch.Tensor, space: Workspace) -> None:
        back = self._taken_off(rows, "undo: back", space)
        residual = Verbatim(before.clone()) if back is None else encode(before, back)
        self._journal.entries[rows.start] = residual, checksum(before)
        self._journal.mark(rows)

    def recover(self, rows: slice, space: Workspace) -> torch.Tensor:
        residual, expected = self._journal.entries[rows.start]
        if isinstance(residual, Verbatim):
            return residual.value
        back = self._taken_off(rows, "undo: restored", space)
        if back is not None:
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
        unit, live = self._units.get(rows.start), self._journal.tensor[rows]
        if unit is None or unit.rows != rows:
            return None
        back = _scratch(name, live, space)
        try:
            self._fold.run(unit, live, back, space)
        except NotFinite:
            return None
        return back


def _scratch(name: str, like: torch.Tensor, space: Workspace) -> torch.Tensor:
    return space.take(name, like.shape, like.dtype, like.device)
