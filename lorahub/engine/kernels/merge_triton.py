"""The merge of many patches as one launch: a fixed number of programs walk a table of matrices, tile by tile.

Every tile of a weight is read once and written once, so the launch moves what must be moved: 4 bytes for each
bfloat16 weight, and the factors.  Where rows get lengths (DoRA), they are read again from the cache.  What is written
depends on the tile alone, never on how many programs there are.  One TF32 product of bfloat16 factors is exact; for
float32 factors three of them keep 21 bits or more.  Runs under Triton's interpreter too, where tensors lie on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import final

import triton
import triton.language as tl

from lorahub.engine.folding.sums import Change
from lorahub.engine.kernels.bits_triton import to_bfloat16
from lorahub.engine.kernels.patches import Merge, Outcome, Patch, batches
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
from lorahub.lazy import torch

__all__ = ["DIRECTED", "merge_patches", "prepare_patches"]

DIRECTED = 16
"""Rows of a tile where they get lengths: few, so that they are still in the cache when they are written."""

_COLUMNS = tl.constexpr(14)  # of the table of matrices
_SUMS = tl.constexpr(5)  # for each tile: the sums of a ``Change``, and how many numbers are not finite


@triton.jit
def merge_tiles(
    table,
    numbers,
    part_of_tile,
    tiles,
    sums,
    STORE: tl.constexpr,
    FACTOR: tl.constexpr,
    SUM: tl.constexpr,
    PRODUCT: tl.constexpr,
    SAVE: tl.constexpr,
    WIDE: tl.constexpr,
    DIRECTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    RANKS: tl.constexpr,
):
    """Fold tiles ``program_id``, ``program_id + num_programs``, ...

    Args:
        table: int64, ``_COLUMNS`` for each matrix: addresses of before, weight, up, down, saved and lengths; rows,
            columns, rank; two strides of before and two of the weight; its first tile.
        numbers: float64, two a matrix: scale and strength.
        part_of_tile: int32, the matrix of each tile.
        tiles: how many.
        sums: float64, ``_SUMS`` for each tile.
        STORE, FACTOR, SUM: dtypes of weights, factors and sums; bfloat16 weights come as int16.
        PRODUCT: how float32 products are made of TF32 ones.
        SAVE: whether what is added to is put aside.
        WIDE: rows lie together and all addresses are multiples of 16 bytes, so that 16 bytes are moved at a time.
        DIRECTED: whether rows get lengths; a tile is then all columns of its rows, gone through twice, ``COLS`` at a
            time: the second time they come from the cache.
        ROWS, COLS, RANKS: of a tile.
    """
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        part = tl.load(part_of_tile + tile)
        row = table + part * _COLUMNS
        source = tl.load(row).to(tl.pointer_type(STORE))
        weight = tl.load(row + 1).to(tl.pointer_type(STORE))
        up = tl.load(row + 2).to(tl.pointer_type(FACTOR))
        down = tl.load(row + 3).to(tl.pointer_type(FACTOR))
        saved = tl.load(row + 4).to(tl.pointer_type(STORE))
        height = tl.load(row + 6)
        width = tl.load(row + 7)
        rank = tl.load(row + 8)
        source_below = tl.load(row + 9)
        source_beside = tl.load(row + 10)
        below = tl.load(row + 11)
        beside = tl.load(row + 12)
        here = tile - tl.load(row + 13)
        if WIDE:
            source, weight = tl.multiple_of(source, 16), tl.multiple_of(weight, 16)
            saved, down = tl.multiple_of(saved, 16), tl.multiple_of(down, 16)
            source_below, source_beside = tl.multiple_of(source_below, 16), 1
            width, below, beside = tl.multiple_of(width, 16), tl.multiple_of(below, 16), 1
        scale = tl.load(numbers + 2 * part).to(SUM)
        across = 1 if DIRECTED else tl.cdiv(width, COLS)
        first = (here % across) * COLS
        last = width if DIRECTED else first + COLS
        i = (here // across) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        keep = tl.full((ROWS, 1), 1.0, SUM)
        multiple = keep
        if DIRECTED:
            squares = tl.zeros((ROWS,), tl.float64)
            for start in range(first, last, COLS):
                j = start + tl.arange(0, COLS).to(tl.int64)[None, :]
                at = source + i * source_below + j * source_beside
                stored = tl.load(at, mask=(i < height) & (j < width), other=0)
                moved = numbers_of(stored, STORE, SUM)
                moved += product_of(up, down, scale, i, j, height, width, rank, SUM, PRODUCT, ROWS, COLS, RANKS)
                squares += tl.sum(moved * moved, 1).to(tl.float64)
            found = tl.sqrt(squares)[:, None]
            lengths = tl.load(row + 5).to(tl.pointer_type(tl.float64))
            wanted = tl.load(lengths + i, mask=i < height, other=0.0)
            empty = (wanted == 0) & (found == 0)
            strength = tl.load(numbers + 2 * part + 1)
            ratio = strength * tl.where(empty, 1.0, wanted / tl.where(empty, 1.0, found))
            keep, multiple = (1.0 - strength + ratio).to(SUM), ratio.to(SUM)
        squared_before = tl.full((), 0.0, tl.float64)
        squared_added, kept, squared_lost, broken = squared_before, squared_before, squared_before, squared_before
        for start in range(first, last, COLS):
            j = start + tl.arange(0, COLS).to(tl.int64)[None, :]
            inside = (i < height) & (j < width)
            stored = tl.load(source + i * source_below + j * source_beside, mask=inside, other=0)
            if SAVE:
                tl.store(saved + i * width + j, stored, mask=inside)
            before = numbers_of(stored, STORE, SUM)
            added = product_of(up, down, scale, i, j, height, width, rank, SUM, PRODUCT, ROWS, COLS, RANKS)
            total = keep * before + multiple * added if DIRECTED else before + added
            if DIRECTED:
                added = total - before
            rounded = to_bfloat16(total) if STORE == tl.int16 else total.to(STORE)
            tl.store(weight + i * below + j * beside, rounded, mask=inside)
            seen = numbers_of(rounded, STORE, SUM)
            effect = seen - before
            lost = effect - added
            wrong = inside & ~(tl.abs(seen) < float("inf"))
            squared_before += total_of(before * before)
            squared_added += total_of(added * added)
            kept += total_of(effect * added)
            squared_lost += total_of(lost * lost)
            broken += total_of(wrong.to(tl.float32))
        told = sums + tile * _SUMS
        tl.store(told, squared_before)
        tl.store(told + 1, squared_added)
        tl.store(told + 2, kept)
        tl.store(told + 3, squared_lost)
        tl.store(told + 4, broken)


def merge_patches(patches: Sequence[Patch]) -> list[Outcome]:
    """Change every weight, one launch for each of their ``batches``, and say what came of each; see ``Patch``.

    Where something is raised, of a batch every weight was changed or none.
    """
    return prepare_patches(patches)()


def prepare_patches(patches: Sequence[Patch]) -> Merge:
    """What does ``merge_patches`` any number of times: all that is known before lies on the device then."""
    turned = [_along_rows(patch) for patch in patches]
    launches = [(numbers, _Launch([turned[number] for number in numbers])) for numbers in batches(turned)]

    def merge() -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        for numbers, launch in launches:
            outcomes |= zip(numbers, launch.run(), strict=True)
        return [outcomes[number] for number in range(len(patches))]

    return merge


def _along_rows(patch: Patch) -> Patch:
    """The same change with the weight's rows together in memory, where its columns are."""
    alone = patch.saved is None and patch.before is None and patch.lengths is None
    if patch.weight.stride(1) == 1 or patch.weight.stride(0) != 1 or not alone:
        return patch
    up, down = patch.down.T.contiguous(), patch.up.T.contiguous()
    return Patch(weight=patch.weight.T, up=up, down=down, scale=patch.scale)


