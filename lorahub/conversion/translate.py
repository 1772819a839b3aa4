"""An adapter in another vocabulary than its base: its modules found there, and where each lands, as declared layouts.

Names are looked up among those that the base's own modules have in the other vocabulary, dotted or with underscores
for dots; nothing is taken apart by guesswork, and what is not found stays as it is.  The same for every use of a base:
converting, merging, checking and attaching.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import final

from lorahub.adapter import AdapterHeader
from lorahub.bases.framework import Created, Edits, Framework, Widens
from lorahub.bases.index import BaseIndex, natural
from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub.conversion.vocabulary import PREFIXES, Word, speaks, words
from lorahub.deltas.delta import ALL, Index
from lorahub.deltas.kind import JSON, Group, Kind
from lorahub.findings import Finding, Verdict
from lorahub.formats.assembly import touches
from lorahub.formats.modules import flat

__all__ = ["TRANSLATED", "UNDECLARED", "Translating", "translate", "translated"]

TRANSLATED = "names-translated"
"""What is said of modules that the base has under other names."""

UNDECLARED = "layout-undeclared"
"""What a format says of modules for which nobody declares where they land."""


def translate(
    header: AdapterHeader, index: BaseIndex, kinds: Mapping[str, Kind]
) -> tuple[AdapterHeader, dict[Target, Layout]]:
    """The header with modules that only the other vocabulary has under their names there, and where those land.

    Args:
        header: read against the base.
        index: the base.
        kinds: by name.
    """
    own = set(index.modules())
    if own.issuperset(_joined(group.component, group.module) for group in header.reading.groups):
        return header, {}
    foreign: dict[str, list[_Place]] = {}
    for each in _places(index):
        for where in {each.module, flat(each.module)}:
            foreign.setdefault(where, []).append(each)
    meant = {group.component for group in header.reading.groups if group.module in foreign}
    alone = (
        len(meant - {""}) <= 1
    )  # one part of a pipeline, which a base without parts may be; "" is found there already
    found: dict[int, _Place] = {}
    for at, group in enumerate(header.reading.groups):
        if group.module in foreign and _joined(group.component, group.module) not in own:
            fitting = [one for one in foreign[group.module] if _same_part(group.component, one.component, alone)]
            named = [one for one in fitting if one.component == group.component] or fitting
            if len(named) == 1:
                found[at] = named[0]
    spread: dict[str, set[str]] = {}
    for at, there in found.items():
        spread.setdefault(header.reading.groups[at].component, set()).add(there.component)
    # What else is of the same part of the pipeline is of the same part of the base, where that is one.
    parts = {component: min(ones) for component, ones in spread.items() if len(ones) == 1}
    groups: list[Group] = []
    layouts: dict[Target, Layout] = {}
    for at, group in enumerate(header.reading.groups):
        place = found.get(at)
        if place is None:
            alien = _joined(group.component, group.module) not in own
            groups.append(replace(group, component=parts.get(group.component, group.component)) if alien else group)
            continue
        moved = replace(group, component=place.component, module=place.module)
        groups.append(moved)
        for touch in kinds[moved.kind].touches(moved):
            target = Target(place.component, place.module, touch.parameter)
            if layout := place.layout(target, index):
                layouts[target] = layout
    if not layouts:
        return header, {}
    changed, _ = touches(groups, kinds)
    settled = {header.reading.groups[at].module for at in found}

    def left(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
        return tuple(each for each in findings if each.code != UNDECLARED or not settled.issuperset(each.where))

    reading = replace(header.reading, groups=tuple(groups), findings=left(header.reading.findings))
    header = replace(header, reading=reading, touches=MappingProxyType(changed), findings=left(header.findings))
    return header, layouts


def translated(
    header: AdapterHeader, index: BaseIndex, kinds: Mapping[str, Kind]
) -> tuple[AdapterHeader, Mapping[Target, Layout]]:
    """The same, and a line on it among the header's findings; at once where the vocabulary has no word for the base."""
    parts = _parts(index)
    if not any(modules.keys() != set(modules.values()) or speaks(modules) for modules in parts.values()):
        return header, {}
    header, layouts = translate(header, index, kinds)
    if not layouts:
        return header, layouts
    modules = sorted({target.module for target in layouts}, key=natural)
    target, layout = next(iter(layouts.items()))
    there = ", ".join(dict.fromkeys(piece.parameter.rpartition(".")[0] for piece in layout.pieces))
    noted = Finding(
        code=TRANSLATED,
        axis="placement",
        level=Verdict.EXACT,
        message=f"{len(modules)} modules have other names in this base: {target.module} is {there}",
        where=tuple(modules),
    )
    return replace(header, findings=(*header.findings, noted)), layouts


