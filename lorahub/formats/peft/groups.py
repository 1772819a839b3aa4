"""Slots of one module brought together: which kind they are, whether they are all there, and what scales them.

Works on keys, shapes and the config; what a kind needs and how it reads the config, the kind declares.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, final

from lorahub.bases.index import natural
from lorahub.deltas.disputes import Choice
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, Spelling, TensorRef
from lorahub.deltas.stacks import stacked_shape
from lorahub.errors import IntegrityError, UnsupportedKind
from lorahub.files.header import Header
from lorahub.findings import Axis, Finding, Verdict
from lorahub.formats.peft.config import CONFIG, untargeted
from lorahub.formats.peft.keys import Names, Stems
from lorahub.formats.peft.owner import Owner
from lorahub.shapes import Binding, ShapeMisfit, unify

__all__ = ["Grouped", "Suffixes", "Ways", "group_factors", "suffixes", "tensor_ref"]

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


@final
class Suffixes(frozenset[str]):
    """Endings of keys; one with a ``*`` has every ending in it that fits."""

    def __contains__(self, suffix: object) -> bool:
        if super().__contains__(suffix):
            return True
        return isinstance(suffix, str) and any(
            Leaf(slot="", suffix=each).which(suffix) for each in self if "*" in each and each[0] == suffix[:1]
        )


def suffixes(ways: Ways, *, shared: bool) -> Suffixes:
    """What the kinds call their slots: those that modules have, or those that exist once per adapter."""
    return Suffixes(
        leaf.suffix for kind, spelling in ways for leaf in spelling.leaves if kind.slot(leaf.slot).shared == shared
    )


def _named(leaves: Iterable[Leaf], suffix: str) -> Leaf | None:
    """The leaf that spells ``suffix``; of one that spells many, with the slot's full name."""
    for leaf in leaves:
        if leaf.suffix == suffix:
            return leaf
        if "*" in leaf.suffix and (which := leaf.which(suffix)):
            return replace(leaf, slot=f"{leaf.slot}.{which}", suffix=suffix)
    return None


def tensor_ref(header: Header, key: str, *, transposed: bool = False, stacked: str = "", experts: int = 0) -> TensorRef:
    """Where a tensor is, with its shape as the slot sees it.

    Raises:
        ShapeMisfit: it should stack matrices for so many experts, and does not divide up.
    """
    info = header.tensors[key]
    if stacked:
        found = stacked_shape(info.shape, stacked, experts)
        if found is None:
            raise ShapeMisfit(f"{key} {list(info.shape)} does not divide into {experts} experts")
        return TensorRef(key=key, shape=found, dtype=info.dtype, stacked=stacked)
    shape = (info.shape[1], info.shape[0], *info.shape[2:]) if transposed and len(info.shape) > 1 else info.shape
    return TensorRef(key=key, shape=shape, dtype=info.dtype, transposed=transposed)


def group_factors(
    found: Names,
    ways: Ways,
    header: Header,
    config: Mapping[str, JSON],
    stems: Stems,
    owned: Mapping[str, Owner],
    choice: Choice,
) -> Grouped:
    """One group per module or parameter whose slots make a kind, and findings for every other module.

    Args:
        found: the file's names.
        ways: the kinds that share its ``peft_type``.
        header: of the file.
        config: the parsed config.
        stems: the base's modules.
        owned: stem -> the parameter that its factors change, where that is not a module's weight.
        choice: whose result counts where PEFT's is not the declared one.
    """
    groups: dict[tuple[str, str], Group] = {}
    trouble = _Trouble()
    on_experts = [way for way in ways if any(leaf.stacked for leaf in way[1].leaves)]
    on_modules = [way for way in ways if way not in on_experts]
    for spelled, keys in sorted(found.factors.items(), key=lambda item: natural(item[0])):
        owner = owned.get(spelled) or Owner(module=spelled, parameter="weight", named=spelled)
        if owner.problem:
            code = "parameter-ambiguous" if stems.find(owner.module) else "base-needed"
            trouble.add(code, keys.values(), f"{owner.module} {owner.problem}")
            continue
        module = stems.find(owner.module) or owner.module
        if (module, owner.parameter) in groups:
            trouble.add("key-twice", keys.values(), f"{spelled} and another name both mean the base's {module}")
            continue
        fit = _choose(on_experts if owner.experts else on_modules, keys, found.shared)
        if broken := [key for suffix, key in keys.items() if _emptied(header, key, suffix, fit)]:
            trouble.add("tensor-empty", keys.values(), f"{broken[0]} is {list(header.tensors[broken[0]].shape)}")
            continue
        if isinstance(fit, str):
            trouble.add("slot-missing", keys.values(), f"{spelled} {fit}")
            continue
        role = next((leaf.role for leaf in fit.leaves.values() if leaf.role), "")
        slots: dict[str, TensorRef] = {}
        try:
            slots |= {
                leaf.slot: tensor_ref(
                    header, keys[suffix], transposed=leaf.transposed, stacked=leaf.stacked, experts=owner.experts
                )
                for suffix, leaf in fit.leaves.items()
            }
            _bind(fit.kind, slots)
            _demand_factors(owner, slots)
            options = fit.spelling.options(config, owner.named, slots)
            if owner.experts:
                options |= {"transposed": owner.transposed}
            dispute = owner.dispute(options) or fit.spelling.disputed(config, owner.named, slots, options)
            settled = choice.settle(dispute, options, target=f"{module}.{owner.parameter}", keys=keys.values())
            if settled is None:
                continue
            group = Group(
                module=module,
                parameter=owner.parameter,
                kind=fit.kind.name,
                role=role,
                slots=slots,
                options=settled,
            )
            _demand_change(group, fit.kind)
        except ShapeMisfit as misfit:
            flat = any(len(ref.shape) < 2 <= len(_sized(fit.kind.slot(slot).dims)) for slot, ref in slots.items())
            trouble.add("tensor-empty" if flat else "slot-misfit", keys.values(), f"{spelled}: {misfit}")
            continue
        except (IntegrityError, UnsupportedKind) as error:
            code = "config-contradicts-tensors" if isinstance(error, IntegrityError) else "config-unreadable"
            trouble.add(code, keys.values(), error.message)
            continue
        groups[module, group.parameter] = group
    shared = _shared(found, ways, header, {group.kind for group in groups.values()})
    trouble.add_unused(found, shared)
    apart = {stem for stem, owner in owned.items() if owner.named != owner.module}
    beside = {leaf.suffix for _, spelling in ways if spelling.beside for leaf in spelling.leaves}
    apart |= {stem for stem, keys in found.factors.items() if beside.issuperset(keys)}
    listed = _unlisted([stem for stem in found.factors if stem not in apart], config)
    return Grouped(tuple(groups.values()), shared, (*trouble.findings(), *choice.findings(), *listed))


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
    return f"{has} without {', '.join(nearest.missing)}"


