"""Which kind the suffixes of a PEFT module make, as kinds declare them; knows suffixes and no tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeAlias, final

from lorahub.deltas.kind import Kind, Leaf, Spelling

__all__ = ["Fit", "Suffixes", "Ways", "choose", "named", "suffixes"]

Ways: TypeAlias = "Sequence[tuple[Kind, Spelling]]"
"""The kinds that share a ``peft_type``, each with its PEFT spelling."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How one kind takes the suffixes of one module."""

    kind: Kind
    spelling: Spelling
    leaves: Mapping[str, Leaf]
    missing: tuple[str, ...]


@final
class Suffixes(frozenset[str]):
    """Endings of keys; one with a ``*`` has every ending in it that fits."""

    def __contains__(self, suffix: object) -> bool:
        if super().__contains__(suffix):
            return True
        return isinstance(suffix, str) and any(
            Leaf(slot="", suffix=each).which(suffix) for each in self if "*" in each and each[0] == suffix[:1]
        )


def suffixes(ways: Ways, *, shared: bool) -> Suffixes:
    """What the kinds call their slots: those that modules have, or those that exist once per adapter."""
    return _one(
        Suffixes(
            leaf.suffix for kind, spelling in ways for leaf in spelling.leaves if kind.slot(leaf.slot).shared == shared
        )
    )


@lru_cache(maxsize=1 << 8)
def _one(suffixes: Suffixes) -> Suffixes:
    """The same object for the same suffixes: keys are remembered by it."""
    return suffixes


def named(leaves: Iterable[Leaf], suffix: str) -> Leaf | None:
    """The leaf that spells ``suffix``; of one that spells many, with the slot's full name."""
    for leaf in leaves:
        if leaf.suffix == suffix:
            return leaf
        if "*" in leaf.suffix and (which := leaf.which(suffix)):
            return replace(leaf, slot=f"{leaf.slot}.{which}", suffix=suffix)
    return None


def choose(ways: Ways, present: Collection[str], shared: Collection[str]) -> Fit | str:
    """The one kind that knows every suffix and lacks none, or what is wrong, to follow the module's name."""
    fits = [fit for kind, spelling in ways if (fit := _fit(kind, spelling, present, shared))]
    whole = [fit for fit in fits if not fit.missing]
    if len(whole) == 1:
        return whole[0]
    has = f"has {', '.join(sorted(present))}"
    if whole:
        return f"{has}, which is {' and '.join(fit.kind.title for fit in whole)} alike"
    if not fits:
        return f"{has}, which no kind has together"
    nearest = min(fits, key=lambda fit: len(fit.missing))
    return f"{has} without {', '.join(nearest.missing)}"


def _fit(kind: Kind, spelling: Spelling, present: Collection[str], shared: Collection[str]) -> Fit | None:
    # files may keep a copy of a shared tensor on every module, under the same suffix
    own = [leaf for leaf in spelling.leaves if not kind.slot(leaf.slot).shared]
    leaves = {suffix: leaf for suffix in present if (leaf := named(own, suffix))}
    if len(leaves) < len(present):
        return None
    slots = [leaf.slot for leaf in leaves.values()]
    roles = {leaf.role for leaf in leaves.values() if leaf.role}
    if len(set(slots)) < len(slots) or len(roles) > 1:
        return None
    role = next(iter(roles), "")
    missing = []
    for slot in kind.slots:
        if slot.optional or slot.name in slots:
            continue
        spelled = [leaf for leaf in spelling.leaves if leaf.slot == slot.name]
        if slot.shared and any(leaf.suffix in shared for leaf in spelled):
            continue
        fitting = [leaf.suffix for leaf in spelled if leaf.role in ("", role)] or [leaf.suffix for leaf in spelled]
        missing.append(fitting[0] if fitting else slot.name)
    return Fit(kind, spelling, leaves, tuple(missing))
