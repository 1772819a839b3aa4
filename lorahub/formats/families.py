"""Modules that a file says the same of but for their names: worked out once, and kept as names until asked for.

An adapter of hundreds of modules has a dozen sorts of them: the same suffixes, the same forms, the same numbers.  What
a format makes of one module of a sort it makes of all, since options and touches follow from slots and numbers and a
module's name is for messages alone (see ``gather_placed``).  A sort that gives rise to any word of trouble is no
family: its modules are gone through one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import final, overload

from lorahub.bases.index import natural
from lorahub.deltas.kind import Group, Touch
from lorahub.formats.runs import Runs

__all__ = ["Family", "Groups", "Like", "by_module", "representatives"]


@dataclass(frozen=True, slots=True)
class Like:
    """What all modules of a sort are like.

    Attributes:
        group: one of them.
        suffixes: slot -> the suffix of its key.
        touches: what every one of them changes.
    """

    group: Group
    suffixes: Mapping[str, str]
    touches: tuple[Touch, ...]

    def made(self, component: str, module: str, keys: Mapping[str, str]) -> Group:
        """The group of another of them, of which ``keys`` are suffix -> key."""
        like = self.group
        return replace(
            like,
            component=component,
            module=module,
            slots={slot: replace(ref, key=keys[self.suffixes[slot]]) for slot, ref in like.slots.items()},
            options=dict(like.options),
        )


@dataclass(frozen=True, slots=True)
class Family:
    """All modules of one sort in a file, by their places among all modules."""

    like: Like
    members: list[int] = field(default_factory=list)


@final
class Groups(Sequence[Group]):
    """The groups of a file in natural order of their modules; those of families are made when they are looked at.

    Args:
        runs: the file's modules.
        placed: the part of a pipeline and the name of each.
        families: by sort.
        apart: groups made one by one, each with its place among the modules.
    """

    __slots__ = ("_apart", "_made", "_placed", "_runs", "families")

    def __init__(
        self,
        runs: Runs,
        placed: Sequence[tuple[str, str]],
        families: Sequence[Family],
        apart: Sequence[tuple[int, Group]] = (),
    ) -> None:
        self.families = tuple(families)
        self._runs, self._placed = runs, placed
        self._apart = tuple(apart)
        self._made: tuple[Group, ...] | None = None

    @property
    def apart(self) -> tuple[Group, ...]:
        """The groups of no family."""
        return tuple(group for _, group in self._apart)

    @property
    def _alike(self) -> int:
        return sum(len(family.members) for family in self.families)

    def keys(self) -> list[str]:
        """Every key of a slot, as often as it is one."""
        if self._alike == len(self._placed):  # families use every key that their modules have
            own = list(self._runs.keys)
        else:
            bounds = self._runs.bounds
            members = chain.from_iterable(family.members for family in self.families)
            own = [*chain.from_iterable(self._runs.keys[bounds[at] : bounds[at + 1]] for at in members)]
        return [*own, *(ref.key for group in self.apart for ref in group.slots.values())] if self._apart else own

    def modules(self, family: Family) -> list[tuple[str, str, int]]:
        """The modules of a family: the part of a pipeline, the name, and the place among all."""
        return [(*self._placed[at], at) for at in family.members]

    def distinct(self) -> bool:
        """Whether no two groups have a module in common; a file may still spell one as two."""
        every = self._placed
        if self._apart or self._alike < len(every):
            every = [self._placed[at] for family in self.families for at in family.members]
            every += [(group.component, group.module) for group in self.apart]
        return len(set(every)) == len(every)

    def _all(self) -> tuple[Group, ...]:
        if self._made is None:
            made = [
                (at, family.like.made(*self._placed[at], self._runs.keys_of(at)))
                for family in self.families
                for at in family.members
            ]
            made += self._apart
            made.sort(key=lambda each: (by_module(each[1].component, each[1].module), each[0]))
            self._made = tuple(group for _, group in made)
        return self._made

    @overload
    def __getitem__(self, at: int) -> Group: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[Group, ...]: ...
    def __getitem__(self, at: int | slice) -> Group | tuple[Group, ...]:
        return self._all()[at]

    def __iter__(self) -> Iterator[Group]:
        return iter(self._all())

    def __len__(self) -> int:
        return self._alike + len(self._apart)

    def __eq__(self, other: object) -> bool:
        return self._all() == (other._all() if isinstance(other, Groups) else other)

    __hash__ = None  # type: ignore[assignment]  # groups have none

    def __repr__(self) -> str:
        return repr(self._all())


def representatives(groups: Sequence[Group]) -> Sequence[Group]:
    """A group of each sort: what none of them has, or all of them have, holds for all groups.

    Not for what names of modules or keys have to do with.
    """
    return (*(each.like.group for each in groups.families), *groups.apart) if isinstance(groups, Groups) else groups


@lru_cache(maxsize=1 << 15)  # the modules of some thirty bases
def by_module(component: str, module: str) -> tuple[str, tuple[tuple[int, int | str], ...]]:
    """Sort key: component, then natural order."""
    return component, natural(module)
