"""How LoKr's training begins: into which Kronecker factors a weight is cut, and which of them are kept whole.

The rules are PEFT's, so that it makes room for the same tensors from ``r`` and ``decompose_factor``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from lorahub.deltas.beginning import RANKS, flag, kaiming, rank, scaled, stands, whole, word, zeros
from lorahub.deltas.kind import JSON
from lorahub.deltas.peft_lokr import factorization
from lorahub.deltas.starting import Ground, Setting, Started, Starting
from lorahub.deltas.tucker import core_shape
from lorahub.errors import UsageError

__all__ = ["STARTING"]

_WHERE: Mapping[str, str] = MappingProxyType(
    {
        "embedding": "no tool has LoKr on embeddings, so nothing would load it",
        "experts": "its factors are those of one weight, and no stack of experts",
    }
)

_ZERO: Mapping[JSON, tuple[str, ...]] = MappingProxyType({"default": ("w1", "w1_a"), "lycoris": ("w2", "w2_b")})
"""``init`` -> the tensor that is zero: the one of these that there is."""


def start(ground: Ground) -> Started:
    """One tensor of zeros, Kaiming uniform all others.

    Raises:
        UsageError: it cannot stand there, or not in that form.
    """
    stands(ground, "LoKr", _WHERE)
    (out, width, *kernel), r = ground.shape, rank(ground)
    factor = whole(ground, "decompose_factor", least=-1)
    if factor == 0:
        raise UsageError(f"{ground.module}: decompose_factor should be -1 or above zero")
    (a, b), (c, d) = factorization(out, factor), factorization(width, factor)
    sizes: dict[str, tuple[int, ...]] = {"w1": (a, c)}
    if flag(ground, "decompose_both") and r < max(a, c) / 2:
        sizes = {"w1_a": (a, r), "w1_b": (r, c)}
    if r >= max(b, d) / 2:
        sizes["w2"] = (b, d, *kernel)
    elif flag(ground, "use_effective_conv2d") and math.prod(kernel) > 1:  # PEFT keeps pointwise ones flat
        if len(kernel) > 2:
            raise UsageError(f"{ground.module}: use_effective_conv2d has a core for one and two dimensions only")
        sizes |= {"t2": (r, r, *core_shape(tuple(kernel))), "w2_a": (r, b), "w2_b": (r, d)}
    else:
        sizes |= {"w2_a": (b, r), "w2_b": (r, d * math.prod(kernel))}
    nothing = _ZERO[word(ground, "init", tuple(_ZERO))]
    trained = {
        name: zeros(ground, *size) if name in nothing else kaiming(ground, *size) for name, size in sizes.items()
    }
    # so PEFT multiplies out a whole second side beside one-dimensional kernels; see ``peft_lokr``
    return Started(trained=trained, options={**scaled(ground), "trailing": "w2" in sizes and len(kernel) == 1})


STARTING = Starting(
    settings={
        **RANKS,
        "decompose_factor": Setting(
            default=-1, says="The size of the first side's axes; -1: as near a square as can be."
        ),
        "decompose_both": Setting(default=False, says="Keep the first side as two factors as well, where r is small."),
        "use_effective_conv2d": Setting(
            default=False, says="Beside kernels, a core of rank r and a factor for each axis."
        ),
        "init": Setting(
            default="default",
            says="Which side begins as zeros: the first, or as in LyCORIS the second.",
            choices=tuple(_ZERO),
        ),
    },
    start=start,
)