def _fit(kind: Kind, spelling: Spelling, present: Collection[str], shared: Collection[str]) -> _Fit | None:
    # files may keep a copy of a shared tensor on every module, under the same suffix
    own = [leaf for leaf in spelling.leaves if not kind.slot(leaf.slot).shared]
    leaves = {suffix: leaf for suffix in present if (leaf := _named(own, suffix))}
    if len(leaves) < len(present):
        return None
    slots = [leaf.slot for leaf in leaves.values()]
    roles = {leaf.role for leaf in leaves.values() if leaf.role}
    if len(set(slots)) < len(slots) or len(roles) > 1:
        return None
    role = next(iter(roles), "")
    missing = []
    for slot in kind.slots:
        if slot.optional or slot.name in slots:
            continue
        spelled = [leaf for leaf in spelling.leaves if leaf.slot == slot.name]
        if slot.shared and any(leaf.suffix in shared for leaf in spelled):
            continue
        fitting = [leaf.suffix for leaf in spelled if leaf.role in ("", role)] or [leaf.suffix for leaf in spelled]
        missing.append(fitting[0] if fitting else slot.name)
    return _Fit(kind, spelling, leaves, tuple(missing))


def _sized(dims: str) -> list[str]:
    """The dimensions that must be there."""
    return [dim for dim in dims.split() if not dim.startswith("*")]


def _demand_change(group: Group, kind: Kind) -> None:
    """Refuse a kind that would change another parameter than the one that the factors are for."""
    touched = {touch.parameter for touch in kind.touches(group)}
    if group.parameter not in {*touched, "weight"}:
        raise UnsupportedKind(f"{group.module}: {kind.title} changes {', '.join(touched)}, not {group.parameter}")


def _demand_factors(owner: Owner, slots: Collection[str]) -> None:
    """Refuse what PEFT would have on a weight only, or has without using it, as a bias on ``in_proj_weight``."""
    if owner.parameter != "weight" and set(slots) != {"down", "up"}:
        raise UnsupportedKind(f"{owner.named}: nobody knows what {', '.join(sorted(slots))} do to {owner.parameter}")


def _bind(kind: Kind, slots: Mapping[str, TensorRef]) -> None:
    bound: Binding = {}
    for slot, ref in slots.items():
        bound = unify(kind.slot(slot).dims, ref.shape, bound, name=slot)


def _shared(found: Names, ways: Ways, header: Header, present: Collection[str]) -> dict[tuple[str, str], TensorRef]:
    result = {}
    for kind, spelling in ways:
        own = [leaf for leaf in spelling.leaves if kind.slot(leaf.slot).shared]
        for suffix, key in found.shared.items() if kind.name in present or spelling.implied else ():
            if leaf := _named(own, suffix):
                result[kind.name, leaf.slot] = tensor_ref(header, key, transposed=leaf.transposed)
    return result


class _Trouble:
    """What is wrong, by code: the keys concerned and the first case in words."""

    _TEXTS: Mapping[str, tuple[str, str]] = {
        "config-contradicts-tensors": (f"{CONFIG} and the tensors contradict each other", ""),
        "config-unreadable": (f"{CONFIG} uses what is not understood here", ""),
        "base-needed": ("the keys leave out which parameter is meant", "name the base: --base BASE"),
        "key-twice": ("two keys say the same", ""),
        "parameter-ambiguous": ("it cannot be told which parameter is meant, or which way round it is", ""),
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
                    axis=_AXES.get(code, "integrity"),
                    level=Verdict.UNVERIFIED if code == "base-needed" else Verdict.INCOMPATIBLE,
                    message=f"{text}: {cases[0]}{more}",
                    where=tuple(sorted(where)),
                    remedy=remedy,
                )
            )
        return result


_AXES: Mapping[str, Axis] = {"base-needed": "base", "config-unreadable": "format", "parameter-ambiguous": "placement"}
"""Code -> the axis of its finding, where that is not integrity."""


def _unlisted(modules: Collection[str], config: Mapping[str, JSON]) -> list[Finding]:
    """Modules with tensors that the config does not target: PEFT itself would leave their tensors aside, unsaid."""
    apart = untargeted(modules, config)
    if not apart:
        return []
    return [
        Finding(
            code="target-unlisted",
            axis="format",
            level=Verdict.UNVERIFIED,
            message=f"target_modules in {CONFIG} does not cover {len(apart)} of the {len(modules)} modules in "
            "the file; they are used here, and PEFT would leave them out",
            where=tuple(sorted(apart, key=natural)),
        )
    ]
