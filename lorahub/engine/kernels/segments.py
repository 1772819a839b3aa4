"""One batch over many low-rank changes, as data: ``y[row] += scale * x[row] @ down.T @ up.T``, each row with its own.

Products of two numbers of 16 bits are exact; sums are float32 until the one rounding onto ``y``, and what lies between
the factors is not rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

from lorahub.lazy import torch

__all__ = ["Segments"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Some rows of a batch, and which factors each has; rows of equal factors follow one another.

    Attributes:
        rows: positions in the batch, each at most once.
        which: for each, the position of its factors.
        ups: ``[out, r]`` each, contiguous, of one dtype on one device.
        downs: ``[r, in]`` each, likewise.
        table: int64 ``[rows, 4]`` on that device: position, rank, addresses of up and down.
        highest: the largest rank.
        wide: all addresses are multiples of 16 bytes and all ranks of 8, so that 16 bytes can be moved at a time.
    """

    rows: tuple[int, ...]
    which: tuple[int, ...]
    ups: tuple[torch.Tensor, ...]
    downs: tuple[torch.Tensor, ...]
    table: torch.Tensor
    highest: int
    wide: bool

    @classmethod
    def of(cls, places: Sequence[Sequence[int]], ups: Sequence[torch.Tensor], downs: Sequence[torch.Tensor]) -> Self:
        """Factors and, for each, the rows that have them.

        Args:
            places: positions in the batch.
            ups: ``[out, r]`` each, of one dtype on one device.
            downs: ``[r, in]`` each, likewise.
        """
        ups, downs = ([each.contiguous() for each in factors] for factors in (ups, downs))
        pairs = [(row, which) for which, rows in enumerate(places) for row in rows]
        table = [(row, len(downs[which]), ups[which].data_ptr(), downs[which].data_ptr()) for row, which in pairs]
        return cls(
            rows=tuple(row for row, _ in pairs),
            which=tuple(which for _, which in pairs),
            ups=tuple(ups),
            downs=tuple(downs),
            table=torch.tensor(table, dtype=torch.int64).view(-1, 4).to(ups[0].device),
            highest=max(map(len, downs)),
            wide=all(up % 16 == down % 16 == rank % 8 == 0 for _, rank, up, down in table),
        )
