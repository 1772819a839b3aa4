"""PEFT's ``linear``, for those who need what it computes: factors added to factors, and cross terms with them.

``(sum of sqrt|w_i s_i| B_i) (sum of +-sqrt|w_i s_i| A_i)``, the sign of ``w_i s_i`` on the side of A, as PEFT
0.21.2 has it.  On two adapters that were trained apart this is off the weighted sum by about its whole length;
``linear`` is that sum.  A is what reads the input.  PEFT's ``lora_embedding_A`` is the other side, that of the tokens,
so embeddings at weights of both signs get other cross terms there than here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, final

from lorahub.composition.algebra.truncate import one_thread
from lorahub.composition.method import FactorMethod, Method, Terms
from lorahub.deltas.delta import LowRank
from lorahub.errors import UnsupportedKind
from lorahub.hookspecs import hookimpl
from lorahub.lazy import torch

__all__ = ["PeftLinear"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PeftLinear(FactorMethod):
    """The product of the sums of factors; of adapters that leave the matrix alone there is nothing to add."""

    name: ClassVar[str] = "peft_linear"
    title: ClassVar[str] = "sum of factors, as PEFT's linear"
    source: ClassVar[str] = "PEFT, combination_type='linear'"

    def factors(self, terms: Terms) -> LowRank:
        """Factors of the rank that all have.

        Raises:
            UnsupportedKind: a change has no factors, or their ranks differ.
        """
        there = [pair for pair in zip(terms.factors(), terms.weights, strict=True) if pair[0].up.shape[1]]
        if not there:
            return LowRank(torch.zeros(terms.shape[0], 1), torch.zeros(1, terms.shape[1]), 1.0)
        ranks = {change.up.shape[1] for change, _ in there}
        if len(ranks) > 1:
            raise UnsupportedKind(
                f"factors of ranks {', '.join(map(str, sorted(ranks)))} cannot be added to each other, which is what "
                "peft_linear does",
                "take linear, the weighted sum itself, for any ranks",
            )
        up, down = (torch.zeros_like(each, dtype=torch.float64) for each in (there[0][0].up, there[0][0].down))
        with one_thread():
            for change, weight in there:
                root = math.sqrt(abs(weight * change.scale))
                up += root * change.up.double()
                down += math.copysign(root, weight * change.scale) * change.down.double()
        return LowRank(up, down, 1.0)


@hookimpl
def lorahub_methods() -> list[type[Method]]:
    """PEFT's linear."""
    return [PeftLinear]
