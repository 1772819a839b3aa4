"""Deltas spelled as PEFT spells them: ``adapter_model.safetensors`` and the ``adapter_config.json`` that PEFT reads.

A PEFT adapter is one type of factors over named modules, plus whole parameters.  Each kind takes its deltas apart into
slots and writes its own config fields; what has no place in that picture is refused with the list of targets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lorahub.bases.index import natural
from lorahub.bases.layout import Target
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON, Group, Kind, Leaf, Spelling, TensorRef
from lorahub.errors import CannotCarry
from lorahub.files.dtypes import from_torch
from lorahub.formats.format import Written
from lorahub.formats.peft.config import CONFIG, kept_by
from lorahub.formats.peft.keys import MODEL, PREFIX, WRAPPED
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
    """What has been spelled so far, and what could not be."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    spellings: dict[str, Spelling] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    biases: list[str] = field(default_factory=list)
    lost: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def write(deltas: Mapping[Target, Delta], kinds: Sequence[Kind], hints: Mapping[str, JSON]) -> Written:
    """Spell ``deltas`` for PEFT.

    Args:
        deltas: what the adapter does.
        kinds: every registered kind.
        hints: ``roles`` (target name -> role of its module, such as "embedding"), ``base_repo`` and ``base_revision``,
            ``modules_to_save`` (names to keep modules under), ``fan_in_fan_out``, ``task_type``, ``auto_mapping``.

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
            _spell_factors(draft, kinds, module, rest, role)
        if whole:
            _spell_whole(draft, module, whole, hints, adapted=bool(rest))
    if not draft.lost and not draft.groups:
        draft.lost["PEFT has no adapter without factors"] += [target.name for target in deltas]
    if len(draft.spellings) > 1:
        names = ", ".join(sorted(draft.spellings))
        draft.lost[f"a PEFT adapter is of one kind, and these are {names}"] += sorted(draft.groups, key=natural)
    if draft.lost:
        raise _cannot_carry(draft.lost)
    return Written(
        file=FILE,
        tensors={key: draft.tensors[key] for key in sorted(draft.tensors)},
        metadata={"format": "pt"},
        configs={CONFIG: _config(draft, hints)},
    )


def _name(module: str, parameter: str) -> str:
    return Target("", module, parameter).name


def _spell_factors(
    draft: _Draft, kinds: Sequence[Kind], module: str, parameters: Mapping[str, Delta], role: str
) -> None:
    names = [_name(module, name) for name in parameters]
    taken = next(
        (
            (kind, spelling, *apart)
            for kind in kinds
            for spelling in kind.spellings
            if spelling.format == "peft" and (apart := kind.dissolve(parameters)) is not None
        ),
        None,
    )
    if taken is None:
        found = " and ".join(sorted({delta.kind for delta in parameters.values()}))
        draft.lost[f"PEFT has no word for {found} on these parameters"] += names
        return
    kind, spelling, tensors, options = taken
    slots: dict[str, TensorRef] = {}
    for slot, tensor in tensors.items():
        leaf = _leaf(spelling, slot, role)
        if leaf is None:
            draft.lost[f"PEFT has no word for {slot} of a {role or 'linear'} module"] += names
            return
        shared = kind.slot(slot).shared
        key = f"{MODEL}{leaf.suffix}" if shared else f"{PREFIX}{module}.{leaf.suffix}"
        stored = tensor.transpose(0, 1) if leaf.transposed else tensor
        if shared and key in draft.tensors and not torch.equal(draft.tensors[key], stored):
            draft.lost[f"PEFT has one {slot} for all modules, and these differ"] += names
            return
        draft.tensors[key] = stored
        slots[slot] = TensorRef(
            key=key, shape=tuple(tensor.shape), dtype=from_torch(tensor.dtype), transposed=leaf.transposed
        )
    draft.spellings[kind.name] = spelling
    draft.groups[module] = Group(module=module, kind=kind.name, role=role, slots=slots, options=options)


def _leaf(spelling: Spelling, slot: str, role: str) -> Leaf | None:
    """How a slot is spelled for a module of that role: its own spelling, else the one for any."""
    leaves = [leaf for leaf in spelling.leaves if leaf.slot == slot]
    return next((leaf for wanted in (role, "", "linear") for leaf in leaves if leaf.role == wanted), None)


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
    ((_, spelling),) = draft.spellings.items()
    own = spelling.config(draft.groups)
    config: dict[str, JSON] = {name: hints.get(hint) or None for name, hint in _FROM_HINTS.items()}
    config |= {
        "inference_mode": True,
        "modules_to_save": _list(draft.kept) or None,
        "peft_type": spelling.tag,
        "target_modules": _list(draft.groups),
    }
    config |= own
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


def _list(modules: Iterable[str]) -> list[JSON]:
    return [*sorted(modules, key=natural)]


def _cannot_carry(lost: Mapping[str, Sequence[str]]) -> CannotCarry:
    lines = [
        f"{reason}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for reason, names in sorted(lost.items())
    ]
    return CannotCarry("this adapter cannot be written as a PEFT folder\n  " + "\n  ".join(lines))
