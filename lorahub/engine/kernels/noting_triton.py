"""Merges that note their way back in the pass that writes: two launches for many patches, however many there are.

The first one only looks: what will come of each patch, and how many differences each tile will have.  So the page that
the second one fills has exactly the size, nothing is written where a result is no number, and where a tile's
differences lie depends on the numbers alone.  Runs under Triton's interpreter too, where tensors lie on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import triton
import triton.language as tl

from lorahub.engine.folding.sums import Change
from lorahub.engine.kernels import tiles as format_of
from lorahub.engine.kernels.bits_triton import to_bfloat16
from lorahub.engine.kernels.merge_triton import merge_patches
from lorahub.engine.kernels.patches import Outcome, Patch, batches
from lorahub.engine.kernels.sums_triton import (
    BLOCK,
    OPTIONS,
    numbers_of,
    on_device,
    product_of,
    programs,
    total_of,
    way_of,
)
from lorahub.engine.kernels.tiles import Foreseen, Noter, Tiles, tile_count
from lorahub.lazy import torch

__all__ = ["NOTER"]

_COLUMNS = tl.constexpr(8)  # of the table of matrices
_SUMS = tl.constexpr(5)  # for each tile: the sums of a ``Change``, and how many numbers are not finite
_PLACE = tl.constexpr(format_of.PLACE)
_WITHIN = tl.constexpr((1 << format_of.PLACE) - 1)
_FAR = tl.constexpr(format_of.FAR)
_AT_ONCE = 512  # entries that are restored at a time
_WARPS = 4  # for that


@triton.jit
def _bits(stored, STORE: tl.constexpr):
    """The bits of 16-bit numbers as an integer."""
    return (stored if STORE == tl.int16 else stored.to(tl.int16, bitcast=True)).to(tl.int32)


@triton.jit
def _in_order(flags, first):
    """Which number each flag that is set has, row by row, counted from ``first``; and how many there are."""
    ones = flags.to(tl.int32)
    of_row = tl.sum(ones, 1)
    before = tl.cumsum(of_row, 0) - of_row
    return first + before[:, None] + tl.cumsum(ones, 1) - 1, tl.sum(of_row, 0)


@triton.jit
def note_tiles(
    table,
    scales,
    part_of_tile,
    tiles,
    sums,
    counts,
    begins,
    page,
    STORE: tl.constexpr,
    FACTOR: tl.constexpr,
    SUM: tl.constexpr,
    PRODUCT: tl.constexpr,
    WIDE: tl.constexpr,
    WRITE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Look at tiles ``program_id``, ``program_id + num_programs``, ..., or write and note them.

    Args:
        table: int64, ``_COLUMNS`` for each matrix: addresses of before, weight, up and down; rows, columns, rank; its
            first tile.
        scales: float64, one a matrix.
        part_of_tile: int32, the matrix of each tile.
        tiles: how many.
        sums: float64, ``_SUMS`` for each tile; only looking writes them.
        counts: int32, two for each tile: differences, and those that are far; only looking writes them.
        begins: int64, where in the page each tile's stretch begins.
        page: int16.
        STORE, FACTOR, SUM, PRODUCT, WIDE, ROWS, COLS, RANKS: as in ``merge_tiles``; 16 bits are stored.
        WRITE: whether to write and note, or to look.
    """
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        part = tl.load(part_of_tile + tile)
        row = table + part * _COLUMNS
        source = tl.load(row).to(tl.pointer_type(STORE))
        weight = tl.load(row + 1).to(tl.pointer_type(STORE))
        up = tl.load(row + 2).to(tl.pointer_type(FACTOR))
        down = tl.load(row + 3).to(tl.pointer_type(FACTOR))
        height = tl.load(row + 4)
        width = tl.load(row + 5)
        rank = tl.load(row + 6)
        here = tile - tl.load(row + 7)
        if WIDE:
            source, weight, down = tl.multiple_of(source, 16), tl.multiple_of(weight, 16), tl.multiple_of(down, 16)
            width = tl.multiple_of(width, 16)
        scale = tl.load(scales + part).to(SUM)
        across = tl.cdiv(width, COLS)
        local_i = tl.arange(0, ROWS)[:, None]
        local_j = tl.arange(0, COLS)[None, :]
        i = (here // across) * ROWS + local_i.to(tl.int64)
        j = (here % across) * COLS + local_j.to(tl.int64)
        inside = (i < height) & (j < width)
        stored = tl.load(source + i * width + j, mask=inside, other=0)
        before = numbers_of(stored, STORE, SUM)
        added = product_of(up, down, scale, i, j, height, width, rank, SUM, PRODUCT, ROWS, COLS, RANKS)
        total = before + added
        rounded = to_bfloat16(total) if STORE == tl.int16 else total.to(STORE)
        seen = numbers_of(rounded, STORE, SUM)
        less = seen - added
        back = to_bfloat16(less) if STORE == tl.int16 else less.to(STORE)
        steps = (_bits(stored, STORE) - _bits(back, STORE)).to(tl.int16).to(tl.int32)
        differ = inside & (steps != 0)
        far = differ & ((steps <= _FAR) | (steps >= -_FAR))
        if WRITE:
            tl.store(weight + i * width + j, rounded, mask=inside)
            begin = page + tl.load(begins + tile)
            order, several = _in_order(differ, 0)
            entry = (tl.where(far, _FAR, steps) << _PLACE) | (local_i * COLS + local_j)
            tl.store(begin + order, entry.to(tl.int16), mask=differ)
            order, _ = _in_order(far, several)
            tl.store(begin + order, steps.to(tl.int16), mask=far)
        else:
            effect = seen - before
            lost = effect - added
            told = sums + tile * _SUMS
            tl.store(told, total_of(before * before))
            tl.store(told + 1, total_of(added * added))
            tl.store(told + 2, total_of(effect * added))
            tl.store(told + 3, total_of(lost * lost))
            tl.store(told + 4, total_of((inside & ~(tl.abs(seen) < float("inf"))).to(tl.float32)))
            tl.store(counts + 2 * tile, tl.sum(tl.sum(differ.to(tl.int32), 1), 0))
            tl.store(counts + 2 * tile + 1, tl.sum(tl.sum(far.to(tl.int32), 1), 0))


@triton.jit
def restore_tiles(table, part_of_tile, tiles, ROWS: tl.constexpr, COLS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Add what was noted to tiles ``program_id``, ``program_id + num_programs``, ...

    Args:
        table: int64, six for each matrix: addresses of its numbers, taken for int16, of its page, begins and counts;
            its columns; its first tile.
        part_of_tile: int32, the matrix of each tile.
        tiles: how many.
        ROWS, COLS: of a tile.
        AT_ONCE: entries that are gone through at a time.
    """
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = table + tl.load(part_of_tile + tile) * 6
        matrix = tl.load(row).to(tl.pointer_type(tl.int16))
        page = tl.load(row + 1).to(tl.pointer_type(tl.int16))
        begins = tl.load(row + 2).to(tl.pointer_type(tl.int64))
        counts = tl.load(row + 3).to(tl.pointer_type(tl.int32))
        width = tl.load(row + 4)
        here = tile - tl.load(row + 5)
        across = tl.cdiv(width, COLS)
        begin = page + tl.load(begins + here)
        several = tl.load(counts + 2 * here)
        met = tl.full((), 0, tl.int32)  # that are far
        for start in range(0, several, AT_ONCE):
            k = start + tl.arange(0, AT_ONCE)
            entry = tl.load(begin + k, mask=k < several, other=0).to(tl.int32)
            place = entry & _WITHIN
            far = (k < several) & ((entry >> _PLACE) == _FAR)
            apart = tl.load(begin + several + met + tl.cumsum(far.to(tl.int32), 0) - 1, mask=far, other=0)
            steps = tl.where(far, apart.to(tl.int32), entry >> _PLACE)
            i = (here // across) * ROWS + place // COLS
            at = matrix + i * width + (here % across) * COLS + place % COLS
            found = tl.load(at, mask=k < several, other=0).to(tl.int32)
            tl.store(at, (found + steps).to(tl.int16), mask=k < several)
            met += tl.sum(far.to(tl.int32), 0)


def _look(patches: Sequence[Patch]) -> list[Foreseen]:
    found: dict[int, Foreseen] = {}
    for numbers in batches(patches):
        found |= zip(numbers, _look_at([patches[number] for number in numbers]), strict=True)
    return [found[number] for number in range(len(patches))]


def _look_at(patches: Sequence[Patch]) -> list[Foreseen]:
    device, several = patches[0].weight.device, _sizes(patches)
    tiles = sum(several)
    sums = torch.zeros(tiles, int(_SUMS), dtype=torch.float64, device=device)
    counts = torch.zeros(tiles, 2, dtype=torch.int32, device=device)
    nothing = torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int16, device=device)
    _start(patches, several, (sums, counts, *nothing), write=False)
    together = torch.segment_reduce(sums, "sum", lengths=torch.tensor(several, device=device), axis=0).tolist()
    return [
        Foreseen(patch, Outcome(Change(before, added, added, kept, lost), finite=not wrong), own)
        for patch, (before, added, kept, lost, wrong), own in zip(patches, together, counts.split(several), strict=True)
    ]


def _write(foreseen: Sequence[Foreseen]) -> list[Tiles]:
    found: dict[int, Tiles] = {}
    for numbers in batches([each.patch for each in foreseen]):
        found |= zip(numbers, _write_some([foreseen[number] for number in numbers]), strict=True)
    return [found[number] for number in range(len(foreseen))]


def _write_some(foreseen: Sequence[Foreseen]) -> list[Tiles]:
    patches = [each.patch for each in foreseen]
    device, several = patches[0].weight.device, _sizes(patches)
    counts = torch.cat([each.counts for each in foreseen])
    taken = counts.sum(1, dtype=torch.int64)
    ends = taken.cumsum(0)
    begins = ends - taken
    lasts = torch.tensor([*accumulate(several)], device=device)
    stops = torch.cat((ends.new_zeros(1), ends))[lasts].tolist()  # of each matrix, in the page
    page = torch.empty(stops[-1], dtype=torch.int16, device=device)
    nothing = torch.empty(0, dtype=torch.float64, device=device), torch.empty(0, dtype=torch.int32, device=device)
    _start(patches, several, (*nothing, begins, page), write=True)
    for patch in patches:
        if not patch.weight.is_inference():
            torch.autograd.graph.increment_version(patch.weight)  # as an operation of PyTorch's would
    starts = [0, *stops[:-1]]
    return [
        Tiles((patch.weight.shape[0], patch.weight.shape[1]), page[start:stop], own - start, each.counts)
        for patch, each, own, start, stop in zip(patches, foreseen, begins.split(several), starts, stops, strict=True)
    ]


def _start(patches: Sequence[Patch], several: Sequence[int], memory: Sequence[torch.Tensor], *, write: bool) -> None:
    """Look at patches of one batch, or write them."""
    device = patches[0].weight.device
    *starts, tiles = accumulate(several, initial=0)
    if not tiles:
        return
    rows, cols, ranks = BLOCK
    table = [_row(patch, start) for patch, start in zip(patches, starts, strict=True)]
    scales = torch.tensor([patch.scale for patch in patches], dtype=torch.float64)
    with on_device(device):
        note_tiles[(min(tiles, programs(device)),)](
            torch.tensor(table).to(device),
            scales.to(device),
            _parts(several, tiles, device),
            tiles,
            *memory,
            **way_of(patches[0]),
            WRITE=write,
            ROWS=rows,
            COLS=cols,
            RANKS=ranks,
            **OPTIONS,
        )


def _restore(pairs: Sequence[tuple[Tiles, torch.Tensor]]) -> None:
    if not pairs:
        return
    device, several = pairs[0][1].device, [len(each.counts) for each, _ in pairs]
    *starts, tiles = accumulate(several, initial=0)
    if not tiles:
        return
    table = [
        (*(part.data_ptr() for part in (matrix, each.page, each.begins, each.counts)), each.shape[1], start)
        for (each, matrix), start in zip(pairs, starts, strict=True)
    ]
    rows, cols, _ = BLOCK
    with on_device(device):
        restore_tiles[(min(tiles, programs(device)),)](
            torch.tensor(table).to(device),
            _parts(several, tiles, device),
            tiles,
            ROWS=rows,
            COLS=cols,
            AT_ONCE=_AT_ONCE,
            num_warps=_WARPS,
            enable_fp_fusion=False,
        )


NOTER = Noter(look=_look, write=_write, put=merge_patches, restore=_restore)


def _sizes(patches: Sequence[Patch]) -> list[int]:
    return [tile_count(patch.weight.shape) for patch in patches]


def _parts(several: Sequence[int], tiles: int, device: torch.device) -> torch.Tensor:
    """The matrix of each tile."""
    parts = torch.arange(len(several), dtype=torch.int32, device=device)
    return parts.repeat_interleave(torch.tensor(several, device=device), output_size=tiles)


def _row(patch: Patch, start: int) -> list[int]:
    """One row of the table, as ``note_tiles`` reads it."""
    addresses = (each.data_ptr() for each in (patch.source, patch.weight, patch.up, patch.down))
    return [*addresses, *patch.weight.shape, patch.up.shape[1], start]