@final
class _Launch:
    """One launch; what comes back from the device are a few numbers for each patch."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        self._patches, device = patches, patches[0].weight.device  # which are pointed to
        counts = list(map(_tiles, patches))
        *starts, self._tiles = accumulate(counts, initial=0)
        table = torch.tensor([_row(patch, start) for patch, start in zip(patches, starts, strict=True)])
        numbers = torch.tensor([(patch.scale, patch.strength) for patch in patches], dtype=torch.float64)
        parts = torch.arange(len(patches), dtype=torch.int32, device=device)
        self._many = torch.tensor(counts).to(device)
        self._sums = torch.empty(self._tiles, int(_SUMS), dtype=torch.float64, device=device)
        self._arguments = (
            table.to(device),
            numbers.to(device),
            parts.repeat_interleave(self._many, output_size=self._tiles),
            self._tiles,
            self._sums,
        )
        self._versioned = [patch.weight for patch in patches if not patch.weight.is_inference()]

    def run(self) -> list[Outcome]:
        """Change every weight or none."""
        device = self._sums.device
        if not self._tiles:
            return [Outcome(Change(), finite=True) for _ in self._patches]
        with on_device(device):
            _start(self._arguments, self._patches[0], min(self._tiles, programs(device)))
        torch.autograd.graph.increment_version(self._versioned)  # as an operation of PyTorch's would
        return [
            _outcome(found) for found in torch.segment_reduce(self._sums, "sum", lengths=self._many, axis=0).tolist()
        ]


def _tiles(patch: Patch) -> int:
    """How many tiles a weight has."""
    (height, width), (rows, cols, _) = patch.weight.shape, BLOCK
    return -(-height // rows) * -(-width // cols) if patch.lengths is None else -(-height // DIRECTED) * (width > 0)


def _start(arguments: Sequence[object], first: Patch, programs: int) -> None:
    rows, cols, ranks = BLOCK
    merge_tiles[(programs,)](
        *arguments,
        **way_of(first),
        SAVE=first.saved is not None,
        DIRECTED=first.lengths is not None,
        ROWS=rows if first.lengths is None else DIRECTED,
        COLS=cols,
        RANKS=ranks,
        **OPTIONS,
    )


def _row(patch: Patch, start: int) -> list[int]:
    """One row of the table, as ``merge_tiles`` reads it."""
    source, weight = patch.source, patch.weight
    pointed = (source, weight, patch.up, patch.down, patch.saved, patch.lengths)
    addresses = (0 if each is None else each.data_ptr() for each in pointed)
    return [*addresses, *weight.shape, patch.up.shape[1], *source.stride(), *weight.stride(), start]


def _outcome(sums: Sequence[float]) -> Outcome:
    before, added, kept, lost, wrong = sums
    return Outcome(Change(before, added, added, kept, lost), finite=not wrong)
