"""An adapter in another vocabulary than its base: its modules found there, and where each lands, as declared layouts.

Names are looked up among those that the base's own modules have in the other vocabulary, dotted or with underscores
for dots; nothing is taken apart by guesswork, and what is not found stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from lorahub.adapter import AdapterHeader
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub.conversion.vocabulary import PREFIXES, Word, words
from lorahub.deltas.delta import ALL, Index
from lorahub.deltas.kind import Group, Kind
from lorahub.findings import Finding
from lorahub.formats.assembly import touches
from lorahub.formats.modules import flat

__all__ = ["UNDECLARED", "translate"]

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
    components = {group.component for group in header.reading.groups}
    alone = len(components) == 1 or len(components - {""}) == 1  # "" is what some found in a base without parts
    foreign = {where: place for place in _places(index) for where in {place.module, flat(place.module)}}
    found = {
        at: foreign[group.module]
        for at, group in enumerate(header.reading.groups)
        if _joined(group.component, group.module) not in own
        and group.module in foreign
        and _same_part(group.component, foreign[group.module].component, alone)
    }
    # What else is of the same part of the pipeline is of the same part of the base.
    parts = {header.reading.groups[at].component: place.component for at, place in found.items()}
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


def _same_part(given: str, there: str, alone: bool) -> bool:
    """Whether what a file calls a part of a pipeline may be what the base calls so."""
    return given in ("", there) or {given, there} == {"transformer", "unet"} or (not there and alone)


class _Place:
    """A module of the other vocabulary, and the modules of the base that it is, with their rows.

    Args:
        component: the base's part of a pipeline, or "".
        module: in the other vocabulary.
        parts: (module of the base, rows of the one, rows of the other) for each, rows as shares of a whole.
    """

    __slots__ = ("_parts", "_swapped", "component", "module")

    def __init__(
        self, component: str, module: str, parts: tuple[tuple[str, int, int, int], ...], *, swapped: bool
    ) -> None:
        self.component, self.module, self._parts, self._swapped = component, module, parts, swapped

    def layout(self, target: Target, index: BaseIndex) -> Layout | None:
        """Where a parameter lands, or None where the base lacks one of the parts."""
        names = [_joined(self.component, f"{module}.{target.parameter}") for module, *_ in self._parts]
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
                pieces.append(Piece(parameter=name))
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
    """Every module that the base's own are in the other vocabulary; one that means two things is left out."""
    parts: dict[str, dict[str, str]] = {}
    for name in index.modules():
        component, colon, module = name.partition(":")
        component, module = (component, module) if colon else ("", name)
        prefix = next((each for each in PREFIXES if module.startswith(each)), "")
        parts.setdefault(component, {})[module.removeprefix(prefix)] = module
    found: dict[str, list[_Place]] = {}
    for component, modules in parts.items():
        for place in _of(component, modules):
            found.setdefault(place.module, []).append(place)
    yield from (places[0] for places in found.values() if len(places) == 1)


def _of(component: str, modules: Mapping[str, str]) -> Iterator[_Place]:
    """Of one model: ``modules`` are its names without a checkpoint's prefix -> with it."""
    for short, whole in modules.items():
        if short != whole:
            yield _Place(component, short, ((whole, 1, 0, 0),), swapped=False)
    for word in words(modules):
        if word.name in modules:
            yield from _backwards(component, word, modules)
        else:
            parts = tuple((modules[part], share, 0, 0) for part, share in zip(word.parts, word.shares, strict=True))
            yield _Place(component, word.name, parts, swapped=word.halves_swapped)


def _backwards(component: str, word: Word, modules: Mapping[str, str]) -> Iterator[_Place]:
    """The parts of a word, of which the base has the one."""
    total, before = sum(word.shares), 0
    for part, share in zip(word.parts, word.shares, strict=True):
        bands = (share, before, total) if len(word.parts) > 1 else (1, 0, 0)
        yield _Place(component, part, ((modules[word.name], *bands),), swapped=word.halves_swapped)
        before += share
