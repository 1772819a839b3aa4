"""Numbers in a PEFT config: flags, ranks and alphas by pattern, and the way back from scales to alphas.

For every kind whose PEFT config has ``r``, ``rank_pattern``, an alpha or the like.  Knows one JSON object and module
names; no kinds and no tensors.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TypeVar

from lorahub.deltas.kind import JSON, Field, Group
from lorahub.deltas.patterns import first_match
from lorahub.errors import CannotCarry, IntegrityError

__all__ = [
    "INERT",
    "USED",
    "alpha_for",
    "alpha_over_rank",
    "alphas_and_ranks",
    "chosen",
    "flag",
    "one_for_all",
    "patterned",
    "stated_alpha",
    "stated_rank",
]

Number = TypeVar("Number", int, float)

INERT, USED = Field(inert=True), Field(used=True)

_PLAIN = re.compile(r"[\w.\-]+")


def chosen(config: Mapping[str, JSON], patterns: str, base: str, module: str) -> tuple[int | float | None, str]:
    """The number that holds for ``module``, and which field it came from; None where the config says nothing.

    Args:
        config: the parsed file.
        patterns: the field with exceptions by pattern, "" where there is none.
        base: the field with the number for all other modules.
        module: dotted module path as the file spells it.

    Raises:
        IntegrityError: a value that is no finite number.
        UnsupportedKind: a pattern that cannot be matched safely.
    """
    table = (config.get(patterns) if patterns else None) or {}
    if not isinstance(table, Mapping):
        raise IntegrityError(f"{patterns} should map module names to numbers, not be {table!r}")
    key = first_match(table, module, field=patterns)
    value, where = (config.get(base), base) if key is None else (table[key], f"{patterns}[{key!r}]")
    if value is None and key is None:
        return None, where
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise IntegrityError(f"{where} should be a number, not {value!r}")
    return value, where


def flag(config: Mapping[str, JSON], name: str) -> bool:
    """A field that is true or false; false where it is missing.

    Raises:
        IntegrityError: it is something else.
    """
    value = config.get(name) or False
    if not isinstance(value, bool):
        raise IntegrityError(f"{name} should be true or false, not {value!r}")
    return value


def stated_rank(
    config: Mapping[str, JSON], module: str, found: int, key: str, *, patterns: str = "rank_pattern", base: str = "r"
) -> int:
    """The rank that a tensor has, which the config must not contradict.

    Args:
        config: the parsed file.
        module: dotted module path as the file spells it.
        found: the tensor's rank.
        key: the tensor's name.
        patterns: the field with ranks by pattern.
        base: the field with the rank of all other modules.

    Raises:
        IntegrityError: there is no rank, or the config states another.
    """
    if found < 1:
        raise IntegrityError(f"{key} has no rank")
    stated, where = chosen(config, patterns, base, module)
    if stated is not None and stated != found:
        raise IntegrityError(f"{module}: {where} says rank {stated}, and {key} has rank {found}")
    return found


def stated_alpha(config: Mapping[str, JSON], patterns: str, base: str, module: str) -> int | float:
    """The alpha that holds for ``module``; 8, as PEFT assumes, where the field is missing.

    Raises:
        IntegrityError: it is there and no number; null is none either, though PEFT's JSON could hold it.
    """
    stated, where = chosen(config, patterns, base, module)
    if stated is None and base in config:
        raise IntegrityError(f"{where} should be a number, not None")
    return 8 if stated is None else stated


def alpha_over_rank(config: Mapping[str, JSON], module: str, rank: int) -> dict[str, JSON]:
    """Options of a kind scaled by ``alpha / r`` whose alpha is called ``alpha``; PEFT assumes 8 where it is missing."""
    alpha = stated_alpha(config, "alpha_pattern", "alpha", module)
    return {"scale": alpha / rank, "scale_rule": "alpha/r", "alpha": alpha, "rank": rank}


def alphas_and_ranks(groups: Mapping[str, Group], ranks: Mapping[str, int]) -> dict[str, JSON]:
    """``r``, ``alpha`` and their patterns, from which ``alpha_over_rank`` gives bit-equal scales.

    Raises:
        CannotCarry: no alpha gives a scale exactly.
    """
    alphas: dict[str, int | float] = {}
    for name, group in groups.items():
        scale, divisor = group.options["scale"], float(ranks[name])
        stated = group.options.get("alpha")
        alpha = alpha_for(scale, stated, divisor, whole=True) or alpha_for(scale, stated, divisor, whole=False)
        if alpha is None:
            raise CannotCarry(f"no alpha over rank {ranks[name]} gives the scale {scale!r} of {name} exactly")
        alphas[name] = alpha
    r, rank_pattern = patterned(ranks)
    base, alpha_pattern = patterned(alphas)
    return {"r": r, "rank_pattern": dict(rank_pattern), "alpha": base, "alpha_pattern": dict(alpha_pattern)}


def alpha_for(scale: JSON, stated: JSON, divisor: float, *, whole: bool) -> int | float | None:
    """An alpha with ``alpha / divisor == scale`` in double precision, or None; ``whole`` allows whole numbers only."""
    if not isinstance(scale, int | float) or not math.isfinite(scale * divisor):
        return None
    near = scale * divisor
    candidates: list[int | float] = [round(near)]
    if isinstance(stated, int | float):
        candidates.insert(0, stated)
    if not whole:
        candidates += [near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)]
    return next((alpha for alpha in candidates if alpha / divisor == scale), None)


def patterned(values: Mapping[str, Number]) -> tuple[Number, dict[str, Number]]:
    """The commonest value, and the others by pattern: plain names where PEFT finds the right one by them."""
    base = Counter(values.values()).most_common(1)[0][0]
    plain = {name: value for name, value in values.items() if value != base}

    def found(name: str) -> Number:
        key = first_match(plain, name, field="pattern")
        return base if key is None else plain[key]

    if all(map(_PLAIN.fullmatch, plain)) and all(found(name) == value for name, value in values.items()):
        return base, plain
    return base, {f"^{re.escape(name)}": value for name, value in plain.items()}


def one_for_all(groups: Mapping[str, Group], field: str, value: Callable[[Group], JSON]) -> JSON:
    """The value that every group has in a field which PEFT keeps once for the whole adapter.

    Raises:
        CannotCarry: they differ.
    """
    found = {name: value(group) for name, group in groups.items()}
    first = next(iter(found.values()))
    if apart := sorted(name for name, each in found.items() if each != first):
        raise CannotCarry(f"PEFT has one {field} for all modules of an adapter, and these differ: {', '.join(apart)}")
    return first
