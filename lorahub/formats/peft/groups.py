"""Slots of one module brought together: which kind they are, whether they are all there, and what scales them.

Works on keys, shapes and the config; what a kind needs and how it reads the config, the kind declares.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lorahub.bases.index import natural
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, Spelling, TensorRef
from lorahub.errors import IntegrityError, UnsupportedKind
from lorahub.files.header import Header
from lorahub.findings import Finding, Verdict
from lorahub.formats.peft.config import CONFIG, untargeted
from lorahub.formats.peft.keys import Names, Stems
from lorahub.shapes import Binding, ShapeMisfit, unify

__all__ = ["Grouped", "Ways", "group_factors", "suffixes", "tensor_ref"]

Ways: TypeAlias = "Sequence[tuple[Kind, Spelling]]"
"""The kinds that share a ``peft_type``, each with its PEFT spelling."""

_SHARDED = (
    "sharded training (DeepSpeed ZeRO-3, FSDP) leaves such pieces where the weights were not gathered before saving: "
    "gather them and save the adapter again"
)


@dataclass(frozen=True, slots=True)
class Grouped:
    """Groups and adapter-wide tensors, with findings for every key that is in neither."""

    groups: tuple[Group, ...]
    shared: Mapping[tuple[str, str], TensorRef]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class _Fit:
    """How one kind takes the suffixes of one module."""

    kind: Kind
    spelling: Spelling
    leaves: Mapping[str, Leaf]
    missing: tuple[str, ...]
    reason: str = ""


def suffixes(ways: Ways, *, shared: bool) -> frozenset[str]:
    """What the kinds call their slots: those that modules have, or those that exist once per adapter."""
    return frozenset(
        leaf.suffix for kind, spelling in ways for leaf in spelling.leaves if kind.slot(leaf.slot).shared == shared
    )


def tensor_ref(header: Header, key: str, *, transposed: bool = False) -> TensorRef:
    """Where a tensor is, with its shape as the slot sees it."""
    info = header.tensors[key]
    shape = (info.shape[1], info.shape[0], *info.shape[2:]) if transposed and len(info.shape) > 1 else info.shape
    return TensorRef(key=key, shape=shape, dtype=info.dtype, transposed=transposed)


def group_factors(found: Names, ways: Ways, header: Header, config: Mapping[str, JSON], stems: Stems) -> Grouped:
    """One group per module whose slots make a kind, and findings for every other module."""
    groups: dict[str, Group] = {}
    trouble = _Trouble()
    for spelled, keys in sorted(found.factors.items(), key=lambda item: natural(item[0])):
        module = stems.find(spelled) or spelled
        if module in groups:
            trouble.add("key-twice", keys.values(), f"{spelled} and another name both mean the base's {module}")
            continue
        fit = _choose(ways, keys, found.shared)
        if broken := [key for suffix, key in keys.items() if _emptied(header, key, suffix, fit)]:
            trouble.add("tensor-empty", keys.values(), f"{broken[0]} is {list(header.tensors[broken[0]].shape)}")
            continue
        if isinstance(fit, str):
            trouble.add("slot-missing", keys.values(), f"{spelled} {fit}")
            continue
        slots = {
            leaf.slot: tensor_ref(header, keys[suffix], transposed=leaf.transposed)
            for suffix, leaf in fit.leaves.items()
        }
        role = next((leaf.role for leaf in fit.leaves.values() if leaf.role), "")
        try:
            _bind(fit.kind, slots)
            options = fit.spelling.options(config, spelled, slots)
            group = Group(module=module, kind=fit.kind.name, role=role, slots=slots, options=options)
            fit.kind.touches(group)
        except ShapeMisfit as misfit:
            flat = any(len(ref.shape) < 2 <= len(_sized(fit.kind.slot(slot).dims)) for slot, ref in slots.items())
            trouble.add("tensor-empty" if flat else "slot-misfit", keys.values(), f"{spelled}: {misfit}")
            continue
        except (IntegrityError, UnsupportedKind) as error:
            code = "config-contradicts-tensors" if isinstance(error, IntegrityError) else "config-unreadable"
            trouble.add(code, keys.values(), error.message)
            continue
        groups[module] = group
    shared = _shared(found, ways, header, {group.kind for group in groups.values()})
    trouble.add_unused(found, shared)
    return Grouped(tuple(groups.values()), shared, (*trouble.findings(), *_unlisted(found, config)))


def _emptied(header: Header, key: str, suffix: str, fit: _Fit | str) -> bool:
    """Whether a tensor has no elements, and no kind that could have pruned them away."""
    prunable = isinstance(fit, _Fit) and fit.kind.slot(fit.leaves[suffix].slot).prunable
    return 0 in header.tensors[key].shape and not prunable


def _choose(ways: Ways, present: Collection[str], shared: Collection[str]) -> _Fit | str:
    """The one kind that knows every suffix and lacks none, or what is wrong, to follow the module's name."""
    fits = [fit for kind, spelling in ways if (fit := _fit(kind, spelling, present, shared))]
    whole = [fit for fit in fits if not fit.missing]
    if len(whole) == 1:
        return whole[0]
    has = f"has {', '.join(sorted(present))}"
    if whole:
        return f"{has}, which is {' and '.join(fit.kind.title for fit in whole)} alike"
    if not fits:
        return f"{has}, which no kind has together"
    nearest = min(fits, key=lambda fit: len(fit.missing))
    return f"{has} without {', '.join(nearest.missing)}{nearest.reason and f': {nearest.reason}'}"


