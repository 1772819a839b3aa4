"""The merge of many patches in plain torch: what ``merge_triton`` computes, one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence

from lorahub.deltas.delta import ratio
from lorahub.engine.folding.sums import Change, all_finite
from lorahub.engine.kernels.patches import Outcome, Patch, accumulator

__all__ = ["merge_patches"]


def merge_patches(patches: Sequence[Patch]) -> list[Outcome]:
    """Change every weight, and say what came of each; see ``Patch``."""
    return [_merge(patch) for patch in patches]


def _merge(patch: Patch) -> Outcome:
    dtype = accumulator(patch.weight.dtype)
    stored = patch.weight if patch.before is None else patch.before
    if patch.saved is not None:
        patch.saved.copy_(stored)
    before = stored.to(dtype, copy=True)
    added = patch.up.to(dtype) @ patch.down.to(dtype) * patch.scale
    if patch.lengths is not None:
        moved = before + added
        multiple = patch.strength * ratio(patch.lengths, moved.norm(dim=1).double()).to(dtype)[:, None]
        added = (1 - patch.strength + multiple) * before + multiple * added - before
    patch.weight.copy_(before + added)
    finite = all_finite(before) and all_finite(patch.weight)
    return Outcome(Change.of(before, added, patch.weight.to(dtype)), finite=finite)
