"""What one rule of a recipe comes to: a number for every target.

Pure names and numbers; opens nothing and needs no torch.  How rules are written is in ``recipe_fields.py``; which layer
a target is in ``depth.py`` finds, which block ``blocks.py``, and what a pattern fits ``patterns.py``.  What a rule says
of nothing that is there, and a target that no rule speaks of, are errors: a weight that silently does nothing is the
commonest mistake of all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from math import isfinite
from typing import Any

from lorahub.bases.index import natural
from lorahub.bases.layout import Target
from lorahub.composition.weights.asking import Ask, by_default, named
from lorahub.composition.weights.blocks import by_block, by_preset, by_unet_block
from lorahub.composition.weights.depth import Depth, Depths
from lorahub.composition.weights.patterns import fits, no_fit
from lorahub.errors import RecipeError
from lorahub.names import did_you_mean, printable
from lorahub.recipe_fields import RULE_KEYS, Blocks, Components, Filter, Gradient, Layers, Preset, Rule, UNet

__all__ = ["is_filters", "resolve"]


def resolve(
    rule: Rule,
    targets: Collection[Target],
    depths: Depths | None = None,
    *,
    where: str = "weight",
    strict: bool = True,
) -> dict[Target, float]:
    """The number that a rule gives each target, in natural order.

    Args:
        rule: how it is said.
        targets: what it is said for.
        depths: where they stand; by default as these targets alone tell.
        where: key path, for messages.
        strict: whether a rule that speaks of nothing, or leaves a target out, is an error; else it gives 0.

    Raises:
        RecipeError: it speaks of what is not there, or leaves a target out.
    """
    order = sorted(targets, key=lambda target: natural(target.name))
    found = _resolved(rule, Ask(targets=order, depths=depths or Depths(targets), where=where, strict=strict))
    odd = next((value for value in found.values() if not isfinite(value)), None)
    if odd is not None:
        raise RecipeError(f"{where}: {odd} is no finite number")
    return {target: found[target] for target in order}


def is_filters(rule: object) -> bool:
    """Whether a rule is a list of filters, and not of numbers."""
    return isinstance(rule, tuple) and bool(rule) and isinstance(rule[0], Filter)


def _resolved(rule: Any, ask: Ask) -> dict[Target, float]:
    if isinstance(rule, int | float):
        return dict.fromkeys(ask.targets, float(rule))
    if isinstance(rule, tuple) and not is_filters(rule):
        rule = Gradient(gradient=rule)
    for sort, resolved in _SORTS:
        if isinstance(rule, sort):
            return resolved(rule, ask)
    raise RecipeError(f"{ask.where}: {rule!r} is no rule for targets", "give a number, a list of numbers, or a table")


def _by_depth(rule: Gradient, ask: Ask) -> dict[Target, float]:
    found, outside = {}, []
    for target in ask.targets:
        depth = ask.depths.of(target)
        if depth is None:
            outside.append(target)
            continue
        if rule.layers is not None:
            if depth.layer >= rule.layers:
                ask.complain(
                    RecipeError(
                        f"{ask.where}: {target.name} is in layer {depth.layer}, counted from 0, and layers = "
                        f"{rule.layers}"
                    )
                )
            depth = Depth(min(depth.layer, rule.layers - 1), rule.layers)
        found[target] = _between(rule.gradient, depth.t)
    if outside and rule.elsewhere is None:
        ask.complain(
            RecipeError(
                f"{ask.where}: numbers over depth are for layers, and in none: {named(outside)}",
                "say what these get: { gradient = [...], elsewhere = 0 }",
            )
        )
    return found | dict.fromkeys(outside, rule.elsewhere or 0.0)


def _between(values: Sequence[float], t: float) -> float:
    """Linear between evenly spaced values, at t from 0 to 1."""
    place = t * (len(values) - 1)
    low = min(int(place), len(values) - 1)
    high, part = min(low + 1, len(values) - 1), place - low
    return (1 - part) * values[low] + part * values[high]


def _by_layer(rule: Layers, ask: Ask) -> dict[Target, float]:
    spans = rule.spans
    layers = {target: depth.layer for target in ask.targets if (depth := ask.depths.of(target)) is not None}
    found = {
        target: rule.layers[key]
        for target, layer in layers.items()
        for key, (start, stop) in spans.items()
        if start <= layer < stop
    }
    for key, (start, stop) in spans.items():
        if not any(start <= layer < stop for layer in layers.values()):
            there = f"they are in {min(layers.values())} to {max(layers.values())}" if layers else "they are in none"
            ask.complain(RecipeError(f"{ask.where}.layers[{key!r}]: no target is in these layers; {there}"))
    return found | by_default(rule.default, [target for target in ask.targets if target not in found], ask)


def _by_component(rule: Components, ask: Ask) -> dict[Target, float]:
    there: dict[str, list[Target]] = defaultdict(list)
    for target in ask.targets:
        there[target.component].append(target)
    known = sorted(filter(None, there))
    found: dict[Target, float] = {}
    for name, part in rule.named.items():
        if name not in there:
            near = did_you_mean(name, [*known, *RULE_KEYS])
            ask.complain(
                RecipeError(
                    f"{ask.where}.{name}: no target is in a component '{name}'.{near}",
                    f"components: {', '.join(known)}" if known else "the model is one, without components",
                )
            )
        found |= _resolved(part, ask.of(there[name], f"{ask.where}.{name}"))
    rest = [target for target in ask.targets if target not in found]
    if rest and rule.default is not None:
        return found | _resolved(rule.default, ask.of(rest, f"{ask.where}.default"))
    return found | by_default(None, rest, ask)


def _by_filter(rule: tuple[Filter, ...], ask: Ask) -> dict[Target, float]:
    found: dict[Target, float] = {}
    for number, each in enumerate(rule):
        place = f"{ask.where}[{number}]"
        fitting = [target for target in ask.targets if each.filter is None or fits(each.filter, target)]
        taken = [target for target in fitting if target not in found]
        if not taken and each.filter is not None and not each.optional and each.count != 0:
            ask.complain(no_fit(each.filter, ask.targets, fitting, place))
        if each.count is not None and len(taken) != each.count:
            ask.complain(
                RecipeError(
                    f"{place}: '{printable(each.filter or '*')}' gives {len(taken)} targets their number, and count "
                    f"says {each.count}",
                    f"they are: {named(taken)}" if taken else "",
                )
            )
        if taken:
            found |= _resolved(each.value, ask.of(taken, f"{place}.value"))
    return found | by_default(None, [target for target in ask.targets if target not in found], ask)


_SORTS: tuple[tuple[type, Callable[[Any, Ask], dict[Target, float]]], ...] = (
    (Gradient, _by_depth),
    (Layers, _by_layer),
    (Blocks, by_block),
    (UNet, by_unet_block),
    (Preset, by_preset),
    (Components, _by_component),
    (tuple, _by_filter),
)
"""Sort of rule -> what it comes to."""
