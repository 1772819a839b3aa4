"""One batch over many low-rank changes in two launches, whatever the ranks: no row and no rank is padded in memory.

The first launch shrinks: every program takes some tokens of one row and a stretch of the inputs.  The second adds up
the stretches, in order, and expands: some tokens of one row and a stretch of the outputs.  Nothing is added by atomic
operations, and stretches have one length, so that what becomes of a row depends on nothing but the row.  Runs under
Triton's interpreter too, where tensors lie on the CPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import triton
import triton.language as tl

from lorahub.engine.kernels.bits_triton import from_bfloat16, to_bfloat16
from lorahub.engine.kernels.segments import Segments
from lorahub.lazy import torch

__all__ = ["INPUTS", "OUTPUTS", "RANKS", "TOKENS", "add_segments"]

TOKENS = 16
"""Tokens of a tile: the fewest that a product has."""

INPUTS = (1024, 64)
"""Inputs of a program of the first launch, and of one of its tiles."""

OUTPUTS = 128
"""Outputs of a program of the second launch."""

RANKS = 16
"""Ranks of a tile."""

_WARPS = 4
_TABLE = tl.constexpr(4)  # columns
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def shrink(
    table,
    x,
    inner,
    tokens,
    inputs,
    highest,
    x_row,
    x_token,
    x_beside,
    FACTOR: tl.constexpr,
    PRODUCT: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    LONG: tl.constexpr,
    INPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``inner[segment, stretch] = x[row, :, stretch] @ down[:, stretch].T`` for one segment, stretch, and some tokens.

    Args:
        table: int64, as in ``Segments``.
        x: ``[size, tokens, inputs]`` with strides ``x_row``, ``x_token`` and ``x_beside``.
        inner: float32 ``[segments, stretches, tokens, highest]``.
        tokens, inputs, highest: sizes.
        FACTOR: dtype of inputs and factors.
        PRODUCT: how products are made of TF32 ones.
        WIDE: as in ``Segments``.
        TOKENS, INPUTS, RANKS: of a tile.
        LONG: inputs of a stretch.
    """
    blocks = tl.cdiv(tokens, TOKENS)
    segment, stretch = tl.program_id(0) // blocks, tl.program_id(1)
    row, rank = tl.load(table + segment * _TABLE), tl.load(table + segment * _TABLE + 1)
    down = tl.load(table + segment * _TABLE + 3).to(tl.pointer_type(FACTOR))
    if WIDE:
        down = tl.multiple_of(down, 16)
    t = ((tl.program_id(0) % blocks) * TOKENS + tl.arange(0, TOKENS).to(tl.int64))[:, None]
    into = inner + (segment.to(tl.int64) * tl.num_programs(1) + stretch) * tokens * highest
    for first in range(0, rank, RANKS):
        k = (first + tl.arange(0, RANKS).to(tl.int64))[None, :]
        total = tl.zeros((TOKENS, RANKS), tl.float32)
        for start in range(stretch * LONG, stretch * LONG + LONG, INPUTS):
            j = start + tl.arange(0, INPUTS).to(tl.int64)
            here, there = j[None, :], j[:, None]
            left = tl.load(x + row * x_row + t * x_token + here * x_beside, (t < tokens) & (here < inputs), other=0.0)
            right = tl.load(down + k * inputs + there, mask=(k < rank) & (there < inputs), other=0.0)
            total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision=PRODUCT)
        tl.store(into + t * highest + k, total, mask=(t < tokens) & (k < rank))


