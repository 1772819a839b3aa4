"""An adapter under the names of the base's own parameters, where its changes can be put beside those of others.

Weighing, comparing and composing look at one parameter of the base at a time.  What an adapter in another vocabulary
calls one module may be several there, or a part of one: its changes are cut and fused as ``fused`` does it, one
parameter at a time and when that is asked for.  Which name means what, ``translate`` knows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import final

from lorahub.adapter import AdapterHeader
from lorahub.bases.framework import Framework
from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Layout, Piece, Region, Target
from lorahub.conversion.change import Change, Origin, target_of
from lorahub.conversion.fused import land
from lorahub.conversion.naming import BY_TARGET
from lorahub.conversion.translate import translated
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Kind, Touch
from lorahub.engine.planning.place import components_here, logical_shape
from lorahub.errors import Incompatible

__all__ = ["Settled", "settled"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """An adapter, read against a base, under the names of that base's parameters.

    Attributes:
        header: it, with a finding where names were translated; what it touches is under the base's names, and what it
            is read from under the words of its own vocabulary.
        index: the base.
        layouts: where targets land that have other names there.
        sources: parameter of the base -> those targets, of whatever lands there.
    """

    header: AdapterHeader
    index: BaseIndex
    layouts: Mapping[Target, Layout]
    sources: Mapping[Target, tuple[Target, ...]]

    @property
    def moved(self) -> bool:
        """Whether anything has another name in the base, or another part of a pipeline."""
        return any(found != (target,) for target, found in self.sources.items())

    def deltas(self, given: Mapping[Target, Delta]) -> Mapping[Target, Delta]:
        """The changes under the base's names, each made when it is asked for.

        Args:
            given: those that were read by ``header``.

        Returns:
            A mapping that raises ``Incompatible`` for a change that cannot be cut or fused as the base has it.
        """
        return _Deltas(self, given) if self.layouts else given

    def hints(self, given: Mapping[str, JSON]) -> dict[str, JSON]:
        """An adapter's hints, which name targets, under the base's names."""
        there: dict[str, list[str]] = {}
        for target, sources in self.sources.items():
            for source in sources:
                there.setdefault(source.name, []).append(target.name)
        result = dict(given)
        for hint in BY_TARGET:
            said = given.get(hint)
            if isinstance(said, dict):
                result[hint] = {new: value for old, value in said.items() for new in there.get(old, [old])}
            elif isinstance(said, list):
                result[hint] = [new for old in said if isinstance(old, str) for new in there.get(old, [old])]
        return result

    def shape(self, target: Target) -> tuple[int, ...] | None:
        """The shape of a parameter whose change was translated, [out, in, *k]; None for another."""
        if not any(source in self.layouts for source in self.sources.get(target, ())):
            return None
        info = self.index.parameters[self.index.stored(target.name)]
        return (*info.shape[1::-1], *info.shape[2:]) if info.transposed and len(info.shape) > 1 else info.shape


def settled(header: AdapterHeader, index: BaseIndex, framework: Framework, kinds: Mapping[str, Kind]) -> Settled:
    """The adapter under the base's names; names and shapes alone.

    Args:
        header: read against the base.
        index: the base.
        framework: the base's, whose own word counts first.
        kinds: by name.
    """
    header, words = translated(header, index, kinds)
    declared = framework.layouts(index, words).keys() if words else ()
    layouts = {target: layout for target, layout in words.items() if target not in declared}
    layouts |= _of_one_part(header, index, framework, kept=layouts)
    sources: dict[Target, list[Target]] = {}
    for target in header.touches:
        layout = layouts.get(target)
        for name in dict.fromkeys(piece.parameter for piece in layout.pieces) if layout else ():
            sources.setdefault(target_of(name), []).append(target)
        if layout is None:
            sources.setdefault(target, []).append(target)
    if layouts:
        touches = {target: _touch([header.touches[each] for each in found]) for target, found in sources.items()}
        header = replace(header, touches=MappingProxyType(touches))
    return Settled(
        header=header,
        index=index,
        layouts=MappingProxyType(layouts),
        sources=MappingProxyType({target: tuple(found) for target, found in sources.items()}),
    )


def _of_one_part(
    header: AdapterHeader, index: BaseIndex, framework: Framework, *, kept: Collection[Target]
) -> dict[Target, Layout]:
    """Targets of the one part of a pipeline that the base is, of an adapter with several: there they have no part.

    Nothing where the base could be several of them, whose sizes a merge looks at.
    """
    here = components_here(header.reading.groups, index) - {""}
    if len(here) != 1:
        return {}
    there = {target: replace(target, component="") for target in header.touches if target.component in here}
    found = framework.layouts(index, there.values())
    result = {}
    for target, own in there.items():
        if target not in kept and own in found and own.name in index.parameters:
            region = Region(transposed=index.parameters[own.name].transposed)
            result[target] = Layout(target=target, pieces=(Piece(parameter=own.name, of_parameter=region),))
    return result


def _touch(parts: list[Touch]) -> Touch:
    """What is known of a change from those that are fused in it; of one alone, its own."""
    ranks = [part.rank for part in parts]
    return replace(parts[0], rank=sum(known) if len(known := [rank for rank in ranks if rank]) == len(ranks) else None)


@final
class _Deltas(Mapping[Target, Delta]):
    """Deltas by parameter of the base."""

    def __init__(self, adapter: Settled, given: Mapping[Target, Delta]) -> None:
        self._adapter, self._given = adapter, given
        self._sources = {
            target: sources for target, sources in adapter.sources.items() if all(source in given for source in sources)
        }

    def __iter__(self) -> Iterator[Target]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, target: object) -> bool:
        return target in self._sources

    def __getitem__(self, target: Target) -> Delta:
        changes = [
            Change(target=each, delta=self._given[each], origins=(Origin(target=each),), shape=self._shape(each))
            for each in self._sources[target]
        ]
        found, stuck = land(changes, self._here(target), self._adapter.index, lambda _: None)
        if stuck:
            source, reason = next(iter(stuck.items()))
            raise Incompatible(
                f"{self._adapter.header.label}: the change of {source.name} cannot be brought to {target.name}, "
                f"because {reason}",
                "convert it to this base's names first: lorahub convert ADAPTER --to FORMAT --base BASE -o FOLDER",
            )
        return found[0].delta

    def _here(self, target: Target) -> dict[Target, Layout]:
        """Of where the sources land, what lies in one parameter."""
        layouts = {}
        for source in self._sources[target]:
            if layout := self._adapter.layouts.get(source):
                pieces = tuple(piece for piece in layout.pieces if target_of(piece.parameter) == target)
                layouts[source] = Layout(target=source, pieces=pieces)
        return layouts

    def _shape(self, source: Target) -> tuple[int, ...] | None:
        layout = self._adapter.layouts.get(source)
        return logical_shape(layout, self._adapter.index) if layout else None
