"""Deltas spelled as PEFT spells them: ``adapter_model.safetensors`` and the ``adapter_config.json`` that PEFT reads.

A PEFT adapter is one type of factors over named modules, plus whole parameters.  Each kind takes its deltas apart into
slots and writes its own config fields; what has no place in that picture is refused with the list of targets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorahub.bases.index import natural
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.disputes import COMPATS, Compat
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, Spelling, TensorRef
from lorahub.deltas.stacks import stack
from lorahub.errors import CannotCarry
from lorahub.files.dtypes import from_torch
from lorahub.formats.format import Written
from lorahub.formats.peft.config import CONFIG, kept_by
from lorahub.formats.peft.keys import MODEL, PREFIX, WRAPPED
from lorahub.formats.peft.units import Unit, described, layouts
from lorahub.formats.peft.written import COMPAT
from lorahub.lazy import torch

__all__ = ["FILE", "write"]

FILE = "adapter_model.safetensors"

_FROM_HINTS: Mapping[str, str] = {
    "auto_mapping": "auto_mapping",
    "base_model_name_or_path": "base_repo",
    "revision": "base_revision",
    "task_type": "task_type",
}
"""Config field -> the hint that it is copied from."""


@dataclass(slots=True)
class _Draft:
    """What has been spelled so far, and what could not be; groups under the names by which the config means them."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    spellings: dict[str, Spelling] = field(default_factory=dict)
    choices: dict[Compat, list[str]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    biases: list[str] = field(default_factory=list)
    lost: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def write(deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
    """Spell ``deltas`` for PEFT.

    Args:
        deltas: what the adapter does.
        kinds: every registered kind.
        hints: ``roles`` (target name -> role of its module, such as "embedding"), ``base_repo`` and ``base_revision``,
            ``modules_to_save`` (names to keep modules under), ``fan_in_fan_out``, ``task_type``, ``auto_mapping``,
            ``parameter_order`` (module -> its adapted parameters in the order in which it registers them), ``training``
            (``dropout``, of the adapter's own path), ``compat`` (whose result was chosen).

    Raises:
        CannotCarry: listing every target that PEFT has no word for, by reason.
    """
    draft = _Draft()
    modules: dict[str, dict[str, Delta]] = {}
    for target, delta in sorted(deltas.items(), key=lambda item: natural(item[0].name)):
        if target.component:
            draft.lost["PEFT has no components"].append(target.name)
        else:
            modules.setdefault(target.module, {})[target.parameter] = delta
    roles = hints.get("roles")
    spelled = {kind.name for kind in kinds for spelling in kind.spellings if spelling.format == "peft"}
    laid = layouts(modules, hints, draft.lost)
    units: list[tuple[Unit, list[_Way]]] = []
    for module, parameters in modules.items():
        whole = {
            name: delta
            for name, delta in parameters.items()
            if delta.replacement() is not None and delta.kind not in spelled
        }
        rest = {name: delta for name, delta in parameters.items() if name not in whole}
        if rest:
            named = roles if isinstance(roles, dict) else {}
            role = next((str(named[name]) for each in rest if (name := _name(module, each)) in named), "")
            own = laid.get(module) or (Unit(stem=module, named=module, deltas=rest, role=role),)
            units += [(unit, _ways(draft, kinds, unit)) for unit in own]
        if whole:
            stem = laid[module][0].stem if laid.get(module) else module
            _spell_whole(draft, stem, whole, hints, adapted=bool(rest))
    tag = next(iter(_common(units)), "")
    for unit, ways in units:
        for way in ways:
            if way.spelling.tag == tag or not tag:
                _spell_factors(draft, unit, way)
                break
    if not draft.lost and not draft.groups:
        draft.lost["PEFT has no adapter without factors"] += [target.name for target in deltas]
    if len([kind for kind, spelling in draft.spellings.items() if not _stands_beside(spelling)]) > 1:
        names = ", ".join(sorted(draft.spellings))
        draft.lost[f"a PEFT adapter is of one kind, and these are {names}"] += sorted(draft.groups, key=natural)
    if draft.lost:
        raise _cannot_carry(draft.lost)
    config = _config(draft, hints)
    return Written(
        file=FILE,
        tensors={key: draft.tensors[key] for key in sorted(draft.tensors)},
        metadata={"format": "pt", **described(unit for unit, _ in units), **_chosen(draft, config, hints)},
        configs={CONFIG: config},
    )


def _name(module: str, parameter: str) -> str:
    return Target("", module, parameter).name


@dataclass(frozen=True, slots=True)
class _Way:
    """One kind's spelling of a unit: its tensors by slot, and its options."""

    kind: Kind
    spelling: Spelling
    tensors: Mapping[str, torch.Tensor]
    options: Mapping[str, JSON]


def _ways(draft: _Draft, kinds: Sequence[Kind], unit: Unit) -> list[_Way]:
    """Every way in which PEFT could spell a unit; what has none is noted as lost."""
    found = [
        _Way(kind, spelling, *apart)
        for kind in kinds
        for spelling in kind.spellings
        if spelling.format == "peft" and (apart := kind.dissolve(unit.deltas)) is not None
    ]
    if not found:
        kind = " and ".join(sorted({delta.kind for delta in unit.deltas.values()}))
        draft.lost[f"PEFT has no word for {kind} on these parameters"] += _parameters(unit)
    return found


def _common(units: Sequence[tuple[Unit, Sequence[_Way]]]) -> list[str]:
    """The values of ``peft_type`` under which all units can be spelled, in the order of the first unit's ways."""
    tags = [[way.spelling.tag for way in ways] for _, ways in units if ways]
    return [tag for tag in tags[0] if all(tag in each for each in tags)] if tags else []


def _stands_beside(spelling: Spelling) -> bool:
    """Whether a kind may be in one adapter with another: by what it declares, or since it is on parameters."""
    return spelling.beside or any(leaf.stacked for leaf in spelling.leaves)


def _parameters(unit: Unit) -> list[str]:
    return [_name(unit.module or unit.stem, unit.parameter or name) for name in unit.deltas]


def _spell_factors(draft: _Draft, unit: Unit, way: _Way) -> None:
    names = _parameters(unit)
    slots: dict[str, TensorRef] = {}
    for slot, tensor in way.tensors.items():
        leaf = _leaf(way.spelling, slot, unit.role)
        if leaf is None:
            draft.lost[f"PEFT has no word for {slot} of a {unit.role or 'linear'} module"] += names
            return
        shared = way.kind.slot(slot).shared
        key = f"{MODEL}{leaf.suffix}" if shared else f"{PREFIX}{unit.stem}.{leaf.suffix}"
        stored = stack(tensor, leaf.stacked) if leaf.stacked else tensor
        stored = stored.transpose(0, 1) if leaf.transposed else stored
        if shared and key in draft.tensors and not torch.equal(draft.tensors[key], stored):
            draft.lost[f"PEFT has one {slot} for all modules, and these differ"] += names
            return
        draft.tensors[key] = stored
        slots[slot] = TensorRef(
            key=key,
            shape=tuple(tensor.shape),
            dtype=from_torch(tensor.dtype),
            transposed=leaf.transposed,
            stacked=leaf.stacked,
        )
    if unit.choice:
        draft.choices.setdefault(unit.choice, []).extend(names)
    if not unit.named:
        return
    draft.spellings[way.kind.name] = way.spelling
    draft.groups[unit.named] = Group(
        module=unit.stem,
        parameter=unit.parameter or "weight",
        kind=way.kind.name,
        role=unit.role,
        slots=slots,
        options=way.options,
    )


def _chosen(draft: _Draft, config: Mapping[str, JSON], hints: Mapping[str, JSON]) -> dict[str, str]:
    """Whose result the factors are for, as a file says it; empty where that makes no difference.

    Where that shows with the base alone, ``hints`` say what was chosen.

    Raises:
        CannotCarry: part of them are for PEFT's result, and part for the declared one.
    """
    for name, group in draft.groups.items():
        dispute = draft.spellings[group.kind].disputed(config, name, group.slots, group.options)
        if dispute is not None:
            compat: Compat = "strict" if _agree(dispute.declared, group.options) else "peft"
            draft.choices.setdefault(compat, []).append(name)
    shows_later = [spelling for spelling in draft.spellings.values() if spelling.disputed_on]
    if shows_later and not draft.choices and (said := hints.get("compat")) in COMPATS:
        return {COMPAT: str(said)}
    if len(draft.choices) > 1:
        says = "PEFT's own result is meant for a part of the adapter, and the declared one for"
        raise _cannot_carry({says: [name for names in draft.choices.values() for name in names]})
    return {COMPAT: next(iter(draft.choices))} if draft.choices else {}


def _agree(wanted: Mapping[str, JSON] | None, options: Mapping[str, JSON]) -> bool:
    return wanted is not None and all(options.get(name) == value for name, value in wanted.items())


def _leaf(spelling: Spelling, slot: str, role: str) -> Leaf | None:
    """How a slot is spelled for a module of that role: its own spelling, else the one for any."""
    leaves = [leaf for leaf in spelling.leaves if leaf.slot == slot]
    if not leaves:  # one of many
        name, _, which = slot.partition(".")
        many = (leaf for leaf in spelling.leaves if leaf.slot == name)
        leaves = [replace(leaf, suffix=leaf.suffix.replace("*", which)) for leaf in many]
    wanted_roles = (role, "", "linear", leaves[0].role) if len(leaves) == 1 else (role, "", "linear")
    return next((leaf for wanted in wanted_roles for leaf in leaves if leaf.role == wanted), None)


def _spell_whole(
    draft: _Draft, module: str, parameters: Mapping[str, Delta], hints: Mapping[str, JSON], *, adapted: bool
) -> None:
    """Whole parameters: biases by the ``bias`` field, everything else by keeping its module."""
    values = {name: value for name, delta in parameters.items() if (value := delta.replacement()) is not None}
    if values.keys() == {"bias"}:
        inside = f"{module}.{WRAPPED}" if adapted else module
        draft.tensors[f"{PREFIX}{_name(inside, 'bias')}"] = values["bias"]
        draft.biases.append(module)
        return
    if adapted or not module:
        reason = "PEFT keeps whole modules, not parameters beside factors" if adapted else "PEFT keeps modules by name"
        draft.lost[reason] += [_name(module, name) for name in values]
        return
    given = hints.get("modules_to_save")
    entries = [name for name in given if isinstance(name, str) and name] if isinstance(given, list) else []
    draft.kept.add(kept_by(module, entries) or module)
    draft.tensors |= {f"{PREFIX}{module}.{name}": value for name, value in values.items()}


def _config(draft: _Draft, hints: Mapping[str, JSON]) -> dict[str, JSON]:
    spelling = next(each for each in draft.spellings.values() if not each.beside or len(draft.spellings) == 1)
    own: dict[str, JSON] = {}
    for writes in {each.config: None for each in draft.spellings.values()}:
        kinds = {kind for kind, each in draft.spellings.items() if each.config is writes}
        own |= writes({name: group for name, group in draft.groups.items() if group.kind in kinds})
    adapted = {name: group for name, group in draft.groups.items() if not draft.spellings[group.kind].beside}
    parameters = [name for name, group in adapted.items() if name != group.module]
    config: dict[str, JSON] = {name: hints.get(hint) or None for name, hint in _FROM_HINTS.items()}
    config |= {
        "inference_mode": True,
        "modules_to_save": _list(draft.kept) or None,
        "peft_type": spelling.tag,
        "target_modules": _list(name for name in adapted if name not in parameters),
    }
    if parameters:
        config["target_parameters"] = _list(parameters)
    config |= own
    dropout = _mapping(hints.get("training")).get("dropout")
    if dropout and (name := f"{spelling.tag.lower()}_dropout") in own:
        config[name] = dropout
    if draft.biases:
        everywhere = any(module not in draft.groups for module in draft.biases)
        config["bias"] = "all" if everywhere else f"{spelling.tag.lower()}_only"
    if hints.get("fan_in_fan_out") is True and "fan_in_fan_out" in spelling.fields:
        config["fan_in_fan_out"] = True
    refused = {name: about.refuse for name, about in spelling.fields.items() if name in config and about.refuse}
    if draft.kept and "modules_to_save" in refused:
        raise _cannot_carry({refused["modules_to_save"]: sorted(draft.kept, key=natural)})
    for name in refused:
        if config[name] is None:  # PEFT's own config class has no such field
            del config[name]
    return dict(sorted(config.items()))


def _mapping(value: JSON) -> Mapping[str, JSON]:
    return value if isinstance(value, dict) else {}


def _list(modules: Iterable[str]) -> list[JSON]:
    return [*sorted(modules, key=natural)]


def _cannot_carry(lost: Mapping[str, Sequence[str]]) -> CannotCarry:
    lines = [
        f"{reason}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for reason, names in sorted(lost.items())
    ]
    return CannotCarry("this adapter cannot be written as a PEFT folder\n  " + "\n  ".join(lines))
