"""How changes to weights are summed: in which dtype, in windows of which size, and whether the result is a number.

Sums are float32 for bfloat16 and 8-bit storage and float64 for anything finer, and are rounded once.  Float16 keeps
eleven bits: the roundings of a float32 sum reach them in more than one of ten thousand elements where a change is as
large as its weight (3 in 10,000 measured at rank 4), so its sums are float64 as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from lorahub.bases.layout import Piece
from lorahub.deltas.delta import Delta
from lorahub.engine.windows import UNIT, WINDOW
from lorahub.lazy import torch

__all__ = ["Change", "Ingredient", "NotFiniteHere", "Sums", "all_finite", "squares"]

_ON_DEVICE = 1 << 26  # bytes of a window or unit beyond the CPU, where the cost is launches and not caches


class NotFiniteHere(ArithmeticError):
    """A result that is not finite, raised where the parameter's name is not known; ``before``: so was the base."""

    def __init__(self, *, before: bool) -> None:
        super().__init__()
        self.before = before


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingredient:
    """One thing that is added: ``weight`` times ``delta``, ``piece.of_delta`` of it, in ``piece.of_parameter``.

    Attributes:
        local: ``delta`` can be cut to windows of its rows.
        siblings: untouched parameters of the module that the delta reads, [out, in, *k].
        adapter: whose it is, for messages.
    """

    weight: float
    delta: Delta
    piece: Piece
    local: bool
    siblings: Mapping[str, torch.Tensor] = field(default_factory=dict)
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """Sums of squares: of the weights before, and of what was added to them."""

    before: float = 0.0
    added: float = 0.0

    def __add__(self, other: Change) -> Change:
        return Change(self.before + other.before, self.added + other.added)

    @property
    def relative(self) -> float | None:
        """The size of the change over the size of the weights, or None where these are all zero."""
        return math.sqrt(self.added / self.before) if self.before else None


@final
class Sums:
    """How sums are made for one stored parameter.

    Attributes:
        storage: what results are rounded to.
        device: where sums are made.
        dtype: dtype of the sums.
        window, unit: bytes of a window in ``dtype``, and of a unit as stored.
    """

    def __init__(self, storage: torch.dtype, device: torch.device) -> None:
        self.storage, self.device = storage, device
        self.dtype = torch.float32 if storage.itemsize < 4 and storage != torch.float16 else torch.float64
        self.window, self.unit = (WINDOW, UNIT) if device.type == "cpu" else (_ON_DEVICE, _ON_DEVICE)
        self._safe = torch.finfo(storage).max / 2 if storage.is_floating_point else math.inf

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` where and as sums are made."""
        return tensor.to(self.device, self.dtype)

    def finish(self, total: torch.Tensor, out: torch.Tensor, before: float, added: float) -> None:
        """Round ``total`` into ``out`` and make sure that it is finite.

        No element is larger than the norms of the two summands together, so these prove it in nearly every case.

        Args:
            total: the sum.
            out: the same shape, in storage dtype.
            before: sum of squares of the untouched weights.
            added: sum of squares of what was added to them, or more.

        Raises:
            NotFiniteHere: it is not.
        """
        out.copy_(total)
        if not math.sqrt(before) + math.sqrt(added) < self._safe and not all_finite(out):
            raise NotFiniteHere(before=not math.isfinite(before))


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; true of integers."""
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all())


def squares(tensor: torch.Tensor) -> float:
    """The sum of the squares of all elements."""
    norm = float(torch.linalg.vector_norm(tensor))
    return norm * norm
