"""From a format's reading to deltas: each tensor used once, each parameter changed once, slots turned the kinds' way.

The same for every format.  Calls the kinds, which compute nothing yet; knows no file but for names in a header.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import final

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta, take
from lorahub.deltas.kind import JSON, Group, Kind, TensorRef, Touch
from lorahub.deltas.stacks import unstack
from lorahub.errors import IntegrityError
from lorahub.files.dtypes import DTYPES
from lorahub.files.header import Header
from lorahub.findings import Finding, Verdict
from lorahub.formats.families import Groups, representatives
from lorahub.formats.format import Reading
from lorahub.lazy import torch

__all__ = ["account", "as_slot", "build_deltas", "each_touch", "ill_typed", "touches"]

_WHOLE = frozenset(code for code in DTYPES if code[0] in "IU")
_REAL = frozenset(code for code in DTYPES if code[0] in "FB" and code != "BOOL")

_NOT: Mapping[str, frozenset[str]] = {
    "floats": frozenset(DTYPES) - _REAL,
    "integers": frozenset(DTYPES) - _WHOLE,
    "anything": frozenset(),
}
"""What a slot holds -> dtypes of another sort; those of other containers are for their readers to judge."""


def account(reading: Reading, header: Header) -> None:
    """Hold a format to its promise: each key in one group, shared slot or part, or else in a finding."""
    if isinstance(reading.groups, Groups) and not reading.shared and not reading.parts:
        keys = reading.groups.keys()
        if keys == [*header.tensors] or (len(keys) == len(header.tensors) and header.tensors.keys() == set(keys)):
            return  # each once, in a group
    refs = [ref for group in reading.groups for ref in group.slots.values()]
    refs += reading.shared.values()
    refs += [ref for part in reading.parts.values() for ref in part.tensors.values()]
    used = Counter(ref.key for ref in refs)
    once = Counter((ref.key, ref.expert) for ref in refs)
    twice = {key for (key, expert), count in once.items() if count > 1 or (expert is None and used[key] > 1)}
    said = {key for finding in reading.findings for key in finding.where}
    lost = [key for key in header.tensors if key not in used and key not in said]
    wrong = lost + [key for key in used if key in twice or key not in header.tensors]
    if wrong:
        raise IntegrityError(
            f"the format '{reading.format}' has not accounted for {len(wrong)} of {len(header.tensors)} tensors, "
            f"first: {', '.join(wrong[:3])}",
            "this is a defect of the format: report it with the names of the tensors",
        )


def touches(groups: Sequence[Group], kinds: Mapping[str, Kind]) -> tuple[Mapping[Target, Touch], list[Finding]]:
    """Every parameter that the groups change, and a finding where two of them change one."""
    if isinstance(groups, Groups) and not groups.apart and groups.distinct():
        each = [family.like.touches for family in groups.families]
        if all(len({touch.parameter for touch in found}) == len(found) for found in each):
            return Later(lambda: _touches(groups, kinds)[0], [*chain.from_iterable(each)]), []
    return _touches(groups, kinds)


@final
class Later(Mapping[Target, Touch]):
    """What groups change, worked out when a target is asked for.

    Args:
        make: gives all of it.
        each: every touch there is, those that are equal for several targets once.
    """

    def __init__(self, make: Callable[[], Mapping[Target, Touch]], each: Sequence[Touch]) -> None:
        self._make = make
        self._made: Mapping[Target, Touch] | None = None
        self.each = each

    def _all(self) -> Mapping[Target, Touch]:
        if self._made is None:
            self._made = self._make()
        return self._made

    def __getitem__(self, target: Target) -> Touch:
        return self._all()[target]

    def __iter__(self) -> Iterator[Target]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def __repr__(self) -> str:
        return repr(self._all())


def each_touch(found: Mapping[Target, Touch]) -> Iterable[Touch]:
    """Every touch there is, at least once."""
    return found.each if isinstance(found, Later) else found.values()


def _touches(groups: Sequence[Group], kinds: Mapping[str, Kind]) -> tuple[dict[Target, Touch], list[Finding]]:
    found: dict[Target, Touch] = {}
    twice = []
    for group in groups:
        for touch in kinds[group.kind].touches(group):
            target = Target(group.component, group.module, touch.parameter)
            if target in found:
                twice.append(target.name)
            found[target] = touch
    if not twice:
        return found, []
    finding = Finding(
        code="parameter-twice",
        axis="integrity",
        level=Verdict.INCOMPATIBLE,
        message=f"{len(twice)} parameters are changed twice by one adapter, and nothing says which change comes first",
        where=tuple(sorted(twice)),
    )
    return found, [finding]


def ill_typed(reading: Reading, kinds: Mapping[str, Kind]) -> list[Finding]:
    """A finding where factors are no real numbers, or places no whole ones; headers tell."""
    if isinstance(reading.groups, Groups) and not ill_typed(
        replace(reading, groups=representatives(reading.groups)), kinds
    ):
        return []
    used = [(group.kind, name, ref) for group in reading.groups for name, ref in group.slots.items()]
    used += [(kind, name, ref) for (kind, name), ref in reading.shared.items()]
    wrong: dict[str, str] = {}
    for kind, name, ref in used:
        slot = next((each for each in kinds[kind].slots if each.covers(name)), None)  # none for a format's own numbers
        if slot is not None and ref.dtype in _NOT[slot.holds]:
            wrong[ref.key] = f"{slot.name} of {kinds[kind].title} should be {slot.holds}, and {ref.key} is {ref.dtype}"
    if not wrong:
        return []
    more = f" (and {len(wrong) - 1} more like it)" if len(wrong) > 1 else ""
    return [
        Finding(
            code="slot-dtype",
            axis="integrity",
            level=Verdict.INCOMPATIBLE,
            message=f"tensors are of another sort than what they stand for: {next(iter(wrong.values()))}{more}",
            where=tuple(wrong),
            remedy="fetch the file again, or ask its author",
        )
    ]


def as_slot(stored: torch.Tensor, ref: TensorRef) -> torch.Tensor:
    """A tensor from a file, the way round and in the shape that its slot has."""
    if ref.expert is not None:
        stored = stored[ref.expert if stored.shape[0] > 1 else 0]
    if ref.reshaped:
        stored = stored.reshape(ref.shape)
    if ref.stacked:
        return unstack(stored, ref.stacked, ref.shape)
    turned = stored.transpose(0, 1) if ref.transposed else stored
    return take(turned, ref.rows, 0) if ref.rows else turned


def build_deltas(
    reading: Reading, tensor: Callable[[str], torch.Tensor], kinds: Mapping[str, Kind], index: BaseIndex | None
) -> tuple[dict[Target, Delta], list[JSON]]:
    """Every delta by target, and the targets whose replacement was turned to [out, in]."""
    deltas: dict[Target, Delta] = {}
    turned: list[JSON] = []
    for group in reading.groups:
        kind = kinds[group.kind]
        refs = {slot: ref for (name, slot), ref in reading.shared.items() if name == kind.name} | dict(group.slots)
        slots = {slot: as_slot(tensor(ref.key), ref) for slot, ref in refs.items()}
        for touch in kind.touches(group):
            name = Target(group.component, group.module, touch.parameter).name
            if touch.replaces and index and name in index.parameters and index.parameters[name].transposed:
                slots = {slot: value.transpose(0, 1) if value.dim() > 1 else value for slot, value in slots.items()}
                turned.append(name)
        for parameter, delta in kind.build(group, slots).items():
            deltas[Target(group.component, group.module, parameter)] = delta
    return deltas, turned