def _fit(kind: Kind, spelling: Spelling, present: Collection[str], shared: Collection[str]) -> _Fit | None:
    # files may keep a copy of a shared tensor on every module, under the same suffix
    known = {leaf.suffix: leaf for leaf in spelling.leaves if not kind.slot(leaf.slot).shared}
    if not all(suffix in known for suffix in present):
        return None
    leaves = {suffix: known[suffix] for suffix in present}
    slots = [leaf.slot for leaf in leaves.values()]
    roles = {leaf.role for leaf in leaves.values() if leaf.role}
    if len(set(slots)) < len(slots) or len(roles) > 1:
        return None
    role = next(iter(roles), "")
    missing, reason = [], ""
    for slot in kind.slots:
        if slot.optional or slot.name in slots:
            continue
        spelled = [leaf for leaf in spelling.leaves if leaf.slot == slot.name]
        if slot.shared and any(leaf.suffix in shared for leaf in spelled):
            continue
        fitting = [leaf.suffix for leaf in spelled if leaf.role in ("", role)] or [leaf.suffix for leaf in spelled]
        missing.append(fitting[0] if fitting else slot.name)
        reason = reason or slot.lacking
    return _Fit(kind, spelling, leaves, tuple(missing), reason)


def _sized(dims: str) -> list[str]:
    """The dimensions that must be there."""
    return [dim for dim in dims.split() if not dim.startswith("*")]


def _bind(kind: Kind, slots: Mapping[str, TensorRef]) -> None:
    bound: Binding = {}
    for slot, ref in slots.items():
        bound = unify(kind.slot(slot).dims, ref.shape, bound, name=slot)


def _shared(found: Names, ways: Ways, header: Header, present: Collection[str]) -> dict[tuple[str, str], TensorRef]:
    return {
        (kind.name, leaf.slot): tensor_ref(header, found.shared[leaf.suffix], transposed=leaf.transposed)
        for kind, spelling in ways
        for leaf in spelling.leaves
        if kind.name in present and leaf.suffix in found.shared and kind.slot(leaf.slot).shared
    }


class _Trouble:
    """What is wrong, by code: the keys concerned and the first case in words."""

    _TEXTS: Mapping[str, tuple[str, str]] = {
        "config-contradicts-tensors": (f"{CONFIG} and the tensors contradict each other", ""),
        "config-unreadable": (f"{CONFIG} uses what is not understood here", ""),
        "key-twice": ("two keys say the same", ""),
        "slot-misfit": ("tensors of one module do not fit together", ""),
        "slot-missing": ("part of a module's tensors is missing", "fetch the file again, or ask its author"),
        "tensor-empty": ("tensors are empty or flat", _SHARDED),
    }

    def __init__(self) -> None:
        self._found: dict[str, tuple[list[str], list[str]]] = {}

    def add(self, code: str, keys: Collection[str], what: str) -> None:
        cases, where = self._found.setdefault(code, ([], []))
        cases.append(what)
        where.extend(keys)

    def add_unused(self, found: Names, shared: Mapping[tuple[str, str], TensorRef]) -> None:
        used = {ref.key for ref in shared.values()}
        for key in found.shared.values():
            if key not in used:
                self.add("slot-missing", [key], f"{key} is shared by modules, and no module uses it")
        for key in found.again:
            self.add("key-twice", [key], f"{key} and another key both name one slot")

    def findings(self) -> list[Finding]:
        result = []
        for code, (cases, where) in sorted(self._found.items()):
            text, remedy = self._TEXTS[code]
            more = f" (and {len(cases) - 1} more like it)" if len(cases) > 1 else ""
            result.append(
                Finding(
                    code=code,
                    axis="format" if code == "config-unreadable" else "integrity",
                    level=Verdict.INCOMPATIBLE,
                    message=f"{text}: {cases[0]}{more}",
                    where=tuple(sorted(where)),
                    remedy=remedy,
                )
            )
        return result


def _unlisted(found: Names, config: Mapping[str, JSON]) -> list[Finding]:
    """Modules with tensors that the config does not target: PEFT itself would leave their tensors aside, unsaid."""
    apart = untargeted(found.factors, config)
    if not apart:
        return []
    return [
        Finding(
            code="target-unlisted",
            axis="format",
            level=Verdict.UNVERIFIED,
            message=f"target_modules in {CONFIG} does not cover {len(apart)} of the {len(found.factors)} modules in "
            "the file; they are used here, and PEFT would leave them out",
            where=tuple(sorted(apart, key=natural)),
        )
    ]