@triton.jit
def expand(
    table,
    scales,
    inner,
    y,
    tokens,
    outputs,
    highest,
    stretches,
    y_row,
    y_token,
    y_beside,
    STORE: tl.constexpr,
    FACTOR: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """``y[row] += scale * (sum of inner over its stretches) @ up.T``, rounded once, for some tokens and outputs.

    Args:
        table: int64, as in ``Segments``.
        scales: float32, one a segment.
        inner: as ``shrink`` leaves it.
        y: ``[size, tokens, outputs]`` with strides ``y_row``, ``y_token`` and ``y_beside``; bfloat16 comes as int16.
        tokens, outputs, highest, stretches: sizes.
        STORE, FACTOR: dtypes of outputs and factors.
        WIDE: as in ``Segments``.
        TOKENS, OUTPUTS, RANKS: of a tile.
    """
    blocks = tl.cdiv(tokens, TOKENS)
    segment = tl.program_id(0) // blocks
    row, rank = tl.load(table + segment * _TABLE), tl.load(table + segment * _TABLE + 1)
    up = tl.load(table + segment * _TABLE + 2).to(tl.pointer_type(FACTOR))
    if WIDE:
        up, rank = tl.multiple_of(up, 16), tl.multiple_of(rank, 8)
    t = ((tl.program_id(0) % blocks) * TOKENS + tl.arange(0, TOKENS).to(tl.int64))[:, None]
    o = (tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS).to(tl.int64))[None, :]
    found = inner + segment.to(tl.int64) * stretches * tokens * highest
    added = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    for first in range(0, rank, RANKS):
        k = first + tl.arange(0, RANKS).to(tl.int64)
        left = tl.zeros((TOKENS, RANKS), tl.float32)
        for stretch in range(stretches):
            at = found + (stretch * tokens + t) * highest + k[None, :]
            left += tl.load(at, mask=(t < tokens) & (k[None, :] < rank), other=0.0)
        right = tl.load(up + o * rank + k[:, None], mask=(o < outputs) & (k[:, None] < rank), other=0.0)
        added = tl.dot(left, right.to(tl.float32), added, input_precision="tf32x3")
    added *= tl.load(scales + segment)
    at = y + row * y_row + t * y_token + o * y_beside
    inside = (t < tokens) & (o < outputs)
    stored = tl.load(at, mask=inside, other=0)
    if STORE == tl.int16:
        tl.store(at, to_bfloat16(from_bfloat16(stored) + added), mask=inside)
    else:
        tl.store(at, (stored.to(tl.float32) + added).to(STORE), mask=inside)


def add_segments(y: torch.Tensor, x: torch.Tensor, segments: Segments, scales: torch.Tensor) -> None:
    """Add to some rows of ``y``, in place, the change that each has; see ``Segments``.

    Args:
        y: ``[size, tokens, out]`` with any strides, of the factors' dtype: bfloat16, float16 or float32.
        x: ``[size, tokens, in]``, likewise.
        segments: the rows and their factors.
        scales: float32 ``[rows]``, on their device.
    """
    (_, tokens, outputs), inputs, count = y.shape, x.shape[2], len(segments.rows)
    blocks, stretches = count * -(-tokens // TOKENS), -(-inputs // INPUTS[0])
    factor, bits = _DTYPES[y.dtype], y.dtype == torch.bfloat16
    inner = torch.empty(count, stretches, tokens, segments.highest, dtype=torch.float32, device=y.device)
    if not blocks or not outputs:
        return
    with torch.cuda.device(y.device) if y.device.type == "cuda" else nullcontext():  # kernels run on the current one
        shrink[(blocks, stretches)](
            segments.table,
            x,
            inner,
            tokens,
            inputs,
            segments.highest,
            *x.stride(),
            FACTOR=factor,
            PRODUCT="tf32x3" if y.dtype == torch.float32 else "tf32",
            WIDE=segments.wide,
            TOKENS=TOKENS,
            LONG=INPUTS[0],
            INPUTS=INPUTS[1],
            RANKS=RANKS,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
        expand[(blocks, -(-outputs // OUTPUTS))](
            segments.table,
            scales,
            inner,
            y.view(torch.int16) if bits else y,
            tokens,
            outputs,
            segments.highest,
            stretches,
            *y.stride(),
            STORE=tl.int16 if bits else factor,
            FACTOR=factor,
            WIDE=segments.wide,
            TOKENS=TOKENS,
            OUTPUTS=OUTPUTS,
            RANKS=RANKS,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )
    if not y.is_inference():
        torch.autograd.graph.increment_version(y)  # as an operation of PyTorch's would
