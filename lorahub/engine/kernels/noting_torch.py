"""Merges that note their way back in plain torch: what ``noting_triton`` computes, one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence

from lorahub.engine.kernels.merge_torch import merge_patches, result_of
from lorahub.engine.kernels.patches import Outcome, Patch
from lorahub.engine.kernels.tiles import COLS, FAR, PLACE, ROWS, Foreseen, Noter, Tiles, tile_count
from lorahub.engine.undoing.residual import integers
from lorahub.lazy import torch

__all__ = ["NOTER"]


def _look(patches: Sequence[Patch]) -> list[Foreseen]:
    found = []
    for patch in patches:
        outcome, _, difference = _differences(patch)
        tiles, _ = _places(difference)
        far = _is_far(difference[difference != 0])
        several = tile_count(patch.weight.shape)
        counts = torch.stack([torch.bincount(each, minlength=several) for each in (tiles, tiles[far])], 1)
        found.append(Foreseen(patch, outcome, counts.to(torch.int32)))
    return found


def _write(foreseen: Sequence[Foreseen]) -> list[Tiles]:
    return [_note(each) for each in foreseen]


def _note(foreseen: Foreseen) -> Tiles:
    patch, counts = foreseen.patch, foreseen.counts
    _, after, difference = _differences(patch)
    tiles, places = _places(difference)
    steps = difference[difference != 0]
    order = torch.argsort(tiles << PLACE | places)
    tiles, places, steps = tiles[order], places[order], steps[order]
    far = _is_far(steps)
    taken = counts.long().sum(1)
    begins = taken.cumsum(0) - taken
    page = torch.zeros(int(taken.sum()), dtype=torch.int16, device=counts.device)
    entries = (steps.masked_fill(far, FAR) << PLACE | places).to(torch.int16)
    page[begins[tiles] + _number(tiles)] = entries
    behind = begins + counts[:, 0]
    page[behind[tiles[far]] + _number(tiles[far])] = steps[far].to(torch.int16)
    patch.weight.copy_(after)
    return Tiles((patch.weight.shape[0], patch.weight.shape[1]), page, begins, counts)


def _restore(pairs: Sequence[tuple[Tiles, torch.Tensor]]) -> None:
    for tiles, matrix in pairs:
        many, device = tiles.counts.long(), tiles.counts.device
        of = torch.arange(len(many), device=device).repeat_interleave(many[:, 0])
        entries = tiles.page[tiles.begins[of] + _number(of)].to(torch.int32)
        steps, places = entries >> PLACE, (entries & ((1 << PLACE) - 1)).long()
        far = steps == FAR
        of_far = of[far]
        steps[far] = tiles.page[tiles.begins[of_far] + many[of_far, 0] + _number(of_far)].to(torch.int32)
        across = -(-tiles.shape[1] // COLS)
        i, j = of // across * ROWS + places // COLS, of % across * COLS + places % COLS
        integers(matrix).index_add_(0, i * tiles.shape[1] + j, steps.to(torch.int16))


NOTER = Noter(look=_look, write=_write, put=merge_patches, restore=_restore)


def _differences(patch: Patch) -> tuple[Outcome, torch.Tensor, torch.Tensor]:
    """What comes of a patch, what it stores, and what taking that off gets wrong as int32 of 16-bit steps."""
    outcome, after, back = result_of(patch)
    wanted, given = (each.contiguous().view(torch.int16).to(torch.int32) for each in (patch.source, back))
    return outcome, after, (wanted - given).to(torch.int16).to(torch.int32)


def _places(difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every difference, row by row, the tile and the place there."""
    i, j = difference.nonzero(as_tuple=True)
    across = -(-difference.shape[1] // COLS)
    return i // ROWS * across + j // COLS, i % ROWS * COLS + j % COLS


def _is_far(steps: torch.Tensor) -> torch.Tensor:
    return (steps <= FAR) | (steps >= -FAR)


def _number(sorted_tiles: torch.Tensor) -> torch.Tensor:
    """Of tiles in order, which time each is there: 0, 1, ... and again from 0."""
    positions = torch.arange(len(sorted_tiles), device=sorted_tiles.device)
    return positions - torch.searchsorted(sorted_tiles, sorted_tiles)
