"""``peft`` and ``peft-safe``: the bits that PEFT 0.21 gives, merging LoRA on the CPU (``merge``, ``safe_merge=True``).

PEFT holds 16-bit factors in float32 and multiplies the product with the scale.  ``merge`` adds that in float32 or
wider and rounds once; ``safe_merge`` rounds it to the weight's dtype first, so that it is rounded twice.  Adapters
follow each other, each rounded.  Bits agree on one machine: the products are that of the same library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lorahub.engine.folding.recipes import Factors, Recipe, Stretch
from lorahub.engine.folding.sums import Change, Sums
from lorahub.engine.folding.windows import sample
from lorahub.engine.planning.steps import Step
from lorahub.engine.rounding.fast import FAST
from lorahub.engine.rounding.nearest import round_into
from lorahub.lazy import torch

__all__ = ["Peft"]


@final
@dataclass(frozen=True, slots=True)
class Peft:
    """PEFT's order of operations.

    Attributes:
        safe: that of ``safe_merge=True``.
    """

    safe: bool = False

    @property
    def spelled(self) -> str:
        """Its name."""
        return "peft-safe" if self.safe else "peft"

    def fault(self, step: Step, role: str) -> str:
        """Only LoRA on whole matrices, and whole new values, are done in a way that can be repeated."""
        if step.before and step.before.dtype != step.after.dtype and step.terms:
            return "PEFT stores it in the dtype that it has"
        for term in step.terms:
            if term.replaces and term.weight == 1:
                continue
            if term.kind != "lora" or not term.additive or term.rank is None:
                return f"'{term.adapter}' changes it by {term.kind}, and not by LoRA alone"
            if role == "embedding":
                return "it is an embedding, whose change PEFT computes and rounds in another way"
            if len(step.after.shape) != 2:
                return f"it has {len(step.after.shape)} axes, and PEFT makes such changes by a convolution or otherwise"
            of, to = term.piece.of_delta, term.piece.of_parameter
            if not of.whole or not (to.whole or (to.transposed and to.expert is None)) or term.siblings:
                return f"'{term.adapter}' changes a part of it, which PEFT has as a parameter of its own"
            if term.tied or term.strength != 1:
                return f"what '{term.adapter}' does to it, PEFT does in another way or not at all"
        return ""

    def sums(self, storage: torch.dtype) -> torch.dtype:
        """Of whole new values alone."""
        return FAST.sums(storage)

    def round(self, total: torch.Tensor, out: torch.Tensor, name: str, first: int) -> None:
        """To the nearest, ties to even."""
        round_into(total, out)

    def product(self, factors: Sequence[Factors], sums: Sums) -> Recipe:
        """One adapter after the other."""
        return _InTurn(tuple(factors), self.safe)


@final
@dataclass(frozen=True, slots=True)
class _InTurn:
    """LoRA by LoRA onto the stored weights."""

    factors: tuple[Factors, ...]
    safe: bool

    def fold(self, at: Stretch, sums: Sums) -> Change:
        """See ``Recipe``."""
        pick, share = sample(at.out.shape)
        kept = at.start(pick, torch.float64)
        added = torch.zeros_like(kept)
        if at.out.data_ptr() != at.untouched.data_ptr():
            at.out.copy_(at.untouched)
        for each in self.factors:
            dtype = torch.promote_types(each.up.dtype, torch.float32)  # what PEFT loads 16-bit factors as
            up, down = each.up.to(sums.device, dtype), each.down.to(sums.device, dtype)
            added += (up[at.rows][pick].double() @ down.double()) * each.weight
            for part in at.parts():
                change = torch.mm(up[part.rows], down, out=part.scratch("change", dtype)).mul_(each.weight)
                part.out.add_(change.to(at.out.dtype) if self.safe else change)
        return Change.of(kept, added, at.out[pick].double(), share)
