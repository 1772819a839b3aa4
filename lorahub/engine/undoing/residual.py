"""The difference of two tensors that are nearly equal, bit for bit, in little memory.

Elements are compared as integers, so neighbours on the floating-point grid differ by one and every difference can be
taken back exactly (modulo the width of the integer).  Most are zero.  The others are kept as one byte each, wider ones
apart, and their places as steps from one to the next (a byte each), as one bit for every element, or not at all, the
elements themselves being kept: whichever is smallest.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeAlias, final

from lorahub.lazy import np, torch

__all__ = ["Residual", "Verbatim", "encode"]

_SKIP = 255  # a step that leads to no difference: 255 equal elements
_WIDE = -128  # a code that stands for the next of ``wide``
_INTEGER = {2: "int16", 4: "int32"}

Residual: TypeAlias = "Steps | Bits | Verbatim"
"""``apply(tensor)`` turns one of the two into the other, in place; ``nbytes`` is what it takes."""


def encode(wanted: torch.Tensor, given: torch.Tensor) -> Residual:
    """What turns ``given`` into ``wanted``: contiguous tensors of one shape and device, of a dtype of 2 or 4 bytes."""
    ours, theirs = integers(wanted), integers(given)
    places = _places(ours, theirs)
    difference = ours.index_select(0, places) - theirs.index_select(0, places)
    wide = (difference > 127) | (difference < -127)
    codes = difference.masked_fill(wide, _WIDE).to(torch.int8)
    width, count = wanted.dtype.itemsize, ours.numel()
    apart = difference.index_select(0, _true(wide))
    gaps = torch.diff(places, prepend=places.new_full((1,), -1)) - 1
    far = _true(gaps >= _SKIP)
    skips = gaps.index_select(0, far) // _SKIP
    spread = len(codes) + int(skips.sum())
    common = len(codes) + width * len(apart)
    if common + min(spread, -(-count // 8)) >= width * count:
        return Verbatim(wanted.clone())
    if spread <= -(-count // 8):
        return Steps(_stepped(gaps, far, skips, spread), codes, apart)
    return Bits(_packed(places, count), codes, apart)


@dataclass(frozen=True, slots=True)
class _Coded:
    def _add(self, given: torch.Tensor, places: torch.Tensor, codes: torch.Tensor, wide: torch.Tensor) -> None:
        target = integers(given)
        difference = codes.to(target.dtype)
        if len(wide):
            difference.index_copy_(0, _true(codes == _WIDE), wide)
        target.index_add_(0, places, difference)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that it is made of."""
        return [getattr(self, each.name) for each in fields(self)]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self.tensors)


@final
@dataclass(frozen=True, slots=True)
class Steps(_Coded):
    """Few differences: the distance from one to the next, less one."""

    steps: torch.Tensor
    codes: torch.Tensor
    wide: torch.Tensor

    def copy(self) -> Steps:
        """The same in memory of its own."""
        return Steps(self.steps.clone(), self.codes.clone(), self.wide.clone())

    def apply(self, given: torch.Tensor) -> None:
        """Turn ``given`` into what was wanted."""
        found = self.steps != _SKIP
        places = (self.steps.long() + found).cumsum(0).index_select(0, _true(found)) - 1
        self._add(given, places, self.codes, self.wide)


@final
@dataclass(frozen=True, slots=True)
class Bits(_Coded):
    """Many differences: a bit for every element, the lowest of a byte first."""

    bits: torch.Tensor
    codes: torch.Tensor
    wide: torch.Tensor

    def apply(self, given: torch.Tensor) -> None:
        """Turn ``given`` into what was wanted."""
        powers = (1 << torch.arange(8, device=given.device)).to(torch.uint8)
        places = _true((self.bits[:, None] & powers).bool().view(-1))
        self._add(given, places, self.codes, self.wide)


@final
@dataclass(frozen=True, slots=True)
class Verbatim(_Coded):
    """So many differences that the elements take less."""

    value: torch.Tensor

    def apply(self, given: torch.Tensor) -> None:
        """Turn ``given`` into what was wanted."""
        given.copy_(self.value)


def _stepped(gaps: torch.Tensor, far: torch.Tensor, skips: torch.Tensor, spread: int) -> torch.Tensor:
    """Each gap as a byte, after as many ``_SKIP`` as it needs.

    Args:
        gaps: equal elements before each difference.
        far: which of them are ``_SKIP`` or more.
        skips: how many ``_SKIP`` these need.
        spread: how many bytes that makes in all.
    """
    last = gaps.index_add(0, far, skips, alpha=-_SKIP).to(torch.uint8)
    if not len(far):
        return last
    steps = torch.full((spread,), _SKIP, dtype=torch.uint8, device=gaps.device)
    before = torch.zeros_like(gaps).index_copy_(0, far, skips).cumsum(0)
    return steps.index_copy_(0, torch.arange(len(gaps), device=gaps.device).add_(before), last)


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """A flat view of a contiguous tensor's elements as integers of their width."""
    word: torch.dtype = getattr(torch, _INTEGER[tensor.dtype.itemsize])
    return tensor.detach().view(-1).view(word)


def _places(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Where two flat tensors differ, in order; eight bytes are compared at a time, unequal ones looked into."""
    each = 8 // one.element_size()
    if one.numel() % each or one.storage_offset() % each or other.storage_offset() % each:
        return _true(one != other)
    ours, theirs = one.view(torch.int64), other.view(torch.int64)
    words = _true(ours != theirs)
    unequal = ours.index_select(0, words).view(one.dtype) != theirs.index_select(0, words).view(one.dtype)
    found = _true(unequal)
    shift = each.bit_length() - 1
    return (words.index_select(0, found >> shift) << shift) + (found & (each - 1))


def _true(flags: torch.Tensor) -> torch.Tensor:
    """The positions at which a flat tensor is true."""
    if flags.device.type == "cpu":  # several times as fast as torch's own
        return torch.from_numpy(np.flatnonzero(flags.numpy()))
    return flags.nonzero()[:, 0]


def _packed(places: torch.Tensor, count: int) -> torch.Tensor:
    flags = torch.zeros(-(-count // 8) * 8, dtype=torch.uint8, device=places.device)
    flags.index_fill_(0, places, 1)
    powers = (1 << torch.arange(8, device=places.device)).to(torch.uint8)
    return (flags.view(-1, 8) * powers).sum(1, dtype=torch.uint8)
