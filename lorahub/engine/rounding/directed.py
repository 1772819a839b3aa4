"""New directions and lengths of a weight's rows (DoRA), folded by a compiled kernel in the mode ``fast``.

A row is gone through twice while it is in the cache: for the length that it would have, and to be written.  Nothing of
the weight's size is made.  Sums are float32 where bfloat16 is stored, as they are window by window, and float64 where
float32 is, and beyond the CPU where float16 is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import final

from lorahub.deltas.delta import ALL, Delta, Directed, ratio
from lorahub.engine.folding.recipes import Launchable, Launching, Recipe, Stretch
from lorahub.engine.folding.sums import Change, Sums
from lorahub.engine.folding.windows import sample
from lorahub.engine.kernels.choice import merger, native
from lorahub.engine.kernels.merge_c import Kernel, Packed
from lorahub.engine.rounding.fast import FAST, has_kernel
from lorahub.lazy import torch

__all__ = ["directed"]


def directed(weight: float, delta: Delta, sums: Sums, plain: Recipe) -> Recipe | None:
    """The recipe for one such change, or None where the kernel cannot fold it in this mode.

    Args:
        weight: of the change.
        delta: the change.
        sums: where and how they are made.
        plain: folds what is stored in another way than the kernel wants it.
    """
    if sums.mode != FAST:
        return None
    if has_kernel(sums.device, sums.storage):
        found = delta.directed()
        return None if found is None else _Launched(weight, found, plain)
    kernel = native().kernel if sums.device.type == "cpu" else None
    if kernel is None or sums.storage == torch.float16 or not kernel.takes(sums.storage, delta.multiplied_rank()):
        return None
    found = delta.directed()
    if found is None or not kernel.takes(sums.storage, len(found.low.down)):
        return None
    return _ByRow(weight, delta, found, kernel, plain)


@final
class _ByRow:
    """``(1 - weight) * W + weight * ratio * V``, the ratio of each row."""

    def __init__(self, weight: float, delta: Delta, found: Directed, kernel: Kernel, plain: Recipe) -> None:
        self._weight, self._delta, self._found, self._kernel, self._plain = weight, delta, found, kernel, plain
        self._packed: Packed | None = None

    def fold(self, at: Stretch, sums: Sums) -> Change:
        """See ``Recipe``."""
        if at.untouched.dtype != at.out.dtype or at.untouched.device != at.out.device:
            return self._plain.fold(at, sums)
        pick, share = sample(at.out.shape)
        kept = at.start(pick, sums.dtype)
        added = self._delta.region(at.rows, ALL).region(pick, ALL).delta(kept).mul_(self._weight)
        here = at.together()
        for part in here.parts():
            self._fold(part)
        at.take(here)
        return Change.of(kept, added, sums.cast(at.out[pick]), share)

    def _fold(self, at: Stretch) -> None:
        low, before, out = self._found.low, at.untouched.flatten(1), at.out.flatten(1)
        if self._packed is None:
            self._packed = self._kernel.pack(low.up, low.down, out.dtype)
        found = self._kernel.lengths(self._packed, at.rows, low.scale, before)
        multiples = ratio(self._found.lengths[at.rows].double(), found).mul_(self._weight)
        by_row = torch.stack((1 - self._weight + multiples, multiples * low.scale), 1)
        self._kernel.add_by_row(self._packed, at.rows, by_row, before, out)


@final
class _Launched(Launchable):
    """The same by the kernel of a device beyond the CPU."""

    def __init__(self, weight: float, found: Directed, plain: Recipe) -> None:
        self._weight, self._low, self._plain = weight, found.low, plain
        self._lengths = found.lengths
        short = {found.low.up.dtype, found.low.down.dtype} == {torch.bfloat16}
        self._dtype = torch.bfloat16 if short else torch.float32
        self._there: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def fold(self, at: Stretch, sums: Sums) -> Change:
        """See ``Recipe``."""
        ready = self.launching(at, None)
        if ready is None:
            return self._plain.fold(at, sums)
        (outcome,) = merger(at.out.device, at.out.dtype).run([ready.patch])()
        return outcome.change

    def launching(self, at: Stretch, saved: torch.Tensor | None) -> Launching | None:
        """See ``Launchable``."""
        if not at.stays or not at.lies_together:
            return None
        if self._there is None:
            up, down = (each.to(at.out.device, self._dtype).contiguous() for each in (self._low.up, self._low.down))
            self._there = up, down, self._lengths.to(at.out.device, torch.float64)
        up, down, lengths = self._there
        patch = at.patch(up[at.rows], down, self._low.scale, saved)
        return Launching(replace(patch, lengths=lengths[at.rows], strength=self._weight), lambda _: True)
