"""The merge of many patches as one launch: a fixed number of programs walk a table of matrices, tile by tile.

Every tile of a weight is read once and written once, so the launch moves what must be moved: 4 bytes for each
bfloat16 weight, and the factors.  What is written depends on the tile alone, never on how many programs there are.
One TF32 product of bfloat16 factors is exact; for float32 factors three of them keep 21 bits or more.  Runs under
Triton's interpreter too, where tensors lie on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import triton
import triton.language as tl

from lorahub.engine.folding.sums import Change
from lorahub.engine.kernels.patches import Outcome, Patch, accumulator
from lorahub.lazy import torch

__all__ = ["BLOCK", "merge_patches"]

BLOCK = (64, 128, 16)
"""Rows, columns and ranks of a tile."""

_COLUMNS = tl.constexpr(10)  # of the table of matrices
_SUMS = tl.constexpr(3)  # for each tile: squares before, squares added, numbers that are not finite
_PROGRAMS = 4  # for each multiprocessor
_WARPS = 8
_ALIGNED = 16  # bytes of an address, and numbers of a width
_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
_BITS = {torch.bfloat16: tl.int16}  # stored dtypes that are rounded to by integers


@triton.jit
def _to_bfloat16(value):
    """Bits of the nearest bfloat16, ties to even: by integers, so that every backend gives the same."""
    bits = value.to(tl.int32, bitcast=True)
    nearest = bits + 0x7FFF + ((bits >> 16) & 1)
    return tl.where(value != value, 0x7FC0, nearest >> 16).to(tl.int16)


@triton.jit
def _from_bfloat16(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def merge_tiles(
    table,
    scales,
    part_of_tile,
    tiles,
    sums,
    STORE: tl.constexpr,
    FACTOR: tl.constexpr,
    SUM: tl.constexpr,
    PRODUCT: tl.constexpr,
    SAVE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Fold tiles ``program_id``, ``program_id + num_programs``, ...

    Args:
        table: int64, ``_COLUMNS`` for each matrix: addresses of weight, up, down and saved; rows, columns, rank; the
            weight's two strides; its first tile.
        scales: float64, one a matrix.
        part_of_tile: int32, the matrix of each tile.
        tiles: how many.
        sums: float64, ``_SUMS`` for each tile.
        STORE, FACTOR, SUM: dtypes of weights, factors and sums; bfloat16 weights come as int16.
        PRODUCT: how float32 products are made of TF32 ones.
        SAVE: whether untouched weights are put aside.
        WIDE: rows lie together and all addresses are multiples of 16 bytes, so that 16 bytes are moved at a time.
        ROWS, COLS, RANKS: of a tile.
    """
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        part = tl.load(part_of_tile + tile)
        row = table + part * _COLUMNS
        weight = tl.load(row).to(tl.pointer_type(STORE))
        up = tl.load(row + 1).to(tl.pointer_type(FACTOR))
        down = tl.load(row + 2).to(tl.pointer_type(FACTOR))
        saved = tl.load(row + 3).to(tl.pointer_type(STORE))
        height = tl.load(row + 4)
        width = tl.load(row + 5)
        rank = tl.load(row + 6)
        below = tl.load(row + 7)
        beside = tl.load(row + 8)
        here = tile - tl.load(row + 9)
        if WIDE:
            weight, saved, down = tl.multiple_of(weight, 16), tl.multiple_of(saved, 16), tl.multiple_of(down, 16)
            width, below, beside = tl.multiple_of(width, 16), tl.multiple_of(below, 16), 1
        across = tl.cdiv(width, COLS)
        i = (here // across) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        j = (here % across) * COLS + tl.arange(0, COLS).to(tl.int64)[None, :]
        inside = (i < height) & (j < width)
        added = tl.zeros((ROWS, COLS), SUM)
        for start in range(0, rank, RANKS):
            k = start + tl.arange(0, RANKS).to(tl.int64)
            left = tl.load(up + i * rank + k[None, :], mask=(i < height) & (k[None, :] < rank), other=0.0)
            right = tl.load(down + k[:, None] * width + j, mask=(k[:, None] < rank) & (j < width), other=0.0)
            if SUM == tl.float64:
                added = tl.dot(left.to(tl.float64), right.to(tl.float64), added)
            else:
                added = tl.dot(left.to(tl.float32), right.to(tl.float32), added, input_precision=PRODUCT)
        added *= tl.load(scales + part).to(SUM)
        at = weight + i * below + j * beside
        stored = tl.load(at, mask=inside, other=0)
        if SAVE:
            tl.store(saved + i * width + j, stored, mask=inside)
        if STORE == tl.int16:
            before = _from_bfloat16(stored)
            total = before + added
            rounded = _to_bfloat16(total)
            tl.store(at, rounded, mask=inside)
            seen = _from_bfloat16(rounded)
        else:
            before = stored.to(SUM)
            total = before + added
            rounded = total.to(STORE)
            tl.store(at, rounded, mask=inside)
            seen = rounded.to(tl.float32)
        wrong = inside & ~(tl.abs(seen) < float("inf"))
        tl.store(sums + tile * _SUMS, tl.sum(tl.sum((before * before).to(tl.float64), 1), 0))
        tl.store(sums + tile * _SUMS + 1, tl.sum(tl.sum((added * added).to(tl.float64), 1), 0))
        tl.store(sums + tile * _SUMS + 2, tl.sum(tl.sum(wrong.to(tl.float64), 1), 0))


def merge_patches(patches: Sequence[Patch]) -> list[Outcome]:
    """Change every weight, one launch for each group of equal dtypes, and say what came of each; see ``Patch``."""
    outcomes: dict[int, Outcome] = {}
    launches: dict[object, list[int]] = {}
    turned = [_along_rows(patch) for patch in patches]
    for number, patch in enumerate(turned):
        alike = (patch.weight.device, patch.weight.dtype, patch.up.dtype, patch.saved is None, _is_wide(patch))
        launches.setdefault(alike, []).append(number)
    for numbers in launches.values():
        outcomes |= zip(numbers, _launch([turned[number] for number in numbers]), strict=True)
    return [outcomes[number] for number in range(len(patches))]


def _along_rows(patch: Patch) -> Patch:
    """The same change with the weight's rows together in memory, where its columns are."""
    if patch.weight.stride(1) == 1 or patch.weight.stride(0) != 1 or patch.saved is not None:
        return patch
    up, down = patch.down.T.contiguous(), patch.up.T.contiguous()
    return Patch(weight=patch.weight.T, up=up, down=down, scale=patch.scale)


def _is_wide(patch: Patch) -> bool:
    tensors = [patch.weight, patch.down, *([] if patch.saved is None else [patch.saved])]
    sizes = (patch.weight.shape[1], patch.weight.stride(0))
    return (
        patch.weight.stride(1) == 1
        and all(size % _ALIGNED == 0 for size in sizes)
        and all(tensor.data_ptr() % _ALIGNED == 0 for tensor in tensors)
    )


def _launch(patches: Sequence[Patch]) -> list[Outcome]:
    rows, cols, ranks = BLOCK
    first, device = patches[0], patches[0].weight.device
    counts = torch.tensor([-(-patch.weight.shape[0] // rows) * -(-patch.weight.shape[1] // cols) for patch in patches])
    starts = [0, *counts.cumsum(0).tolist()]
    if not starts[-1]:
        return [Outcome(Change(), finite=True) for _ in patches]
    table = torch.tensor([_row(patch, start) for patch, start in zip(patches, starts, strict=False)])
    sums = torch.empty(starts[-1], int(_SUMS), dtype=torch.float64, device=device)
    merge_tiles[(min(starts[-1], _programs(device)),)](
        table.to(device),
        torch.tensor([patch.scale for patch in patches], dtype=torch.float64).to(device),
        torch.arange(len(patches), dtype=torch.int32).repeat_interleave(counts).to(device),
        starts[-1],
        sums,
        STORE=_BITS.get(first.weight.dtype) or _DTYPES[first.weight.dtype],
        FACTOR=_DTYPES[first.up.dtype],
        SUM=_DTYPES[accumulator(first.weight.dtype)],
        PRODUCT="tf32" if first.up.dtype == torch.bfloat16 else "tf32x3",
        SAVE=first.saved is not None,
        WIDE=_is_wide(first),
        ROWS=rows,
        COLS=cols,
        RANKS=ranks,
        num_warps=_WARPS,
    )
    found = sums.cpu()
    return [_outcome(found[start:stop]) for start, stop in pairwise(starts)]


def _row(patch: Patch, start: int) -> list[int]:
    """One row of the table, as ``merge_tiles`` reads it."""
    saved = 0 if patch.saved is None else patch.saved.data_ptr()
    addresses = (patch.weight.data_ptr(), patch.up.data_ptr(), patch.down.data_ptr(), saved)
    return [*addresses, *patch.weight.shape, patch.up.shape[1], *patch.weight.stride(), start]


def _outcome(sums: torch.Tensor) -> Outcome:
    before, added, wrong = sums.sum(0).tolist()
    return Outcome(Change(before, added), finite=not wrong)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS
    return _PROGRAMS * int(torch.cuda.get_device_properties(device).multi_processor_count)
