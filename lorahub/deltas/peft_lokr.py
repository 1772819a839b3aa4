"""What PEFT's ``LOKR`` config says: the scale, and by which rules PEFT cuts a weight into two Kronecker factors.

Reading needs the scale alone, for the tensors tell the rest; writing needs numbers from which PEFT makes room for just
these tensors.  Knows configs and headers, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TypeAlias

from lorahub.deltas.kind import JSON, Field, Group, TensorRef
from lorahub.deltas.peft_config import INERT, USED, alpha_over_rank, alphas_and_ranks, chosen, stated_rank
from lorahub.errors import CannotCarry, IntegrityError

__all__ = ["FIELDS", "config", "factorization", "options", "rank_of"]


def factorization(size: int, factor: int) -> tuple[int, int]:
    """PEFT's split of a size: ``factor`` and the rest where it divides; else the nearest to a square, none above it.

    A factor of -1 sets no bound.  The first is the smaller one, unless it is ``factor``.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    small = next(each for each in range(max(bound, 1), 0, -1) if size % each == 0)
    return small, size // small


def rank_of(slots: Mapping[str, TensorRef]) -> int | None:
    """The factors' rank, or None where both sides are whole."""
    factor = slots.get("w2_b") or slots.get("w1_b")
    return factor.shape[0] if factor and factor.shape else None


FIELDS: Mapping[str, Field] = MappingProxyType(
    {
        "r": USED,
        "alpha": USED,
        "rank_pattern": USED,
        "alpha_pattern": USED,
        # which tensors there are and how large: the tensors say it
        "use_effective_conv2d": INERT,
        "decompose_both": INERT,
        "decompose_factor": INERT,
        "rank_dropout": INERT,
        "rank_dropout_scale": INERT,
        "module_dropout": INERT,
        "init_weights": INERT,  # true, false and "lycoris" all leave the base alone
    }
)


def options(config: Mapping[str, JSON], module: str, slots: Mapping[str, TensorRef]) -> dict[str, JSON]:
    """Scale, alpha and rank; where no tensor has the rank, the config's divides alpha all the same.

    For a Conv1d with a whole ``w2`` ``[b, d, k]``, PEFT (0.21.2 and before) leaves ``w1`` a matrix, which
    ``torch.kron`` sets against the last two axes: ``[b, a d, c k]``, then reshaped to ``[a b, c d, k]``.  It does so in
    training as well, so this is what such an adapter learnt, and ``trailing`` says so.  With four axes it does not.

    Raises:
        IntegrityError: the config states another rank than the tensors have, or none above zero.
        UnsupportedKind: a pattern that cannot be matched safely.
    """
    found = rank_of(slots)
    if found is None:
        stated, where = chosen(config, "rank_pattern", "r", module)
        rank = 8 if stated is None else int(stated)  # what PEFT assumes
        if rank < 1 or rank != (stated or rank):
            raise IntegrityError(f"{module}: {where} should be a whole number above zero, not {stated!r}")
    else:
        rank = stated_rank(config, module, found, (slots.get("w2_b") or slots["w1_b"]).key)
    return {**alpha_over_rank(config, module, rank), "trailing": "w2" in slots and len(slots["w2"].shape) == 3}


def config(groups: Mapping[str, Group]) -> dict[str, JSON]:
    """The fields under which reading ``groups`` again gives bit-equal scales, and PEFT makes room for the same tensors.

    Raises:
        CannotCarry: no alpha gives a scale exactly, a Conv1d is not multiplied out PEFT's way, or tensors are of a size
            or form that no ``r`` and ``decompose_factor`` would give.
    """
    wrong = [name for name, group in groups.items() if group.options["trailing"] != _is_conv1d(group)]
    if wrong:
        raise CannotCarry(f"PEFT would multiply out the Kronecker product otherwise for {', '.join(sorted(wrong))}")
    both = any("w1" not in group.slots for group in groups.values())
    sizes = {name: list(_sizes(group)) for name, group in groups.items()}
    ranks = {name: rank_of(group.slots) or math.ceil(max(sizes[name][0]) / 2) for name, group in groups.items()}
    factors = [-1, *sorted({size for (a, _, c, _), *_ in sizes.values() for size in (a, c)})]
    fitting = [
        factor
        for factor in factors
        if all(
            any(_expected(each, ranks[name], factor, both=both) == _forms(group) for each in sizes[name])
            for name, group in groups.items()
        )
    ]
    if not fitting:
        raise CannotCarry(
            "PEFT derives the sizes of the factors, and whether each is whole, from one decompose_factor and r; none "
            f"gives those of {', '.join(sorted(groups))}"
        )
    return {
        **alphas_and_ranks(groups, ranks),
        "decompose_both": both,
        "decompose_factor": fitting[0],
        "use_effective_conv2d": any("t2" in group.slots for group in groups.values()),
        "init_weights": True,
    }


def _is_conv1d(group: Group) -> bool:
    return "w2" in group.slots and len(group.slots["w2"].shape) == 3


def _sizes(group: Group) -> Iterator[tuple[int, int, int, int]]:
    """``a, b, c, d``; for each ``d`` that a flattened ``d * prod(k)`` can stand for."""
    slots = group.slots
    a, c = slots["w1"].shape if "w1" in slots else (slots["w1_a"].shape[0], slots["w1_b"].shape[1])
    if "w2" in slots:
        yield a, slots["w2"].shape[0], c, slots["w2"].shape[1]
    elif "t2" in slots:
        yield a, slots["w2_a"].shape[1], c, slots["w2_b"].shape[1]
    else:
        b, flat = slots["w2_a"].shape[0], slots["w2_b"].shape[1]
        yield from ((a, b, c, flat // count) for count in range(1, flat + 1) if flat % count == 0)


_Expected: TypeAlias = "tuple[bool, bool] | None"


def _forms(group: Group) -> _Expected:
    """Which sides are whole."""
    return "w1" in group.slots, "w2" in group.slots


def _expected(sizes: tuple[int, int, int, int], rank: int, factor: int, *, both: bool) -> _Expected:
    """Which sides PEFT would have whole, or None where it would not have these sizes."""
    a, b, c, d = sizes
    if (factorization(a * b, factor), factorization(c * d, factor)) != ((a, b), (c, d)):
        return None
    return not (both and rank < max(a, c) / 2), rank >= max(b, d) / 2
