"""Changes of several matrices that share a rank, as the experts of a mixture do in one parameter; or of one alone.

The k-th singular value of a stack is the root of the sum of squares of its matrices' k-th ones, so that a rank of the
stack keeps and loses what it should in a common budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorahub.composition.algebra.truncate import Truncated
from lorahub.lazy import torch

__all__ = ["Stacked", "break_even", "combined", "combined_error"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stacked:
    """One approximation for each matrix, all of one shape; at least one."""

    parts: tuple[Truncated, ...]

    @property
    def rank(self) -> int:
        """The rank that all share: the largest of any."""
        return max(part.rank for part in self.parts)

    @property
    def norm(self) -> float:
        """The Frobenius norm of all changes together."""
        return math.sqrt(sum(part.norm**2 for part in self.parts))

    @property
    def error(self) -> float:
        """The relative Frobenius error of all together."""
        return combined_error([part.error for part in self.parts], [part.norm for part in self.parts])

    @property
    def values(self) -> torch.Tensor:
        """The singular values kept, [rank], float64."""
        return combined([part.values for part in self.parts])

    @property
    def shape(self) -> tuple[int, int]:
        """Of each matrix."""
        return self.parts[0].up.shape[0], self.parts[0].down.shape[1]

    @property
    def cost(self) -> int:
        """Numbers that one rank takes."""
        return len(self.parts) * sum(self.shape)

    def cut(self, rank: int) -> Stacked:
        """The first ``rank`` of every matrix."""
        return Stacked(parts=tuple(part.cut(rank) for part in self.parts))

    def narrowed(self) -> Stacked:
        """The same with float32 factors."""
        return Stacked(parts=tuple(replace(part, up=part.up.float(), down=part.down.float()) for part in self.parts))

    def stored(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Factors [n, out, rank] and [n, rank, in] in a dtype, and an error that they do not exceed.

        A matrix of a lower rank is filled up with zeros.

        Raises:
            NotFinite: they do not fit into it.
        """
        stored = [part.stored(dtype) for part in self.parts]
        (out, inner), rank, count = self.shape, self.rank, len(stored)
        up, down = stored[0][0].new_zeros(count, out, rank), stored[0][1].new_zeros(count, rank, inner)
        for number, (one, other, _) in enumerate(stored):
            up[number, :, : one.shape[1]] = one
            down[number, : other.shape[0]] = other
        error = combined_error([error for _, _, error in stored], [part.norm for part in self.parts])
        return up, down, min(1.0, error)


def combined(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The singular values of a stack from those of its matrices, each descending."""
    result = values[0].new_zeros(max(map(len, values)))
    for each in values:
        result[: len(each)] += each**2
    return result.sqrt()


def combined_error(errors: Sequence[float], norms: Sequence[float]) -> float:
    """The relative error of several changes as one vector; 0 where there is no change."""
    total = sum(norm**2 for norm in norms)
    lost = sum((error * norm) ** 2 for error, norm in zip(errors, norms, strict=True))
    return math.sqrt(lost / total) if total else 0.0


def break_even(shape: tuple[int, int]) -> int:
    """The smallest rank whose factors take at least as many numbers as the matrix."""
    rows, columns = shape
    return -(-rows * columns // (rows + columns))
