"""Low-rank changes to many matrices at once, as data: ``weight += scale * up @ down`` for each, rounded once.

Or, with new lengths for its rows, ``weight += strength * (ratio * V - weight)``, where V is the sum above and
``ratio``, row by row, the new length over that of V; 1 where both are zero.

Sums are float32 where bfloat16 is stored and float64 where float16 or float32 is, as everywhere in the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

from lorahub.engine.folding.sums import Change
from lorahub.lazy import torch

__all__ = ["Merge", "Outcome", "Patch", "accumulator", "batches"]

_ALIGNED = 16  # bytes of an address, and numbers of a width


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One matrix, and what is added to it.

    Attributes:
        weight: ``[m, n]`` with any strides, bfloat16, float16 or float32: where the result goes.
        up: ``[m, r]``, contiguous, bfloat16 or float32, on the weight's device.
        down: ``[r, n]``, contiguous, of the same dtype.
        scale: what their product is multiplied with.
        before: ``[m, n]`` of the weight's dtype, contiguous, in other memory: what is added to; None where it is what
            ``weight`` holds.
        saved: the same: where what is added to is put aside; or None.
        lengths: ``[m]``, float64, on the same device: the new 2-norms of the rows; or None.
        strength: see above; of no account without lengths.
    """

    weight: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    scale: float
    before: torch.Tensor | None = None
    saved: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    strength: float = 1.0

    @property
    def source(self) -> torch.Tensor:
        """What is added to: ``before``, or what the weight holds."""
        return self.weight if self.before is None else self.before

    @property
    def wide(self) -> bool:
        """Whether rows lie together and all addresses are multiples of 16 bytes, so that 16 can be moved at a time."""
        source = self.source
        tensors = [source, self.weight, self.down, *([] if self.saved is None else [self.saved])]
        sizes = (self.weight.shape[1], self.weight.stride(0), source.stride(0))
        return (
            self.weight.stride(1) == source.stride(1) == 1
            and all(size % _ALIGNED == 0 for size in sizes)
            and all(tensor.data_ptr() % _ALIGNED == 0 for tensor in tensors)
        )


@final
@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one patch.

    Attributes:
        change: what happened to all of its elements.
        finite: whether every number that was written is one.
    """

    change: Change
    finite: bool


Merge: TypeAlias = "Callable[[], list[Outcome]]"
"""Merges patches that were made ready for it, and says what came of each; any number of times."""


def batches(patches: Sequence[Patch]) -> list[list[int]]:
    """The positions of patches that one launch serves, in order: of one device, one way of storing, one alignment."""
    alike: dict[object, list[int]] = {}
    for number, patch in enumerate(patches):
        way = (patch.saved is None, patch.lengths is None, patch.wide)
        alike.setdefault((patch.weight.device, patch.weight.dtype, patch.up.dtype, *way), []).append(number)
    return list(alike.values())


def accumulator(storage: torch.dtype) -> torch.dtype:
    """The dtype that sums have for weights of ``storage``."""
    return torch.float32 if storage == torch.bfloat16 else torch.float64
