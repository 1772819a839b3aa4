"""What is summed and what came of it: the ingredients of one stored parameter, and how large their effect was.

Knows shapes and dtypes; the arithmetic is in ``recipes`` and, where modes differ, in ``rounding``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self, final

from lorahub.bases.layout import Piece
from lorahub.deltas.delta import Delta
from lorahub.engine.folding.windows import UNIT, WINDOW
from lorahub.lazy import torch

if TYPE_CHECKING:
    from lorahub.engine.rounding.mode import Mode

__all__ = ["Change", "Ingredient", "NotFiniteHere", "Sums", "all_finite", "is_finite"]

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
    """What happened to some weights, as sums over their elements; they add up over rows and parameters.

    A large matrix is measured on some of its rows, evenly spread (``windows.sample``), and the sums are scaled up.

    Attributes:
        before: squares of the weights before.
        added: squares of what was to be added to them.
        wanted: the same where ``kept`` and ``lost`` were measured; 0 where they were not.
        kept: products of what was to be added with what the stored weights changed by.
        lost: squares of the difference of these two.
    """

    before: float = 0.0
    added: float = 0.0
    wanted: float = 0.0
    kept: float = 0.0
    lost: float = 0.0

    @classmethod
    def of(cls, before: torch.Tensor, added: torch.Tensor, after: torch.Tensor, share: float = 1.0) -> Self:
        """Measured on tensors of one shape and a wide dtype; every element stands for ``share`` elements."""
        effect = (after - before).reshape(-1)
        start, wanted = before.reshape(-1), added.reshape(-1)
        kept, size = _dot(effect, wanted), _dot(wanted, wanted)
        lost = effect.sub_(wanted)
        return cls(_dot(start, start) * share, size * share, size * share, kept * share, _dot(lost, lost) * share)

    def __add__(self, other: Change) -> Change:
        return Change(
            self.before + other.before,
            self.added + other.added,
            self.wanted + other.wanted,
            self.kept + other.kept,
            self.lost + other.lost,
        )

    def times(self, share: float) -> Change:
        """The change of as many elements, of which each is like ``share`` of these."""
        return Change(
            self.before * share, self.added * share, self.wanted * share, self.kept * share, self.lost * share
        )

    @property
    def relative(self) -> float | None:
        """The size of the change over the size of the weights, or None where these are all zero."""
        return math.sqrt(self.added / self.before) if self.before else None


@final
@dataclass(frozen=True, slots=True)
class Sums:
    """How sums are made for one stored parameter, or for a part of it.

    Attributes:
        storage: what results are rounded to.
        device: where sums are made.
        mode: how they are made and rounded.
        name: the parameter.
        first: how many of its elements lie before this part.
        at_most: bytes of a window or unit beyond the CPU.
    """

    storage: torch.dtype
    device: torch.device
    mode: Mode
    name: str = ""
    first: int = 0
    at_most: int = _ON_DEVICE

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the sums."""
        return self.mode.sums(self.storage)

    @property
    def window(self) -> int:
        """Bytes of a window in ``dtype``."""
        return WINDOW if self.device.type == "cpu" else self.at_most

    @property
    def unit(self) -> int:
        """Bytes of a unit as stored."""
        return UNIT if self.device.type == "cpu" else self.at_most

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` where and as sums are made."""
        return tensor.to(self.device, self.dtype)


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.dot(one, other))


def is_finite(tensor: torch.Tensor) -> bool:
    """``all_finite`` in one pass: NaN and infinity survive every sum; only where the sum is none is each looked at."""
    summable = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    return (summable and math.isfinite(float(tensor.sum()))) or all_finite(tensor)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; true of integers."""
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all())
