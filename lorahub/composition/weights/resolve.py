"""A recipe's weights and parameters for every target of its adapters.

Pure names and numbers; opens nothing and needs no torch.  What a single rule comes to is worked out in ``rules.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lorahub.bases.index import BaseIndex, natural
from lorahub.bases.layout import Target
from lorahub.composition.weights.depth import Depths
from lorahub.composition.weights.rules import is_filters, resolve
from lorahub.errors import RecipeError
from lorahub.recipe import Recipe

__all__ = ["parameters_of", "resolve", "weights_of"]


def weights_of(
    recipe: Recipe, targets: Sequence[Collection[Target]], base: BaseIndex | None = None
) -> list[dict[Target, float]]:
    """The weight of every adapter for every target of any of them.

    What an adapter does not change has a weight as well, as the rule gives it or 0: it counts where weights are held
    against each other.  Only for what it does change is its rule held to what it says.

    Args:
        recipe: whose adapters they are.
        targets: for each adapter in order, what it changes.
        base: tells how many layers there are.

    Raises:
        RecipeError: a rule speaks of nothing, or leaves a target out; the message carries the key path.
    """
    every = dict.fromkeys(target for own in targets for target in own)
    depths = Depths(every, base)
    found = []
    for number, (each, own) in enumerate(zip(recipe.adapters, targets, strict=True)):
        where = f"adapters[{number}].weight"
        rest = every.keys() - set(own)
        found.append(
            resolve(each.weight, own, depths, where=where)
            | resolve(each.weight, rest, depths, where=where, strict=False)
        )
    return found


def parameters_of(
    recipe: Recipe,
    targets: Collection[Target],
    base: BaseIndex | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
) -> dict[Target, Mapping[str, Any]]:
    """The method's parameters for every target, as ``Method.made`` takes them; equal ones are one object.

    A parameter that an adapter sets for itself becomes a tuple, one value for each adapter; for adapters that do not
    set it, the recipe's own value counts, or else the method's.

    Args:
        recipe: the recipe.
        targets: of all adapters together.
        base: tells how many layers there are.
        defaults: what the method has where a recipe says nothing.

    Raises:
        RecipeError: a rule speaks of nothing, or leaves a target out; the message carries the key path.
    """
    depths = Depths(targets, base)
    found: dict[str, Mapping[Target, Any]] = {
        name: _spread(value, targets, depths, f"parameters.{name}", lists=True)
        for name, value in recipe.parameters.items()
    }
    own = sorted({name for each in recipe.adapters for name in each.parameters})
    found |= {name: _each(name, recipe, targets, depths, found.get(name), defaults or {}) for name in own}
    made: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    result = {}
    for target in sorted(targets, key=lambda target: natural(target.name)):
        values = {name: column[target] for name, column in found.items()}
        result[target] = made.setdefault(tuple(values.values()), MappingProxyType(values))
    return result


def _each(
    name: str,
    recipe: Recipe,
    targets: Collection[Target],
    depths: Depths,
    common: Mapping[Target, Any] | None,
    defaults: Mapping[str, Any],
) -> dict[Target, tuple[Any, ...]]:
    """A parameter that adapters set for themselves: for each target, one value for each adapter."""
    count = len(recipe.adapters)
    columns: list[Mapping[Target, Any]] = []
    for number, each in enumerate(recipe.adapters):
        where = f"adapters[{number}].parameters.{name}"
        if name in each.parameters:
            columns.append(_spread(each.parameters[name], targets, depths, where))
        elif common is not None:
            columns.append({target: _item(common[target], number, count, name) for target in targets})
        elif name in defaults:
            columns.append(dict.fromkeys(targets, _item(defaults[name], number, count, name)))
        else:
            raise RecipeError(
                f"{where} is missing: another adapter sets {name}, and neither [parameters] nor the method says what "
                "the rest have",
                f"give every adapter its {name}, or write one into [parameters]",
            )
    return {target: tuple(column[target] for column in columns) for target in targets}


def _item(value: Any, number: int, count: int, name: str) -> Any:
    """One adapter's value out of what is said for all."""
    if not isinstance(value, tuple):
        return value
    if len(value) != count:
        raise RecipeError(f"parameters.{name} lists {len(value)} values for {count} adapters", "give one for each")
    return value[number]


def _spread(
    value: Any, targets: Collection[Target], depths: Depths, where: str, *, lists: bool = False
) -> Mapping[Target, Any]:
    """A parameter for every target; ``lists``: a list of numbers is the method's own, not over depth."""
    if isinstance(value, bool | int | float | str) or (lists and isinstance(value, tuple) and not is_filters(value)):
        return dict.fromkeys(targets, value)
    return resolve(value, targets, depths, where=where)
