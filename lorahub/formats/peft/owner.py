"""The parameter that some factors in a PEFT file change, where the key does not name it, and how PEFT errs on it.

A value; who finds it out is in ``parameters`` and ``wrappers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorahub.deltas.disputes import Dispute
from lorahub.deltas.kind import JSON

__all__ = ["SQUARE", "Owner"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The parameter that the factors behind one stem change.

    Attributes:
        module: its module, as the file spells it.
        parameter: its name, or "" where it cannot be told; ``problem`` then says why.
        experts: how many matrices it stacks, or 0 where it is one matrix.
        transposed: the matrices are stored [in, out]; None: nobody said.
        named: what rank and alpha patterns are matched against.
        twice: PEFT adds the change two times over.
        names: at how many modules, which have one weight, PEFT's merge adds the change to it.
        problem: why the parameter cannot be told, to follow the module's name.
        way: how PEFT today and the release that trained it differ on which way round it is.
    """

    module: str
    parameter: str = ""
    experts: int = 0
    transposed: bool | None = None
    named: str = ""
    twice: bool = False
    names: int = 1
    problem: str = ""
    way: Dispute | None = None

    def dispute(self, options: Mapping[str, JSON]) -> Dispute | None:
        """How PEFT's change of this parameter differs from the declared one, whose scale is in ``options``."""
        scale, rule = options.get("scale"), options.get("scale_rule")
        if not isinstance(scale, int | float) or not (self.twice or self.names > 1):
            return self.way
        if self.names > 1:
            return replace(_TIED, followed={"scale": self.names * scale, "scale_rule": f"{self.names} * {rule}"})
        return replace(_TWICE, followed={"scale": 2 * scale, "scale_rule": f"2 * {rule}"})


_TWICE = Dispute(
    topic="attention-output-twice",
    says="PEFT adds the change to out_proj of a MultiheadAttention two times over, in training and in merging",
    upstream="https://github.com/huggingface/peft/pull/3774",
    holds="PEFT 0.13 to 0.21.2",
    peft="twice, as an adapter trained by these releases expects",
    strict="once, as LoRA is declared",
    followed={},
    declared={},
)

_TIED = Dispute(
    topic="tied-embedding",
    says="with ensure_weight_tying PEFT's merge adds the change to a tied weight once for each module that has it, "
    "though each of them was trained with it once",
    upstream="https://github.com/huggingface/peft/issues/2864",
    holds="PEFT 0.21.2; the issue is about tying as a whole",
    peft="once for each module, as its merge does and its model before that does not",
    strict="once, as it was trained",
    followed={},
    declared={},
)

SQUARE = Dispute(
    topic="square-experts-before-0.19",
    says="until PEFT 0.19 factors of a stack of experts were those of [E, in, out] whatever the layer, and since then "
    "those of [E, out, in] where the layer is so; these are square, so they fit both",
    upstream="https://github.com/unslothai/unsloth-zoo/pull/629",
    holds="trained by PEFT 0.17 or 0.18, read by PEFT 0.19 to 0.21.2",
    peft="as PEFT 0.21.2 reads them",
    strict="as the release that trained them did",
    followed={"transposed": False},
    declared={"transposed": True},
)
