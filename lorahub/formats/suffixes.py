"""Keys that are a module path and a known ending: sorted by module, brought together to kinds, every key accounted for.

For formats whose whole grammar is a table of endings.  A row of the table says how one kind is spelled; rows that
come first are tried first.  Knows no format, no config and no number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeAlias

from lorahub.bases.index import natural
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, TensorRef
from lorahub.errors import IntegrityError, UnsupportedKind
from lorahub.files.header import Header
from lorahub.findings import Finding, Verdict
from lorahub.formats.peft.config import CONFIG
from lorahub.formats.peft.keys import Stems
from lorahub.shapes import ShapeMisfit, bind

__all__ = ["Grouped", "Options", "Row", "group_suffixes", "unknown_fields", "unknown_keys"]

Options: TypeAlias = "Callable[[str, str, Mapping[str, TensorRef]], Mapping[str, JSON]]"
"""(kind, module as spelled, its slots) -> what scales them; raises ``IntegrityError`` where they disagree."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How a format spells one kind.

    Attributes:
        kind: its registered name.
        leaves: the ending of each slot; all must be there, but for slots that the kind has as optional.
        parameter: what the group stands for.
        options: what every group of this row has besides its scale.
        scaled: whether the scale of the format applies.
    """

    kind: str
    leaves: tuple[Leaf, ...]
    parameter: str = "weight"
    options: Mapping[str, JSON] = field(default_factory=lambda: MappingProxyType({}))
    scaled: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped:
    """What became of the keys: groups, what is wrong with others, and those that no ending fits."""

    groups: tuple[Group, ...]
    findings: tuple[Finding, ...]
    unknown: tuple[str, ...]


def group_suffixes(
    header: Header,
    paths: Mapping[str, str],
    rows: Callable[[str], Sequence[Row]],
    kinds: Sequence[Kind],
    stems: Stems,
    options: Options,
    numbers: Mapping[str, str] | None = None,
) -> Grouped:
    """Sort the keys in ``paths`` by module and bring each module's together.

    Args:
        header: of the weights file.
        paths: key -> the same without what the format puts in front.
        rows: module as spelled -> the table that holds for it.
        kinds: every registered kind; rows of others are left out.
        stems: the base's modules.
        options: see ``Options``.
        numbers: module as spelled -> key of its alpha, which ``options`` knows the value of.
    """
    alphas = dict(numbers or {})
    known = {kind.name: kind for kind in kinds}
    modules, unknown = _by_module(paths, rows)
    groups: dict[tuple[str, str], Group] = {}
    faults: dict[str, tuple[list[str], list[str]]] = {}

    def fault(code: str, what: str, keys: Sequence[str]) -> None:
        cases, where = faults.setdefault(code, ([], []))
        cases.append(what)
        where.extend(keys)

    for spelled, found in sorted(modules.items(), key=lambda item: natural(item[0])):
        for again in [suffix for suffix, keys in found.items() if len(keys) > 1]:
            fault("key-twice", f"{spelled} has two tensors that end in {again}", found.pop(again))
        left = {suffix: keys[0] for suffix, keys in found.items()}
        module = stems.find(spelled) or spelled
        for row in rows(spelled):
            kind = known.get(row.kind)
            if kind is None or (taken := _take(kind, row, left)) is None:
                continue
            keys = [left.pop(leaf.suffix) for leaf in taken]
            slots = {leaf.slot: _ref(header, key, leaf) for leaf, key in zip(taken, keys, strict=True)}
            where = (module, row.parameter)
            try:
                _demand(where not in groups, f"{spelled} and another name both mean {module}.{row.parameter}")
                _bind(kind, slots)
                made = Group(
                    module=module,
                    parameter=row.parameter,
                    kind=kind.name,
                    role=next((leaf.role for leaf in taken if leaf.role), ""),
                    slots=slots,
                    options={**(options(kind.name, spelled, slots) if row.scaled else {}), **row.options},
                )
                kind.touches(made)
                if row.scaled and (alpha := alphas.pop(spelled, None)):  # no slot of the kind, and still its tensor
                    made = replace(made, slots={**slots, "alpha": _ref(header, alpha, Leaf(slot="", suffix=""))})
            except ShapeMisfit as misfit:
                fault("slot-misfit", f"{spelled}: {misfit}", keys)
            except IntegrityError as error:
                fault("config-contradicts-tensors", error.message, keys)
            except UnsupportedKind as error:
                fault("kind-unsupported", error.message, keys)
            else:
                groups[where] = made
        if left:
            fault("slot-missing", f"{spelled} has only {', '.join(sorted(left))}", list(left.values()))
    for spelled, key in alphas.items():
        fault("alpha-unused", f"{spelled} has nothing that is scaled by it", [key])
    return Grouped(
        groups=tuple(groups.values()),
        findings=tuple(_finding(code, cases, where) for code, (cases, where) in sorted(faults.items())),
        unknown=tuple(unknown),
    )


def _by_module(
    paths: Mapping[str, str], rows: Callable[[str], Sequence[Row]]
) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
    """Module -> ending -> keys, by the longest ending that the table has; and the keys without one."""
    modules: dict[str, dict[str, list[str]]] = {}
    unknown = []
    for key, path in paths.items():
        at = path.find(".")
        while at > 0:
            stem, suffix = path[:at], path[at + 1 :]
            if any(leaf.suffix == suffix for row in rows(stem) for leaf in row.leaves):
                modules.setdefault(stem, {}).setdefault(suffix, []).append(key)
                break
            at = path.find(".", at + 1)
        else:
            unknown.append(key)
    return modules, unknown


def _take(kind: Kind, row: Row, present: Mapping[str, str]) -> list[Leaf] | None:
    """The leaves of a row that are there, or None where a needed one is not."""
    taken = [leaf for leaf in row.leaves if leaf.suffix in present]
    needed = {leaf.slot for leaf in row.leaves if not kind.slot(leaf.slot).optional}
    return taken if taken and needed <= {leaf.slot for leaf in taken} else None


def _ref(header: Header, key: str, leaf: Leaf) -> TensorRef:
    info = header.tensors[key]
    turned = leaf.transposed and len(info.shape) > 1
    shape = (info.shape[1], info.shape[0], *info.shape[2:]) if turned else info.shape
    return TensorRef(key=key, shape=shape, dtype=info.dtype, transposed=leaf.transposed)


def _bind(kind: Kind, slots: Mapping[str, TensorRef]) -> None:
    bind(tuple([(slot, kind.slot(slot).dims, ref.shape) for slot, ref in slots.items()]))


def _demand(fine: bool, what: str) -> None:
    if not fine:
        raise IntegrityError(what)


_TEXTS: Mapping[str, str] = {
    "alpha-unused": "an alpha beside nothing that it scales changes nothing",
    "config-contradicts-tensors": "what the adapter says of itself and its tensors contradict each other",
    "key-twice": "two keys say the same",
    "kind-unsupported": "a weight change that no installed kind reads",
    "slot-misfit": "tensors of one module do not fit together",
    "slot-missing": "part of a module's tensors is missing",
}


def _finding(code: str, cases: Sequence[str], where: Sequence[str]) -> Finding:
    more = f" (and {count - 1} more like it)" if (count := len(set(cases))) > 1 else ""
    note, read = code == "alpha-unused", code != "kind-unsupported"
    return Finding(
        code=code,
        axis="format" if note or not read else "integrity",
        level=Verdict.EXACT if note else Verdict.INCOMPATIBLE,
        message=f"{_TEXTS[code]}: {cases[0]}{more}",
        where=tuple(sorted(where)),
        remedy="" if note else "fetch the file again, or ask its author",
    )


def unknown_keys(keys: Sequence[str], why: str) -> tuple[Finding, ...]:
    """What to say of keys that nobody here knows; nothing where there are none."""
    if not keys:
        return ()
    return (
        Finding(
            code="key-unknown",
            axis="format",
            level=Verdict.DEGRADED,
            message=f"{len(keys)} tensors {why}",
            where=tuple(keys),
            remedy="to leave them out: --allow key-unknown",
            allowable=True,
        ),
    )


def unknown_fields(fields: Mapping[str, JSON]) -> list[Finding]:
    """What to say of fields of ``adapter_config.json`` that a format does not know; nothing where all are blank."""
    telling = tuple(sorted(name for name, value in fields.items() if value not in (None, False, "", [], {})))
    if not telling:
        return []
    return [
        Finding(
            code="config-unknown",
            axis="format",
            level=Verdict.DEGRADED,
            message=f"{CONFIG} has fields of which nobody here knows whether they change the arithmetic",
            where=telling,
            remedy="if you know that they do not: --allow config-unknown",
            allowable=True,
        )
    ]
