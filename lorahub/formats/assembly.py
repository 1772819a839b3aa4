"""From a format's reading to deltas: each tensor used once, each parameter changed once, slots turned the kinds' way.

The same for every format.  Calls the kinds, which compute nothing yet; knows no file but for names in a header.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, Touch
from lorahub.errors import IntegrityError
from lorahub.files.header import Header
from lorahub.findings import Finding, Verdict
from lorahub.formats.format import Reading
from lorahub.lazy import torch

__all__ = ["account", "build_deltas", "touches"]


def account(reading: Reading, header: Header) -> None:
    """Hold a format to its promise: each key in one group, shared slot or part, or else in a finding."""
    refs = [ref for group in reading.groups for ref in group.slots.values()]
    refs += reading.shared.values()
    refs += [ref for part in reading.parts.values() for ref in part.tensors.values()]
    used = Counter(ref.key for ref in refs)
    said = {key for finding in reading.findings for key in finding.where}
    lost = [key for key in header.tensors if key not in used and key not in said]
    wrong = lost + [key for key, count in used.items() if count > 1 or key not in header.tensors]
    if wrong:
        raise IntegrityError(
            f"the format '{reading.format}' has not accounted for {len(wrong)} of {len(header.tensors)} tensors, "
            f"first: {', '.join(wrong[:3])}",
            "this is a defect of the format: report it with the names of the tensors",
        )


def touches(groups: Sequence[Group], kinds: Mapping[str, Kind]) -> tuple[dict[Target, Touch], list[Finding]]:
    """Every parameter that the groups change, and a finding where two of them change one."""
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


def build_deltas(
    reading: Reading, tensor: Callable[[str], torch.Tensor], kinds: Mapping[str, Kind], index: BaseIndex | None
) -> tuple[dict[Target, Delta], list[JSON]]:
    """Every delta by target, and the targets whose replacement was turned to [out, in]."""
    deltas: dict[Target, Delta] = {}
    turned: list[JSON] = []
    for group in reading.groups:
        kind = kinds[group.kind]
        refs = {slot: ref for (name, slot), ref in reading.shared.items() if name == kind.name} | dict(group.slots)
        slots = {
            slot: tensor(ref.key).transpose(0, 1) if ref.transposed else tensor(ref.key) for slot, ref in refs.items()
        }
        for touch in kind.touches(group):
            name = Target(group.component, group.module, touch.parameter).name
            if touch.replaces and index and name in index.parameters and index.parameters[name].transposed:
                slots = {slot: value.transpose(0, 1) if value.dim() > 1 else value for slot, value in slots.items()}
                turned.append(name)
        for parameter, delta in kind.build(group, slots).items():
            deltas[Target(group.component, group.module, parameter)] = delta
    return deltas, turned
