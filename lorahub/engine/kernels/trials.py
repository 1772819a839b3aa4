"""Small problems that a compiled kernel is tried on before its first use: against its plain twin, or what is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from math import isclose
from typing import TypeAlias

from lorahub.engine.crew import Workspace
from lorahub.engine.kernels import checksum_torch, merge_torch, segmented_torch
from lorahub.engine.kernels.merge_c import Kernel, Notes, Packed
from lorahub.engine.kernels.patches import Merge, Outcome, Patch
from lorahub.engine.kernels.segments import Segments
from lorahub.engine.kernels.tiles import Noter
from lorahub.lazy import torch

__all__ = ["Adder", "Merger", "Summer", "adds_alike", "is_right", "merges_alike", "notes_alike", "sums_alike"]

Merger: TypeAlias = "Callable[[Sequence[Patch]], Merge]"
Adder: TypeAlias = "Callable[[torch.Tensor, torch.Tensor, Segments, torch.Tensor], None]"
Summer: TypeAlias = "Callable[[Sequence[torch.Tensor]], torch.Tensor]"

_BATCHES = ((1, 96, 80), (19, 1100, 130))  # tokens, inputs, outputs: one tile, several of each
_RANKS = (16, 1, 37)
_STEPS = 64  # that sums of float32 may be off which were made in another order
_SHAPES = ((64, 128, 16), (70, 96, 5), (33, 40, 20))  # m, n, r: whole tiles, ragged ones, several steps of the rank


def is_right(found: Kernel, storage: torch.dtype) -> bool:
    """Whether a kernel gives what the plain twin gives, and its notes give back what was there."""
    for factors in (torch.bfloat16, torch.float32):
        ours, theirs = (_problem(storage, factors, torch.device("cpu")) for _ in range(2))
        merge_torch.merge_patches(theirs)
        for patch, other in zip(ours, theirs, strict=True):
            weight, saved = patch.weight, other.saved
            assert saved is not None
            notes = Notes(found, storage, weight.numel(), weight.shape[1], Workspace())
            packed = found.pack(patch.up.double(), patch.down.double(), storage)
            finite = found.add(packed, slice(None), patch.scale, weight, weight, notes)
            if not finite or not _near(weight, other.weight):
                return False
            back, marks = torch.empty_like(weight), checksum_torch.checksums((saved, weight))
            found.add(packed, slice(None), -patch.scale, weight, back)
            found.restore(notes.residual, back)
            if not torch.equal(back, saved) or marks.tolist() != [*map(int, notes.checksums())]:
                return False
            if marks.tolist() != [found.checksum(saved), found.checksum(weight)]:
                return False
            if not _rows_are_right(found, packed, patch, saved):
                return False
    return True


def _rows_are_right(found: Kernel, packed: Packed, merged: Patch, saved: torch.Tensor) -> bool:
    """Whether rows with the same numbers come out as those with one number do, and have the lengths that they have."""
    out, by_row = torch.empty_like(saved), torch.tensor([[1.0, merged.scale]] * len(saved), dtype=torch.float64)
    found.add_by_row(packed, slice(None), by_row, saved, out)
    wide = saved.double().addmm_(merged.up.double(), merged.down.double(), alpha=merged.scale)
    lengths = found.lengths(packed, slice(None), merged.scale, saved)
    return torch.equal(out, merged.weight) and torch.allclose(lengths, wide.norm(dim=1))


def merges_alike(prepare: Merger, device: torch.device, *, storage: torch.dtype) -> bool:
    """Whether what ``prepare`` makes gives what the plain twin gives on small problems: at most one rounding apart."""
    for factors in (torch.bfloat16, torch.float32):
        ours, theirs = (_problem(storage, factors, device) for _ in range(2))
        found, expected = prepare(ours)(), merge_torch.merge_patches(theirs)
        if not all(_close(a, b) for a, b in zip(ours, theirs, strict=True)):
            return False
        if not all(map(_tell_alike, found, expected)):
            return False
    return True


def notes_alike(noter: Noter, device: torch.device, *, storage: torch.dtype) -> bool:
    """Whether ``noter`` merges small problems as plain torch does, and its notes give back what was there."""
    for factors in (torch.bfloat16, torch.float32):
        ours, theirs = (_problem(storage, factors, device) for _ in range(2))
        expected = merge_torch.merge_patches(theirs)
        foreseen = noter.look([replace(patch, saved=None) for patch in ours])
        if not all(_tell_alike(each.outcome, other) for each, other in zip(foreseen, expected, strict=True)):
            return False
        tiles = noter.write(foreseen)
        if not all(_near(patch.weight, other.weight) for patch, other in zip(ours, theirs, strict=True)):
            return False
        noter.put([replace(patch, saved=None, scale=-patch.scale) for patch in ours])
        noter.restore([(each, patch.weight) for each, patch in zip(tiles, ours, strict=True)])
        pairs = [(patch.weight, other.saved) for patch, other in zip(ours, theirs, strict=True)]
        if not all(before is not None and torch.equal(found, before) for found, before in pairs):
            return False
    return True


def adds_alike(add: Adder, device: torch.device, *, dtype: torch.dtype) -> bool:
    """Whether ``add`` gives what the plain twin gives on a small problem: at most one rounding apart."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    for tokens, inputs, outputs in _BATCHES:
        ups = [numbers(outputs, rank) for rank in _RANKS]
        downs = [numbers(rank, inputs) / inputs**0.5 for rank in _RANKS]
        segments = Segments.of(((4, 1), (2,), (0,)), ups, downs)
        ours, x = numbers(5, tokens, outputs), numbers(5, tokens, inputs)
        theirs = ours.clone()
        scales = torch.tensor([0.1, 0.2, 0.05, 0.3], device=device)
        add(ours, x, segments, scales)
        segmented_torch.add_segments(theirs, x, segments, scales)
        if not _near(ours, theirs, steps=_STEPS if dtype == torch.float32 else 1):
            return False
    return True


