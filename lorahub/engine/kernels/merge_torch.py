"""The merge of many patches in plain torch: what ``merge_triton`` computes, one matrix at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lorahub.deltas.delta import ratio
from lorahub.engine.folding.sums import Change, all_finite
from lorahub.engine.kernels.patches import Merge, Outcome, Patch, accumulator
from lorahub.lazy import torch

__all__ = ["merge_patches", "prepare_patches", "result_of"]


def merge_patches(patches: Sequence[Patch]) -> list[Outcome]:
    """Change every weight, and say what came of each; see ``Patch``."""
    return [_merge(patch) for patch in patches]


def prepare_patches(patches: Sequence[Patch]) -> Merge:
    """What does ``merge_patches`` any number of times."""
    return partial(merge_patches, patches)


def _merge(patch: Patch) -> Outcome:
    if patch.saved is not None:
        patch.saved.copy_(patch.source)
    before, added = _sum_of(patch)
    patch.weight.copy_(before + added)
    finite = all_finite(before) and all_finite(patch.weight)
    return Outcome(Change.of(before, added, patch.weight.to(before.dtype)), finite=finite)


def result_of(patch: Patch) -> tuple[Outcome, torch.Tensor, torch.Tensor]:
    """What would come of a patch without lengths, the weights as it would store them, and those less the change."""
    before, added = _sum_of(patch)
    after = (before + added).to(patch.weight.dtype)
    stored = after.to(before.dtype)
    back = (stored - added).to(patch.weight.dtype)
    finite = all_finite(before) and all_finite(after)
    return Outcome(Change.of(before, added, stored), finite=finite), after, back


def _sum_of(patch: Patch) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights before and what is added to them, in the dtype of the sums."""
    dtype = accumulator(patch.weight.dtype)
    before = patch.source.to(dtype, copy=True)
    added = patch.up.to(dtype) @ patch.down.to(dtype) * patch.scale
    if patch.lengths is not None:
        moved = before + added
        multiple = patch.strength * ratio(patch.lengths, moved.norm(dim=1).double()).to(dtype)[:, None]
        added = (1 - patch.strength + multiple) * before + multiple * added - before
    return before, added
