"""References that look at a change one element at a time, and the cuts of weights that they are tried on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from lorahub.bases.layout import Piece
from lorahub.deltas.delta import ALL, Index, LowRank
from lorahub.lazy import torch

__all__ = ["cuts", "index_text", "loop_add", "loop_product", "loop_sum", "loop_take", "positions"]


def cuts(shape: tuple[int, ...]) -> Iterator[tuple[Index, Index]]:
    """Windows, strides, selections and permutations of rows, of columns where there are any, and of both."""
    rows, cols = (list(_indices(size)) for size in (*shape, 1)[:2])
    if len(shape) == 1:
        cols = [ALL]
    yield from itertools.product(rows, cols)


def _indices(size: int) -> Iterator[Index]:
    yield ALL
    yield slice(1, size - 1)
    yield slice(0, size, 2)
    yield (size - 1, 0)
    yield tuple(reversed(range(size)))


def positions(index: Index, size: int) -> Sequence[int]:
    """What an index picks from an axis of that size, in its order."""
    return range(size)[index] if isinstance(index, slice) else index


def index_text(index: Index) -> str:
    """An index as people write it, for messages."""
    return f"{index.start}:{index.stop}:{index.step}" if isinstance(index, slice) else str(list(index))


def loop_take(tensor: torch.Tensor, rows: Index, cols: Index) -> torch.Tensor:
    """``tensor[rows][:, cols]``, one element at a time."""
    parts = [tensor[row] for row in positions(rows, tensor.shape[0])]
    if tensor.dim() > 1:
        parts = [torch.stack([part[col] for col in positions(cols, tensor.shape[1])]) for part in parts]
    return torch.stack(parts)


def loop_sum(weight: torch.Tensor, terms: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor:
    """``weight + sum of w * change``, one element at a time in Python floats."""
    flat = [
        value + sum(w * change for (w, _), change in zip(terms, changes, strict=True))
        for value, *changes in zip(
            weight.flatten().tolist(), *(term[1].flatten().tolist() for term in terms), strict=True
        )
    ]
    return torch.tensor(flat, dtype=torch.float64).reshape(weight.shape)


def loop_product(low: LowRank, weight: torch.Tensor) -> torch.Tensor:
    """``scale * up @ down``, ``[out, in * prod(k)]`` in the weight's dtype, one rank after the other."""
    total = torch.zeros_like(weight).flatten(1)
    for r in range(low.down.shape[0]):
        total += torch.outer(low.up[:, r].to(weight), low.down[r].to(weight)) * low.scale
    return total


def loop_add(piece: Piece, stored: torch.Tensor, changes: Sequence[tuple[float, torch.Tensor]]) -> None:
    """Add the piece's part of the changes to ``stored``, one row and column at a time, by the words of ``Region``."""
    view = stored if piece.of_parameter.expert is None else stored[piece.of_parameter.expert]
    shape = changes[0][1].shape
    vector = len(shape) == 1
    across = 1 if vector else shape[1]
    sizes = (view.shape[1], view.shape[0]) if piece.of_parameter.transposed else (*view.shape, 1)[:2]
    rows = zip(positions(piece.of_delta.rows, shape[0]), positions(piece.of_parameter.rows, sizes[0]), strict=True)
    for source, row in rows:
        here = across if vector else sizes[1]
        cols = zip(positions(piece.of_delta.cols, across), positions(piece.of_parameter.cols, here), strict=True)
        for origin, col in cols:
            at: tuple[int, ...] = (row,) if vector else ((col, row) if piece.of_parameter.transposed else (row, col))
            for weight, change in changes:
                view[at] += weight * (change[source] if vector else change[source, origin])
