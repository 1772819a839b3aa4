"""Slots of one module brought together: which kind they are, whether they are all there, and what scales them.

Works on keys, shapes and the config; what a kind needs and how it reads the config, the kind declares.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from lorahub.bases.index import natural
from lorahub.deltas.disputes import Choice, Dispute
from lorahub.deltas.kind import JSON, Group, Kind, TensorRef
from lorahub.deltas.stacks import stacked_shape
from lorahub.errors import IntegrityError, UnsupportedKind
from lorahub.files.entries import forms_of
from lorahub.files.header import Header
from lorahub.findings import Finding, Verdict
from lorahub.formats.families import Family, Groups, Like, by_module, representatives
from lorahub.formats.peft.config import CONFIG
from lorahub.formats.peft.fits import Fit, Ways, choose, named
from lorahub.formats.peft.keys import Names, Stems
from lorahub.formats.peft.owner import Owner
from lorahub.formats.peft.rules import left_out
from lorahub.formats.peft.trouble import Trouble
from lorahub.formats.peft.tying import without_copies
from lorahub.formats.runs import Runs, runs_of
from lorahub.shapes import ShapeMisfit, bind

__all__ = ["Grouped", "group_factors", "tensor_ref"]


@dataclass(frozen=True, slots=True)
class Grouped:
    """Groups and adapter-wide tensors, with findings for every key that is in neither."""

    groups: Sequence[Group]
    shared: Mapping[tuple[str, str], TensorRef]
    findings: tuple[Finding, ...]


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
    trouble, fits = Trouble(), _Fits(ways, found.shared)
    runs = runs_of(found.factors)
    families = _families(runs, fits, header, config) if stems.bare and not owned else []
    alike = {at for family in families for at in family.members}
    others = [(at, stem) for at, (_, stem) in enumerate(runs.stems) if at not in alike]
    groups: dict[tuple[str, str], tuple[int, Group]] = {}
    for at, spelled in sorted(others, key=lambda each: by_module("", each[1])):
        keys = found.factors[spelled]
        owner = owned.get(spelled) or Owner(module=spelled, parameter="weight", named=spelled)
        if owner.problem:
            code = "parameter-ambiguous" if stems.find(owner.module) else "base-needed"
            trouble.add(code, keys.values(), f"{owner.module} {owner.problem}")
            continue
        module = stems.find(owner.module) or owner.module
        if (module, owner.parameter) in groups:
            trouble.add("key-twice", keys.values(), f"{spelled} and another name both mean the base's {module}")
            continue
        fit = fits.of(keys, experts=bool(owner.experts))
        if broken := _emptied(header, keys, fit):
            trouble.add("tensor-empty", keys.values(), f"{broken[0]} is {list(header.tensors[broken[0]].shape)}")
            continue
        if isinstance(fit, str):
            trouble.add("slot-missing", keys.values(), f"{spelled} {fit}")
            continue
        slots: dict[str, TensorRef] = {}
        try:
            options, dispute = _fill(slots, owner, fit, keys, header, config)
            if (on := fit.spelling.disputed_on) and (shape := stems.shape(module, owner.parameter)):
                dispute = dispute or on(shape, options)
            settled = choice.settle(dispute, options, target=f"{module}.{owner.parameter}", keys=keys.values())
            if settled is None:
                continue
            group = _group(module, owner, fit, slots, settled)
        except ShapeMisfit as misfit:
            flat = any(len(ref.shape) < 2 <= len(_sized(fit.kind.slot(slot).dims)) for slot, ref in slots.items())
            trouble.add("tensor-empty" if flat else "slot-misfit", keys.values(), f"{spelled}: {misfit}")
            continue
        except (IntegrityError, UnsupportedKind) as error:
            code = "config-contradicts-tensors" if isinstance(error, IntegrityError) else "config-unreadable"
            trouble.add(code, keys.values(), error.message)
            continue
        groups[module, group.parameter] = at, group
    apart = [*groups.values()]
    every = Groups(runs, runs.stems, families, apart) if families else tuple(group for _, group in apart)
    shared = _shared(found, ways, header, {group.kind for group in representatives(every)})
    trouble.add_unused(found, shared)
    named_else = {stem for stem, owner in owned.items() if owner.named != owner.module}
    if beside := {leaf.suffix for _, spelling in ways if spelling.beside for leaf in spelling.leaves}:
        named_else |= {stem for stem, keys in found.factors.items() if beside.issuperset(keys)}
    listed = _unlisted([stem for stem in found.factors if stem not in named_else], config)
    return Grouped(every, shared, (*trouble.findings(), *choice.findings(), *listed))


class _Fits:
    """Which kind takes the suffixes of a module, or why none does; the modules of a file have few sets of them."""

    def __init__(self, ways: Ways, shared: Collection[str]) -> None:
        self._on_experts = [way for way in ways if any(leaf.stacked for leaf in way[1].leaves)]
        self._on_modules = [way for way in ways if way not in self._on_experts]
        self._shared = shared
        self._found: dict[tuple[bool, frozenset[str]], Fit | str] = {}

    def of(self, keys: Mapping[str, str], *, experts: bool) -> Fit | str:
        which = (experts, frozenset(keys))
        if which not in self._found:
            self._found[which] = choose(self._on_experts if experts else self._on_modules, keys, self._shared)
        return self._found[which]


def _families(runs: Runs, fits: _Fits, header: Header, config: Mapping[str, JSON]) -> list[Family]:
    """The sorts of modules of which there is nothing to say, where no base is known."""
    sorts: defaultdict[object, list[int]] = defaultdict(list)
    for at, sort in enumerate(runs.sorts(forms_of(header.tensors), {})):
        sorts[sort].append(at)
    families = []
    for members in sorts.values():
        (_, module), keys = runs.stems[members[0]], runs.keys_of(members[0])
        if (like := _like(module, keys, fits, header, config)) is not None:
            families.append(Family(like, members))
    return families


def _like(module: str, keys: Mapping[str, str], fits: _Fits, header: Header, config: Mapping[str, JSON]) -> Like | None:
    """What the modules of a sort are like, or None where there is anything to say of one, or its name matters."""
    fit = fits.of(keys, experts=False)
    if isinstance(fit, str) or not fit.spelling.alike(config) or _emptied(header, keys, fit):
        return None
    owner = Owner(module=module, parameter="weight", named=module)
    slots: dict[str, TensorRef] = {}
    try:
        options, dispute = _fill(slots, owner, fit, keys, header, config)
        if dispute is not None:
            return None
        group = _group(module, owner, fit, slots, options)
    except (ShapeMisfit, IntegrityError, UnsupportedKind):  # said of each of them
        return None
    return Like(group, {leaf.slot: suffix for suffix, leaf in fit.leaves.items()}, tuple(fit.kind.touches(group)))


def _fill(
    slots: dict[str, TensorRef],
    owner: Owner,
    fit: Fit,
    keys: Mapping[str, str],
    header: Header,
    config: Mapping[str, JSON],
) -> tuple[dict[str, JSON], Dispute | None]:
    """Put a module's tensors into ``slots``; its options, and how PEFT's result differs from the declared one.

    Raises:
        ShapeMisfit: the tensors do not fit together; ``slots`` is empty where one is no stack.
        IntegrityError, UnsupportedKind: the config does not go with them, or says what nobody knows.
    """
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
    return options, owner.dispute(options) or fit.spelling.disputed(config, owner.named, slots, options)


def _group(module: str, owner: Owner, fit: Fit, slots: Mapping[str, TensorRef], options: Mapping[str, JSON]) -> Group:
    role = next((leaf.role for leaf in fit.leaves.values() if leaf.role), "")
    group = Group(module=module, parameter=owner.parameter, kind=fit.kind.name, role=role, slots=slots, options=options)
    _demand_change(group, fit.kind)
    return group


def _emptied(header: Header, keys: Mapping[str, str], fit: Fit | str) -> list[str]:
    """The tensors without elements of no kind that could have pruned them away."""
    return [
        key
        for suffix, key in keys.items()
        if 0 in header.tensors[key].shape
        and not (isinstance(fit, Fit) and fit.kind.slot(fit.leaves[suffix].slot).prunable)
    ]


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
    bind(tuple([(slot, kind.slot(slot).dims, ref.shape) for slot, ref in slots.items()]))


def _shared(found: Names, ways: Ways, header: Header, present: Collection[str]) -> dict[tuple[str, str], TensorRef]:
    result = {}
    for kind, spelling in ways:
        own = [leaf for leaf in spelling.leaves if kind.slot(leaf.slot).shared]
        for suffix, key in found.shared.items() if kind.name in present or spelling.implied else ():
            if leaf := named(own, suffix):
                result[kind.name, leaf.slot] = tensor_ref(header, key, transposed=leaf.transposed)
    return result


def _unlisted(modules: Collection[str], config: Mapping[str, JSON]) -> list[Finding]:
    """Modules with tensors that the config does not target: PEFT itself would leave their tensors aside, unsaid."""
    found = {field: without_copies(some, config) for field, some in left_out(modules, config).items()}
    return [
        Finding(
            code="target-unlisted",
            axis="format",
            level=Verdict.UNVERIFIED,
            message=f"{field} in {CONFIG} {_LEFT_OUT[field]} {len(apart)} of the {len(modules)} modules in "
            "the file; they are used here, and PEFT would leave them out",
            where=tuple(sorted(apart, key=natural)),
        )
        for field, apart in found.items()
        if apart
    ]


_LEFT_OUT: Mapping[str, str] = {
    "target_modules": "does not cover",
    "exclude_modules": "leaves out",
    "layers_to_transform": "does not cover the layers of",
}
"""What a field does to modules that it keeps from being adapted."""
