"""Weights as codes times scales: ``value = (code - zero) * scale / unit``, one scale for each block of codes.

Integers and 8-bit floats alike.  Where other numbers are stored, a block keeps its scale if that reaches the largest of
them, so what did not change keeps its code; else the scale grows until it does.  Knows no library.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self, final

from lorahub.lazy import torch

__all__ = ["Grid", "bits_sum"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A weight on a grid.

    Attributes:
        codes: integers or 8-bit floats, in the logical shape.
        scale: one number for each block, in as many dimensions as ``codes``, or one for all.
        block: the shape of a block.
        low, high: the least and the largest code.
        zero: the code that means zero, shaped as ``scale``; None means 0.
        unit: what the scales are divided by.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, ...]
    low: float
    high: float
    zero: torch.Tensor | None = None
    unit: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(each.nbytes for each in (self.codes, self.scale, self.zero) if each is not None)

    def copy(self) -> Self:
        """The same in memory of its own."""
        zero = None if self.zero is None else self.zero.clone()
        return replace(self, codes=self.codes.clone(), scale=self.scale.clone(), zero=zero)

    def values(self) -> torch.Tensor:
        """The weight in float32."""
        return self.values_in(torch.float32)

    def values_in(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight, computed in ``dtype``."""
        values = self.codes.to(dtype)  # new memory: codes are narrower
        if self.zero is not None:
            values.sub_(self._spread(self.zero.to(dtype)))
        return values.mul_(self._spread(self.scale.to(dtype) / self.unit))

    def requantised(self, values: torch.Tensor) -> Self:
        """Other values on this grid, rounded to the nearest code, ties to even."""
        scale = self._reaching(values)
        steps = scale.to(torch.float32) / self.unit
        codes = values / self._spread(steps.masked_fill(steps == 0, 1))  # where there is no scale all values are 0
        if self.zero is not None:
            codes.add_(self._spread(self.zero.to(torch.float32)))
        if not self.codes.is_floating_point():
            codes = codes.round_()
        return replace(self, codes=codes.clamp_(self.low, self.high).to(self.codes.dtype), scale=scale)

    def mark(self) -> int:
        """The sum of the bits of codes and scales."""
        return bits_sum(self.codes) + bits_sum(self.scale)

    def _reaching(self, values: torch.Tensor) -> torch.Tensor:
        """Scales that reach the largest values of their blocks: the present ones where they do."""
        zero = 0 if self.zero is None else self.zero.to(torch.float32)
        most, least = self._ends(values)
        up = most / torch.as_tensor(self.high - zero, device=values.device)
        down = least / torch.as_tensor(self.low - zero, device=values.device)
        needed = torch.maximum(up, down).nan_to_num_(nan=0.0, posinf=0.0).mul_(self.unit)
        needed = needed.reshape(self.scale.shape).to(self.scale.dtype)
        return torch.where(needed > self.scale, needed, self.scale)

    def _spread(self, each: torch.Tensor) -> torch.Tensor:
        """One number for each block -> one for each code, or what broadcasts to that."""
        if each.numel() == 1:
            return each.reshape(())
        for axis, size in enumerate(self.codes.shape):
            if each.shape[axis] not in (1, size):
                each = each.repeat_interleave(self.block[axis], axis).narrow(axis, 0, size)
        return each

    def _ends(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest and the least value of each block, or 0, shaped as the blocks lie."""
        if self.scale.numel() == 1:
            return values.amax().clamp_(min=0), values.amin().clamp_(max=0)
        padding = [(-size) % block for size, block in zip(values.shape, self.block, strict=True)]
        if any(padding):
            values = torch.nn.functional.pad(values, [each for pad in reversed(padding) for each in (0, pad)])
        apart: list[int] = []
        for size, block in zip(values.shape, self.block, strict=True):
            apart += [size // block, block]
        blocks, inside = values.reshape(apart), tuple(range(1, len(apart), 2))
        return blocks.amax(inside).clamp_(min=0), blocks.amin(inside).clamp_(max=0)


def bits_sum(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bits, byte by byte, as an integer."""
    return int(tensor.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64))
