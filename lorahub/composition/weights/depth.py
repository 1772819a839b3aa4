"""How deep in its model a target stands: which layer it is in, and of how many.

A layer is the first number in a module's path that counts layers.  That is one behind a word for layers, blocks or
stages (``model.layers.7``, ``encoder.block.7``, ``transformer.h.7``); where a component has no such word, one behind
anything that holds the same places under two numbers.  Some lists follow each other and are counted through:

    down_blocks, mid_block, up_blocks               UNets; the block counts, not the attention within it
    input_blocks, middle_block, output_blocks       the same in their makers' names
    transformer_blocks, single_transformer_blocks   Flux and its kin
    double_blocks, single_blocks                    the same in their makers' names

Every other list is counted for itself: a T5 has an encoder and a decoder, each from its first to its last layer.  How
many layers a list has, the base tells where it is known, and else the highest number among the targets; a target in
``up_blocks`` alone says nothing of how many come before, so there the base is needed.  Knows names only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.errors import RecipeError

__all__ = ["Depth", "Depths"]

_LAYERS = re.compile(r"(?:^|_)(?:res)?(?:layers?|h|blocks?|stages?)$")

_SEQUENCES: tuple[tuple[str, ...], ...] = (
    ("down_blocks", "mid_block", "up_blocks"),
    ("input_blocks", "middle_block", "output_blocks"),
    ("transformer_blocks", "single_transformer_blocks"),
    ("double_blocks", "single_blocks"),
)
"""Lists that follow each other, by the last word of their paths."""

_ALONE = frozenset({"mid_block", "middle_block"})
"""Lists that are one layer, without a number."""

_PLACE = {word: (number, at) for number, words in enumerate(_SEQUENCES) for at, word in enumerate(words)}


@dataclass(frozen=True, slots=True)
class Depth:
    """Where a target stands.

    Attributes:
        layer: its layer, from 0.
        count: how many layers there are.
    """

    layer: int
    count: int

    @property
    def t(self) -> float:
        """From 0, the first layer, to 1, the last; 1 where there is one alone, as mergekit has it."""
        return self.layer / (self.count - 1) if self.count > 1 else 1.0


@dataclass(frozen=True, slots=True)
class _Spot:
    """A number in a path: the list before it, which layer, and the rest."""

    list: str
    number: int
    rest: str


class Depths:
    """Where targets stand, worked out when it is first asked for.

    Args:
        targets: of all adapters together.
        base: tells how many layers there are, also where no target is.
    """

    def __init__(self, targets: Iterable[Target], base: BaseIndex | None = None) -> None:
        self._targets = frozenset(targets)
        self._base = base

    def of(self, target: Target) -> Depth | None:
        """Where a target stands, or None where it is in no layer.

        Raises:
            RecipeError: it is in a list that follows others of which nothing is known.
        """
        counter = self._counters.get(target.component)
        return None if counter is None else counter.depth(_spots(target.module))

    @cached_property
    def _counters(self) -> dict[str, _Counter]:
        known: dict[str, list[list[_Spot]]] = {target.component: [] for target in self._targets}
        for target in self._targets:
            known[target.component].append(_spots(target.module))
        for component, found in _of_base(self._base):
            for one, spots in known.items():
                if not component or one in (component, ""):
                    spots.append(found)
        return {component: _Counter(found) for component, found in known.items()}


def _of_base(base: BaseIndex | None) -> Iterable[tuple[str, list[_Spot]]]:
    for name in base.parameters if base is not None else ():
        component, _, dotted = name.rpartition(":")
        yield component, _spots(dotted.rpartition(".")[0])


class _Counter:
    """The lists of one component."""

    def __init__(self, known: Sequence[list[_Spot]]) -> None:
        named = {spot.list for spots in known for spot in spots if _is_layers(spot.list)}
        self._lists = named or _repeating(known)
        self._lengths: dict[str, int] = defaultdict(int)
        for spots in known:
            if (spot := self._layer(spots)) is not None:
                self._lengths[spot.list] = max(self._lengths[spot.list], spot.number + 1)

    def _layer(self, spots: Sequence[_Spot]) -> _Spot | None:
        return next((spot for spot in spots if spot.list in self._lists), None)

    def depth(self, spots: Sequence[_Spot]) -> Depth | None:
        """Where a path with these numbers stands, or None.

        Raises:
            RecipeError: it is in a list behind others of which nothing is known.
        """
        spot = self._layer(spots)
        if spot is None:
            return None
        parent, word = _ends(spot.list)
        if word not in _PLACE:
            return Depth(spot.number, self._lengths[spot.list])
        lists = [f"{parent}{each}" for each in _SEQUENCES[_PLACE[word][0]]]
        at = _PLACE[word][1]
        if unknown := [each for each in lists[:at] if not self._lengths.get(each)]:
            raise RecipeError(
                f"how deep {spot.list} is depends on how long {' and '.join(unknown)} "
                f"{'are' if len(unknown) > 1 else 'is'}, and no adapter changes anything there",
                "name the base, which tells: base = 'ns/name' in the recipe, or --base",
            )
        before = sum(self._lengths[each] for each in lists[:at])
        return Depth(before + spot.number, sum(self._lengths.get(each, 0) for each in lists))


def _spots(module: str) -> list[_Spot]:
    """Every number in a module's path; names without dots are cut at underscores."""
    mark = "." if "." in module else "_"
    parts = module.split(mark)
    found = []
    for at, part in enumerate(parts):
        before = mark.join(parts[:at])
        if part.isdecimal() and part.isascii() and len(part) < 6 and at and _ends(before)[1] not in _ALONE:
            found.append(_Spot(before, int(part), mark.join(parts[at + 1 :])))
        elif (whole := mark.join(parts[: at + 1])) and _ends(whole)[1] in _ALONE and at + 1 < len(parts):
            found.append(_Spot(whole, 0, mark.join(parts[at + 1 :])))
    return found


def _ends(path: str) -> tuple[str, str]:
    """A list's path as (what comes before its word, the word), where the word is one of a sequence's."""
    marks = "." if "." in path else "_"
    found = next((word for word in _LONGEST if path == word or path.endswith(f"{marks}{word}")), "")
    return (path.removesuffix(found), found) if found else (path, "")


_LONGEST = sorted(_PLACE, key=len, reverse=True)


def _is_layers(path: str) -> bool:
    return _LAYERS.search(path.rpartition(".")[2]) is not None


def _repeating(known: Sequence[list[_Spot]]) -> set[str]:
    """Lists that hold the same place under two numbers."""
    numbers: dict[tuple[str, str], set[int]] = defaultdict(set)
    for spots in known:
        for spot in spots:
            numbers[spot.list, re.sub(r"\d+", "#", spot.rest)].add(spot.number)
    return {path for (path, _), found in numbers.items() if len(found) > 1}
