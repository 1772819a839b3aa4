"""Under which names an adapter is written: the part of a pipeline, and modules whose dots are not known.

Tables and look-ups over names; knows no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from lorahub.adapter import AdapterHeader
from lorahub.bases.index import BaseIndex, natural
from lorahub.bases.layout import Target
from lorahub.conversion.change import Change
from lorahub.deltas.kind import JSON
from lorahub.errors import CannotCarry, UsageError
from lorahub.formats.flat_names import PREFIXES, take_apart

__all__ = [
    "BY_TARGET",
    "Chosen",
    "as_part",
    "choose_component",
    "known_roles",
    "own_name",
    "respell_hints",
    "unresolved",
]

BY_TARGET = ("roles", "transposed")
"""Hints whose keys or items are names of targets."""

_OWN_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "gguf": "have llama.cpp's names and order of rows, which only a base turns into its own",
        "torchtune": "have Meta's names and order of rows, which only a base turns into its own",
    }
)
"""Format -> why its modules mean nothing elsewhere without a base."""

_DECLARED = "lorahub.modules"
"""Header key of flat files written here, which lists the dotted names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Changes under the component that is written, and what was left out for it.

    Attributes:
        changes: what is written.
        left_out: component -> how many targets.
        said: what the component was called before, where the format has no word for one; else "".
    """

    changes: list[Change]
    left_out: Mapping[str, int]
    said: str = ""


def choose_component(changes: Sequence[Change], component: str, takes: Callable[[Change], bool], label: str) -> Chosen:
    """The changes of one part of a pipeline, or all of them, as the format can name them.

    Args:
        changes: every change.
        component: the part to keep, or what to call an adapter that names none; "" for no choice.
        takes: whether the format has a word for a change's component and module.
        label: the format, for messages.

    Raises:
        UsageError: there is no such part.
        CannotCarry: the format has no parts, and the adapter has several.
    """
    present = sorted({change.target.component for change in changes})
    left: dict[str, int] = {}
    if component and component in present:
        kept = [change for change in changes if change.target.component == component]
        left = {name: sum(each.target.component == name for each in changes) for name in present if name != component}
    elif component and present == [""]:
        kept = [_named(change, component) for change in changes]
    elif component:
        raise UsageError(
            f"the adapter has no component {component!r}: it has {', '.join(map(repr, present))}",
            f"--component {present[0]}" if present[0] else "leave --component out",
        )
    else:
        kept = list(changes)
    named = sorted({change.target.component for change in kept} - {""})
    if not named or takes(kept[0]) or not takes(_named(kept[0], "")):
        return Chosen(changes=kept, left_out=left)
    if len({change.target.component for change in kept}) > 1:
        raise CannotCarry(
            f"the format '{label}' is for one model, and this adapter changes {', '.join(named)}",
            f"convert them one at a time: --component {named[0]}",
        )
    return Chosen(changes=[_named(change, "") for change in kept], left_out=left, said=named[0])


def _named(change: Change, component: str) -> Change:
    return replace(change, target=replace(change.target, component=component))


def as_part(index: BaseIndex, component: str) -> BaseIndex:
    """A single model's index as that of one part of a pipeline; that of a pipeline as it is."""
    if not component or any(":" in name for name in index.parameters):
        return index

    def named(name: str) -> str:
        return f"{component}:{name}"

    return replace(
        index,
        parameters={named(name): replace(info, component=component) for name, info in index.parameters.items()},
        aliases=tuple((named(canonical), named(other)) for canonical, other in index.aliases),
        tied=tuple(tuple(map(named, group)) for group in index.tied),
        extras={named(name): info for name, info in index.extras.items()},
    )


def own_name(name: str, index: BaseIndex) -> str:
    """What the single model itself calls a parameter of an index that ``as_part`` made."""
    return name.removeprefix(f"{index.parameters[name].component}:")


def unresolved(
    header: AdapterHeader, index: BaseIndex | None, component: str, known: Collection[str] = ()
) -> tuple[list[str], str]:
    """Modules that cannot be named elsewhere without a base, or not with this one, and why.

    Either the format has names (and an order of rows) of its own, or a flat file's underscores may be dots: neither the
    base nor the file's own list has them.

    Args:
        header: the source.
        index: the base.
        component: the part of a pipeline that is wanted; "" for all.
        known: modules that were found in another vocabulary.
    """
    groups = [group for group in header.reading.groups if component in ("", group.component)]
    if index is None and header.format in _OWN_NAMES:
        return sorted({group.module for group in groups}, key=natural), _OWN_NAMES[header.format]
    listed = header.files.headers[header.reading.file].metadata.get(_DECLARED, "")
    named = set(index.modules()) if index else set()
    named |= {name.partition(":")[2] for name in named} | set(known)
    found = set()
    for group in groups:
        if group.module in named or f'"{group.module}"' in listed:
            continue
        prefix, spelled, _ = take_apart(next(iter(group.slots.values())).key)
        if prefix in PREFIXES and spelled == group.module and "_" in spelled:
            found.add(group.module)
    return sorted(found, key=natural), "are spelled with underscores for dots, and only a base tells which are which"


def respell_hints(hints: Mapping[str, JSON], changes: Sequence[Change]) -> dict[str, JSON]:
    """Hints with the targets' new names; those of targets that are gone are left out."""
    renamed: dict[str, list[str]] = {}
    for change in changes:
        for origin in change.origins:
            renamed.setdefault(origin.target.name, []).append(change.target.name)
    result = dict(hints)
    for hint in BY_TARGET:
        given = hints.get(hint)
        if isinstance(given, dict):
            result[hint] = {new: value for old, value in given.items() for new in renamed.get(old, [])}
        elif isinstance(given, list):
            result[hint] = [new for old in given if isinstance(old, str) for new in renamed.get(old, [])]
    return result


def known_roles(changes: Sequence[Change], index: BaseIndex, layouts: Mapping[Target, object]) -> dict[str, JSON]:
    """Target -> "embedding", for the targets that are one in the base."""
    roles: dict[str, JSON] = {}
    for change in changes:
        if change.target not in layouts:
            continue
        if index.role(change.target.name) == "embedding":
            roles[change.target.name] = "embedding"
    return roles
