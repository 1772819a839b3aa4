"""What taking a change off a matrix gets wrong, tile by tile, as a device's kernel notes it while it merges.

Threads of a device fill tiles in no order, so each tile has its own stretch of a page: first its differences, 16 bits
each (the place in the tile, and the number of steps on the floating-point grid), then those of more steps than fit in
there, in the same order.  They are bits of integers and wrap around, as in ``undoing.residual``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from lorahub.engine.kernels.patches import Outcome, Patch
from lorahub.lazy import torch

__all__ = ["COLS", "FAR", "PLACE", "ROWS", "Foreseen", "Noter", "Tiles", "tile_count"]

ROWS, COLS = 64, 128
"""Of a tile; what is beyond the matrix is empty."""

PLACE = 13
"""Bits of an entry that say where in the tile it is, row by row; those above say how many steps, -3 to 3."""

FAR = -4
"""Steps that stand for the tile's next number behind its entries."""


@final
@dataclass(frozen=True, slots=True)
class Tiles:
    """The differences of one matrix.

    Attributes:
        shape: of the matrix.
        page: int16 ``[n]``: the stretches of its tiles.
        begins: int64 ``[tiles]``: where in the page each begins.
        counts: int32 ``[tiles, 2]``: entries, and how many of them are far.
    """

    shape: tuple[int, int]
    page: torch.Tensor
    begins: torch.Tensor
    counts: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(each.numel() * each.element_size() for each in (self.page, self.begins, self.counts))


@final
@dataclass(frozen=True, slots=True)
class Foreseen:
    """What noting a patch will come to; nothing is written yet.

    Attributes:
        patch: 16-bit weights whose rows lie together, as do those it is added to; nothing is put aside, no lengths.
        outcome: what will come of it.
        counts: as ``Tiles.counts``.
    """

    patch: Patch
    outcome: Outcome
    counts: torch.Tensor


@final
@dataclass(frozen=True, slots=True)
class Noter:
    """Merges that note their way back, on one sort of device.

    Attributes:
        look: goes through patches and says what noting each will come to; writes nothing.
        write: merges what was foreseen and notes it: into pages of exactly the size, in one pass.
        put: merges patches with the bits of ``write``, and notes nothing; what ``write`` made, taken off with the
            scale's sign turned around, differs from what was there by what was noted.
        restore: makes up for that in matrices, in place.
    """

    look: Callable[[Sequence[Patch]], list[Foreseen]]
    write: Callable[[Sequence[Foreseen]], list[Tiles]]
    put: Callable[[Sequence[Patch]], list[Outcome]]
    restore: Callable[[Sequence[tuple[Tiles, torch.Tensor]]], None]


def tile_count(shape: Sequence[int]) -> int:
    """How many tiles a matrix has."""
    rows, columns = shape
    return -(-rows // ROWS) * -(-columns // COLS)
