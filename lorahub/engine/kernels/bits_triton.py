"""Rounding to bfloat16 inside Triton's kernels: by integers, so that every backend gives the same."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["from_bfloat16", "to_bfloat16"]


@triton.jit
def to_bfloat16(value):
    """Bits of the nearest bfloat16, ties to even."""
    bits = value.to(tl.int32, bitcast=True)
    nearest = bits + 0x7FFF + ((bits >> 16) & 1)
    return tl.where(value != value, 0x7FC0, nearest >> 16).to(tl.int16)


@triton.jit
def from_bfloat16(bits):
    """The float32 of the same value."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
