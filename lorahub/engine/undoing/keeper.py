"""What every way back has in common: one parameter, the rows of it that were written, and how they are recognised.

A keeper is told before rows are written and after, and can say what was in them.  It writes nothing to the parameter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Literal, Protocol, TypeAlias

from lorahub.engine.crew import Workspace
from lorahub.engine.folding.fold import Change, Fold, Unit
from lorahub.engine.undoing.checksum import checksum
from lorahub.lazy import torch

__all__ = ["POLICIES", "Keeper", "Policy", "Way"]

Policy: TypeAlias = Literal["auto", "copy", "journal", "host", "reload", "none"]

POLICIES: tuple[Policy, ...] = ("auto", "copy", "journal", "host", "reload", "none")
"""How a merge can be undone; see ``lorahub.merge``."""


class Way(Protocol):
    """A keeper made ready for one pass over its parameter; from several threads on different rows."""

    def fold(self, fold: Fold, unit: Unit, untouched: torch.Tensor | None, space: Workspace) -> Change | None:
        """Fold rows and take hold of what they held in one go; None, with nothing done, where it takes two.

        Whatever is raised, the rows hold then what they held before anything was merged.

        Args:
            fold: of the parameter.
            unit: which rows.
            untouched: what they held before anything was merged; None where that is what they hold now.
            space: scratch memory.

        Raises:
            NotFinite: as ``Fold.run``.
        """

    def keep(self, rows: slice, untouched: torch.Tensor | None, space: Workspace) -> torch.Tensor:
        """Take hold of rows that are about to be written.

        Args:
            rows: which.
            untouched: what they held before anything was merged; None where that is what they hold now.
            space: scratch memory.

        Returns:
            What they held, in memory apart from the parameter's that stays as it is while they are written.
        """

    def written(self, rows: slice, before: torch.Tensor, space: Workspace) -> None:
        """Remember what was written; ``before`` is what ``keep`` gave."""

    def demand(self, rows: slice, space: Workspace) -> None:
        """Return where ``recover`` will give back what the rows held, which are as they were written.

        Raises:
            IntegrityError: it will not.
        """

    def recover(self, rows: slice, space: Workspace) -> torch.Tensor:
        """What the rows held before; rows as they were written.

        Raises:
            IntegrityError: it cannot be told any more.
        """


class Keeper(ABC):
    """The way back for one parameter.

    Attributes:
        policy: its name.
        verified: ``recover`` can fail, so ``demand`` is asked of all rows before anything is written.
        tensor: the parameter, with an axis 0.
        name: what it is called.
    """

    policy: ClassVar[Policy]
    verified: ClassVar[bool] = True

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self.tensor = name, tensor
        self._marks: dict[int, tuple[slice, torch.Tensor]] = {}

    @abstractmethod
    def open(self) -> Way:
        """Make ready, in the thread that goes on with it."""

    def fold(self, fold: Fold, unit: Unit, untouched: torch.Tensor | None, space: Workspace) -> Change | None:
        """It takes two steps, for keepers that are a ``Way`` themselves."""
        return None

    @property
    @abstractmethod
    def held(self) -> int:
        """Bytes that are held."""

    def account(self) -> Mapping[Policy, int]:
        """Bytes that are held, by what they are."""
        return {self.policy: self.held}

    @property
    def units(self) -> tuple[slice, ...]:
        """The rows that hold a result, as they were written."""
        return tuple(rows for _, (rows, _) in sorted(self._marks.items()))

    def whole(self, space: Workspace) -> torch.Tensor:
        """The untouched parameter, of which all rows were written."""
        result = torch.empty_like(self.tensor, memory_format=torch.contiguous_format)
        way = self.open()
        for rows in self.units:
            result[rows] = way.recover(rows, space)
        return result

    def mark(self, rows: slice, found: torch.Tensor | None = None) -> None:
        """Remember what rows hold now; ``found`` is its checksum, where that is known."""
        self._marks[rows.start] = rows, checksum(self.tensor[rows]) if found is None else found

    def marked(self, rows: slice) -> torch.Tensor:
        """The checksum of what was written to rows, a scalar."""
        return self._marks[rows.start][1]

    def matches(self, rows: slice, content: torch.Tensor) -> bool:
        """Whether ``content`` is what was written to rows."""
        return bool(torch.equal(self.marked(rows), checksum(content)))

    def forget(self, rows: slice) -> None:
        """Rows hold again what they held before."""
        self._marks.pop(rows.start, None)

    def drop(self) -> None:
        """Free what is held."""
        self._marks.clear()