def sums_alike(sums: Summer, device: torch.device) -> bool:
    """Whether ``sums`` gives the plain twin's checksums of small tensors and of one beyond a table."""
    generator = torch.Generator().manual_seed(0)
    sizes = (0, 1, 511, 512, 5_003, checksum_torch.ROWS * 8 * checksum_torch.COLUMNS + 70_000)
    given = [torch.randint(256, (size,), generator=generator, dtype=torch.uint8).to(device) for size in sizes]
    return torch.equal(sums(given), checksum_torch.checksums(given))


def _problem(storage: torch.dtype, factors: torch.dtype, device: torch.device) -> list[Patch]:
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return [
        Patch(
            weight=numbers(m, n, dtype=storage),
            up=numbers(m, r, dtype=factors),
            down=numbers(r, n, dtype=factors),
            scale=0.3,
            saved=torch.empty(m, n, dtype=storage, device=device),
        )
        for m, n, r in _SHAPES
    ]


def _tell_alike(ours: Outcome, theirs: Outcome) -> bool:
    pairs = zip(astuple(ours.change), astuple(theirs.change), strict=True)
    return ours.finite == theirs.finite and all(isclose(one, other, rel_tol=1e-2) for one, other in pairs)


def _close(ours: Patch, theirs: Patch) -> bool:
    assert ours.saved is not None
    assert theirs.saved is not None
    return torch.equal(ours.saved, theirs.saved) and _near(ours.weight, theirs.weight)


def _near(ours: torch.Tensor, theirs: torch.Tensor, *, steps: int = 1) -> bool:
    a, b = ours.double(), theirs.double()
    return bool(((a - b).abs() <= steps * torch.finfo(ours.dtype).eps * b.abs().clamp_min(1)).all())