@final
class Translating:
    """A framework that also knows where the modules of another vocabulary land.

    Args:
        framework: the base's.
        layouts: what ``translate`` found.
    """

    def __init__(self, framework: Framework, layouts: Mapping[Target, Layout]) -> None:
        self._framework, self._layouts = framework, layouts
        self.name, self.requires = framework.name, framework.requires

    def layouts(self, index: BaseIndex, targets: Collection[Target]) -> Mapping[Target, Layout]:
        """Where targets land; the framework's own word counts first."""
        words = {target: self._layouts[target] for target in targets if target in self._layouts}
        return {**words, **self._framework.layouts(index, targets)}

    def edits(self, index: BaseIndex, created: Created, hints: Mapping[str, JSON]) -> Edits | None:
        """The framework's."""
        return self._framework.edits(index, created, hints)

    def untie(self, index: BaseIndex, names: Collection[str]) -> Edits | None:
        """The framework's."""
        return self._framework.untie(index, names)

    def widening(self, index: BaseIndex, name: str, shape: tuple[int, ...]) -> Edits | None:
        """The framework's, where it has one."""
        return self._framework.widening(index, name, shape) if isinstance(self._framework, Widens) else None


def _same_part(given: str, there: str, alone: bool) -> bool:
    """Whether what a file calls a part of a pipeline may be what the base calls so."""
    return given in ("", there) or {given, there} == {"transformer", "unet"} or (not there and alone)


class _Place:
    """A module of the other vocabulary, and the modules of the base that it is, with their rows.

    Args:
        component: the base's part of a pipeline, or "".
        module: in the other vocabulary.
        parts: (module of the base, rows of the one, rows of the other) for each, rows as shares of a whole.
        spelled: what the base calls a parameter of the other vocabulary's; "" for one that it does not have.
    """

    __slots__ = ("_parts", "_spelled", "_swapped", "component", "module")

    def __init__(
        self,
        component: str,
        module: str,
        parts: tuple[tuple[str, int, int, int], ...],
        *,
        swapped: bool,
        spelled: Callable[[str], str] = str,
    ) -> None:
        self.component, self.module, self._parts, self._swapped = component, module, parts, swapped
        self._spelled = spelled

    def layout(self, target: Target, index: BaseIndex) -> Layout | None:
        """Where a parameter lands, or None where the base lacks one of the parts."""
        parameter = self._spelled(target.parameter)
        names = [_joined(self.component, f"{module}.{parameter}") for module, *_ in self._parts]
        if any(name not in index.parameters for name in names):
            return None
        sizes = [index.parameters[name].shape[0] if index.parameters[name].shape else 1 for name in names]
        pieces, start = [], 0
        for name, size, (_, share, before, total) in zip(names, sizes, self._parts, strict=True):
            if total:  # a band of the base's
                rows = slice(size * before // total, size * (before + share) // total)
                pieces.append(Piece(parameter=name, of_parameter=Region(rows=rows)))
            elif self._swapped:
                pieces.append(Piece(parameter=name, of_delta=Region(rows=_halves_swapped(size))))
            elif len(names) == 1:
                pieces.append(Piece(parameter=name, of_parameter=Region(transposed=index.parameters[name].transposed)))
            else:
                pieces.append(Piece(parameter=name, of_delta=Region(rows=slice(start, start + size))))
            start += size
        return Layout(target=target, pieces=tuple(pieces))


def _halves_swapped(size: int) -> Index:
    half = size // 2
    return ALL if size % 2 else (*range(half, size), *range(half))


def _joined(component: str, name: str) -> str:
    return f"{component}:{name}" if component else name


def _places(index: BaseIndex) -> Iterator[_Place]:
    """Every module that the base's own are in the other vocabulary; one that means two things in a part is left out.

    The base's own names are there too, behind a part of a pipeline that a file need not name or a checkpoint's prefix.
    """
    for component, modules in _parts(index).items():
        found: dict[str, list[_Place]] = {}
        for place in _of(component, modules):
            if place.module not in modules:
                found.setdefault(place.module, []).append(place)
        yield from (places[0] for places in found.values() if len(places) == 1)
        for short, whole in modules.items():
            if component or short != whole:
                yield _Place(component, short, ((whole, 1, 0, 0),), swapped=False)


def _parts(index: BaseIndex) -> dict[str, dict[str, str]]:
    """Part of a pipeline -> its modules without what a checkpoint puts before them -> with it."""
    parts: dict[str, dict[str, str]] = {}
    for name in index.modules():
        component, colon, module = name.partition(":")
        component, module = (component, module) if colon else ("", name)
        prefix = next((each for each in PREFIXES if module.startswith(each)), "")
        parts.setdefault(component, {})[module.removeprefix(prefix)] = module
    return parts


def _of(component: str, modules: Mapping[str, str]) -> Iterator[_Place]:
    """Of one model: ``modules`` are its names without a checkpoint's prefix -> with it."""
    for word in words(modules):
        if word.name in modules:
            yield from _backwards(component, word, modules)
        else:
            parts = tuple((modules[part], share, 0, 0) for part, share in zip(word.parts, word.shares, strict=True))
            yield _Place(component, word.name, parts, swapped=word.halves_swapped, spelled=word.other)


def _backwards(component: str, word: Word, modules: Mapping[str, str]) -> Iterator[_Place]:
    """The parts of a word, of which the base has the one."""
    total, before = sum(word.shares), 0
    for part, share in zip(word.parts, word.shares, strict=True):
        bands = (share, before, total) if len(word.parts) > 1 else (1, 0, 0)
        place = ((modules[word.name], *bands),)
        yield _Place(component, part, place, swapped=word.halves_swapped, spelled=word.own)
        before += share
