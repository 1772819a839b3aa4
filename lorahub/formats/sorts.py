"""The modules of one file brought together: sorted by what the file says of them, each sort worked out once.

What is worked out is kept for the files to come, where nothing beside the module's own tensors says anything.  A base
needs every module by itself, so this is for files alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TypeAlias, final

from lorahub.files.entries import Form, forms_of
from lorahub.files.header import Header
from lorahub.formats.dotted_metadata import Statements
from lorahub.formats.families import Family, Groups, Like
from lorahub.formats.flat_spellings import NUMBERS
from lorahub.formats.gather import Choices, Stem, Trouble, Ways, gather_placed, make_factors
from lorahub.formats.runs import Runs
from lorahub.formats.stems import NOTHING, Stated, Stems

__all__ = ["read_modules"]


_Sort: TypeAlias = "tuple[tuple[str, ...], tuple[Form, ...], tuple[float, ...]]"
"""Suffixes, the forms of their tensors, and the numbers among them."""

_SETS = 16
"""Sets of spellings that are remembered: one for each format, and again where kinds are registered anew."""

_SORTS = 4096
"""Sorts remembered for each, of about 2 KiB: all shapes of a dozen bases under all usual ranks."""


@final
class _Known:
    """What is remembered for some spellings; they are kept with it, so that no others take their places."""

    def __init__(self, ways: Ways) -> None:
        self.ways = ways
        self.likes: dict[_Sort, Like] = {}
        self.choices: Choices = {}

    def keep(self, sort: _Sort, like: Like) -> None:
        """Remember a sort."""
        if len(self.likes) >= _SORTS:
            self.likes.clear()
        self.likes[sort] = like

    def chosen(self) -> Choices:
        """Where it is remembered which kind is meant."""
        if len(self.choices) >= _SORTS:
            self.choices.clear()
        return self.choices


_remembered: dict[tuple[int, ...], _Known] = {}


def _known(ways: Ways) -> _Known:
    which = tuple(map(id, chain.from_iterable(ways)))
    found = _remembered.get(which)
    if found is None:
        if len(_remembered) >= _SETS:
            _remembered.clear()
        found = _remembered[which] = _Known(ways)
    return found


def read_modules(
    runs: Runs,
    placed: Sequence[tuple[str, str]],
    spelled: Sequence[tuple[str, str]],
    stems: Stems,
    statements: Statements,
    ways: Ways,
    header: Header,
    trouble: Trouble,
) -> Groups:
    """The groups of all modules; modules that make none become ``trouble``.

    Args:
        runs: the modules by their keys.
        placed: the part of a pipeline and the name of each.
        spelled: the same as the file has it.
        stems: makes one of them; the numbers of the file are read.
        statements: what something else than a module's tensors says of it.
        ways: how kinds are spelled.
        header: of the file.
        trouble: takes what is wrong.
    """
    forms, values = forms_of(header.tensors), stems.values
    about: Sequence[Stated] = ()
    if statements:
        about = [statements.of(*each, runs.keys_of(at), trouble) for at, each in enumerate(spelled)]
    alike: defaultdict[object, list[int]] = defaultdict(list)
    every = runs.sorts(forms, values)
    for at, sort in enumerate(zip(every, map(id, about), strict=True) if about else every):
        alike[sort].append(at)
    known, families, others = _known(ways), [], []
    for members in alike.values():
        first = members[0]
        keys, stated = runs.keys_of(first), about[first] if about else NOTHING
        if len(keys) < runs.bounds[first + 1] - runs.bounds[first]:  # never: one would be lost without a word
            others += members
            continue
        numbers = tuple([values[key] for suffix, key in keys.items() if suffix in NUMBERS])
        which = (tuple(keys), tuple([forms[key] for key in keys.values()]), numbers)
        like = known.likes.get(which) if stated is NOTHING else None
        if like is None and 0.0 not in numbers:  # 0 and -0 are one key of what is remembered, and two numbers
            like = _like(*placed[first], keys, stated, stems, known, header)
            if like is not None and stated is NOTHING:
                known.keep(which, like)
        if like is None:
            others += members
        else:
            families.append(Family(like, members))
    alone: dict[int, Stem] = {}
    for at in sorted(others):
        stem = stems.make(*placed[at], runs.keys_of(at), about[at] if about else NOTHING)
        if stem is not None:
            alone[at] = stem
    return Groups(runs, placed, families, gather_placed(alone, ways, header, trouble) if alone else ())


def _like(
    component: str, module: str, keys: Mapping[str, str], stated: Stated, stems: Stems, known: _Known, header: Header
) -> Like | None:
    """What modules of a sort are like, or None where there is anything to say of one, or it is more than one group."""
    probe = Trouble()
    apart = stems.apart(probe)
    stem = apart.make(component, module, keys, stated)
    if stem is None or stem.whole or not stem.keys:
        return None
    made = make_factors(stem, known.ways, header, probe, known.chosen())
    if made is None or probe or apart.unknown:
        return None
    group, touches = made
    suffixes = {key: suffix for suffix, key in keys.items()}
    slots = {slot: suffixes.pop(ref.key, "") for slot, ref in group.slots.items()}
    return None if suffixes or "" in slots.values() else Like(group, slots, touches)
