"""What kernels that merge have in common: how a tile is summed, and how kernels are compiled and launched."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import triton
import triton.language as tl

from lorahub.engine.kernels.bits_triton import from_bfloat16
from lorahub.engine.kernels.patches import Patch, accumulator
from lorahub.engine.kernels.tiles import COLS, ROWS
from lorahub.lazy import torch

__all__ = ["BLOCK", "OPTIONS", "numbers_of", "on_device", "product_of", "programs", "total_of", "way_of"]

BLOCK = (ROWS, COLS, 16)
"""Rows, columns and ranks of a tile."""

_PROGRAMS = 4  # for each multiprocessor

OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
"""How kernels that merge are compiled: products are rounded before they are added, in one kernel as in another."""

_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_BITS = {torch.bfloat16: tl.int16}  # stored dtypes that are rounded to by integers


@triton.jit
def total_of(values):
    """The sum of a tile in float64, of a row in the dtype that it has."""
    return tl.sum(tl.sum(values, 1).to(tl.float64), 0)


@triton.jit
def product_of(
    up,
    down,
    scale,
    i,
    j,
    height,
    width,
    rank,
    SUM: tl.constexpr,
    PRODUCT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``scale * up[i] @ down[:, j]``; zero outside the matrix."""
    product = tl.zeros((ROWS, COLS), SUM)
    for start in range(0, rank, RANKS):
        k = start + tl.arange(0, RANKS).to(tl.int64)
        left = tl.load(up + i * rank + k[None, :], mask=(i < height) & (k[None, :] < rank), other=0.0)
        right = tl.load(down + k[:, None] * width + j, mask=(k[:, None] < rank) & (j < width), other=0.0)
        if SUM == tl.float64:
            product = tl.dot(left.to(tl.float64), right.to(tl.float64), product)
        else:
            product = tl.dot(left.to(tl.float32), right.to(tl.float32), product, input_precision=PRODUCT)
    return product * scale


@triton.jit
def numbers_of(stored, STORE: tl.constexpr, SUM: tl.constexpr):
    """What is stored, as it is summed."""
    return from_bfloat16(stored) if STORE == tl.int16 else stored.to(SUM)


def way_of(first: Patch) -> dict[str, Any]:
    """What a kernel has to know of patches like one: dtypes, how products are made, whether 16 bytes are moved."""
    return {
        "STORE": _BITS.get(first.weight.dtype) or _DTYPES[first.weight.dtype],
        "FACTOR": _DTYPES[first.up.dtype],
        "SUM": _DTYPES[accumulator(first.weight.dtype)],
        "PRODUCT": "tf32" if first.up.dtype == torch.bfloat16 else "tf32x3",
        "WIDE": first.wide,
    }


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def programs(device: torch.device) -> int:
    """How many programs a launch has."""
    if device.type != "cuda":
        return _PROGRAMS
    return _PROGRAMS * int(torch.cuda.get_device_properties(device).multi_processor_count)
