"""Checksums of many tensors as one launch: a fixed number of programs walk their rows of 64 words, tile by tile.

All sums are modulo 2**64, so their order does not count.  Runs under Triton's interpreter too, where tensors lie on
the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from itertools import accumulate

import triton
import triton.language as tl

from lorahub.engine.kernels.checksum_torch import COLUMNS, ROWS, STEP, checksum_weights, flat
from lorahub.lazy import torch

__all__ = ["checksums"]

_LINES = 32  # rows of a tile: 16 KB
_BYTES = 8 * COLUMNS
_PROGRAMS = 8  # for each multiprocessor
_COLUMNS = tl.constexpr(5)  # of the table of tensors
_WARPS = 4


@triton.jit
def sum_tiles(
    table,
    part_of_tile,
    tiles,
    weights,
    powers,
    sums,
    LINES: tl.constexpr,
    WORDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum up tiles ``program_id``, ``program_id + num_programs``, ...

    Args:
        table: int64, ``_COLUMNS`` for each tensor: its address, a multiple of 8; whole rows; bytes behind them; the
            power of its last row's table; its first tile.
        part_of_tile: int32, the tensor of each tile.
        tiles: how many.
        weights: int64, of ``checksum_weights``.
        powers: int64, those of ``STEP``.
        sums: int64, one for each tile.
        LINES: rows of a tile.
        WORDS: of a row.
        ROWS: of a table.
    """
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = table + tl.load(part_of_tile + tile) * _COLUMNS
        data = tl.load(row).to(tl.pointer_type(tl.int64))
        lines = tl.load(row + 1)
        rest = tl.load(row + 2)
        first = (tile - tl.load(row + 4)) * LINES
        if first < lines:
            i = first + tl.arange(0, LINES).to(tl.int64)[:, None]
            j = tl.arange(0, WORDS).to(tl.int64)[None, :]
            words = tl.load(data + i * WORDS + j, mask=i < lines, other=0)
            weighed = words * (tl.load(weights + i % ROWS) + tl.load(weights + ROWS + j))
            later = (lines - 1) // ROWS - first // ROWS
            power = tl.load(powers + tl.load(row + 3) + later)
            tl.store(sums + tile, tl.sum(tl.sum(weighed, 1), 0) * power)
        else:  # what is behind the last whole row, byte by byte
            k = tl.arange(0, 8 * WORDS)
            some = tl.load((data + lines * WORDS).to(tl.pointer_type(tl.uint8)) + k, mask=k < rest, other=0)
            last = some.to(tl.int64) * tl.load(weights + k)
            tl.store(sums + tile, tl.sum(last, 0) + lines * (8 * WORDS) + rest)


def checksums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """As the plain twin's, in one launch; nothing is waited for."""
    data = [_aligned(flat(tensor)) for tensor in tensors]
    if not data:
        return torch.zeros(0, dtype=torch.int64)
    device = data[0].device
    sizes = [divmod(each.numel(), _BYTES) for each in data]
    counts = [-(-lines // _LINES) + (rest > 0) for lines, rest in sizes]
    *starts, tiles = accumulate(counts, initial=0)
    found = torch.zeros(len(data), dtype=torch.int64, device=device)
    if not tiles:
        return found
    rows = [
        (each.data_ptr(), lines, rest, int(rest > 0), start)
        for each, (lines, rest), start in zip(data, sizes, starts, strict=True)
    ]
    parts = torch.arange(len(data), dtype=torch.int32).repeat_interleave(torch.tensor(counts)).to(device)
    sums = torch.empty(tiles, dtype=torch.int64, device=device)
    most = max(lines for lines, _ in sizes) // ROWS + 2
    arguments = (torch.tensor(rows).to(device), parts, tiles, checksum_weights(device), _powers(device, most), sums)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # kernels run on the current one
        sum_tiles[(min(tiles, _programs(device)),)](
            *arguments, LINES=_LINES, WORDS=COLUMNS, ROWS=ROWS, num_warps=_WARPS, enable_fp_fusion=False
        )
    return found.index_add_(0, parts, sums)


def _aligned(data: torch.Tensor) -> torch.Tensor:
    return data.clone() if data.data_ptr() % 8 else data


@cache
def _powers(device: torch.device, count: int) -> torch.Tensor:
    """The first powers of ``STEP``, modulo 2**64."""
    numbers = [pow(STEP, exponent, 1 << 64) for exponent in range(count)]
    with torch.inference_mode(False):
        return torch.tensor([each - (each >> 63 << 64) for each in numbers]).to(device)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS
    return _PROGRAMS * int(torch.cuda.get_device_properties(device).multi_processor_count)
