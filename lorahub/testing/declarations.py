"""Laws of what a kind says of itself: headers tell what tensors become, and spellings lose nothing."""

from __future__ import annotations

from lorahub.deltas.delta import ALL, Delta
from lorahub.deltas.kind import Group, Kind
from lorahub.errors import BaseMismatch, CannotCarry, NotLocal
from lorahub.lazy import torch
from lorahub.shapes import Binding, ShapeMisfit, unify
from lorahub.testing.cases import Case, groups
from lorahub.testing.judging import hold

__all__ = ["declarations_are_what_build_does", "spellings_lose_nothing"]


def declarations_are_what_build_does(kind: Kind) -> None:
    """What ``touches`` says from headers is what ``build`` makes of the tensors, and ``dissolve`` undoes ``build``."""
    dissolved = 0
    for case, parameter, group, tensors in groups(kind):
        dissolved += 1
        declared = {slot.name: slot for slot in kind.slots}
        stray = [name for name in tensors if not any(slot.covers(name) for slot in kind.slots)]
        hold(not stray, f"{case.name}: dissolve gives slots that the kind does not declare")
        missing = [name for name, slot in declared.items() if not slot.optional and name not in tensors]
        hold(not missing, f"{case.name}: dissolve leaves out the required {', '.join(missing)}")
        built = kind.build(group, tensors)
        touches = {touch.parameter: touch for touch in kind.touches(group)}
        hold(touches.keys() == built.keys(), f"{case.name}: touches {sorted(touches)}, builds {sorted(built)}")
        rebuilt = built[parameter]
        _same(rebuilt, case, "build after dissolve")
        for name, delta in built.items():
            touch = touches[name]
            hold(touch.additive == delta.additive, f"{case.name}: touch and delta disagree on additive")
            hold(touch.replaces == (delta.replacement() is not None), f"{case.name}: they disagree on replaces")
            hold(touch.reads == delta.reads, f"{case.name}: they disagree on reads")
        touch = touches[parameter]
        shape = tuple(case.weight.shape)
        bound: Binding = {}
        for slot in touch.slots:
            bound = unify(kind.slot(slot).dims, group.slots[slot].shape, bound, name=slot)
        unify(touch.dims, shape, bound, name=parameter)
        try:
            unify(touch.dims, tuple(size + 1 for size in shape), bound, name=parameter)
        except ShapeMisfit:
            pass
        else:
            larger = torch.randn([size + 1 for size in shape], generator=case.generator, dtype=torch.float64)
            hold(
                _takes(rebuilt, larger), f"{case.name}: the declared dims [{touch.dims}] let a weight of any size pass"
            )
        if touch.local:
            try:
                rebuilt.region(slice(1, 3), ALL)
            except NotLocal:
                hold(False, f"{case.name}: declared local, and refuses a window of rows")
    hold(dissolved > 0, f"{kind.name}: dissolve recognises no example on a weight or a bias")


def spellings_lose_nothing(kind: Kind) -> None:
    """Every spelling has words for all slots, none for two, and a config from which the same deltas come back."""
    declared = {slot.name: slot for slot in kind.slots}
    for spelling in kind.spellings:
        says = f"{kind.name} in {spelling.format}"
        unknown = [leaf.suffix for leaf in spelling.leaves if leaf.slot not in declared]
        hold(not unknown, f"{says}: {', '.join(unknown)} spell slots that the kind does not declare")
        spelled = {leaf.slot for leaf in spelling.leaves}
        silent = [name for name, slot in declared.items() if not slot.optional and name not in spelled]
        hold(not silent, f"{says}: no word for {', '.join(silent)}")
        # a shared slot and one of a module may share a suffix: their keys differ before it
        suffixes = [(leaf.suffix, declared[leaf.slot].shared) for leaf in spelling.leaves]
        twice = {suffix for suffix, shared in suffixes if suffixes.count((suffix, shared)) > 1}
        hold(not twice, f"{says}: {', '.join(sorted(twice))} spell two slots")
        for name, field in spelling.fields.items():
            meanings = field.inert + field.used + bool(field.refuse)
            hold(meanings == 1, f"{says}: field {name} is not just one of inert, used and refused")
        for case, parameter, group, tensors in groups(kind):
            try:
                config = spelling.config({group.module: group})
            except CannotCarry:
                continue
            extra = config.keys() - spelling.fields.keys()
            hold(not extra, f"{says}: writes the fields {', '.join(sorted(extra))} that it does not declare")
            options = spelling.options(config, group.module, group.slots)
            for name in options.keys() & group.options.keys():
                hold(options[name] == group.options[name], f"{case.name}: {spelling.format} reads another {name} back")
            read = Group(module=group.module, kind=kind.name, slots=group.slots, options={**group.options, **options})
            _same(kind.build(read, tensors)[parameter], case, f"what {spelling.format} reads back")


def _same(delta: Delta, case: Case, says: str) -> None:
    """Bit-equal tensors, and a bit-equal change."""
    ours, theirs = case.delta.tensors(), delta.tensors()
    hold(type(delta) is type(case.delta), f"{case.name}: {says} is a {type(delta).__name__}")
    equal = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    hold(equal, f"{case.name}: {says} holds other tensors")
    hold(
        torch.equal(delta.delta(case.weight), case.delta.delta(case.weight)),
        f"{case.name}: {says} makes another change",
    )


def _takes(delta: Delta, weight: torch.Tensor) -> bool:
    """Whether the delta changes this weight; a spectrum, say, fits every size, and then no pattern can tell."""
    try:
        delta.delta(weight)
    except BaseMismatch:
        return False
    return True
