"""What people ask to be composed, in whatever way they say it, as a recipe and the places of its adapters.

A recipe's file, a mapping of names, a list of references, a sum of open adapters: all become one document, so that
whatever is composed carries the recipe that makes it again.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsFloat, TypeAlias

from lorahub.adapter import Adapter, AdapterHeader
from lorahub.combination import Combination
from lorahub.errors import UsageError
from lorahub.fetching import as_ref
from lorahub.names import Ref
from lorahub.recipe import Recipe
from lorahub.sources import Given
from lorahub.weights import for_each

__all__ = ["Asked", "Request", "Weighing", "as_word", "requested"]

Weighing: TypeAlias = "float | Sequence[Any] | Mapping[str, Any]"
"""Weights in order or by name, each a number or a rule as a recipe has it; ``Recipe`` checks them."""

Asked: TypeAlias = "Mapping[str, Given] | Sequence[Given] | Combination | Recipe | str | os.PathLike[str]"
"""What can be composed: adapters by name or in a list, a sum of open adapters, a recipe or its file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A recipe, and where its adapters really are.

    Attributes:
        recipe: the document.
        sources: of each adapter, in order; what was given open stands for the name that the recipe has for it.
        file: where the recipe lies, or None.
        folder: where its relative paths start; None: here.
    """

    recipe: Recipe
    sources: tuple[Given, ...]
    file: Path | None = None
    folder: Path | None = None

    @property
    def base(self) -> Ref | None:
        """The base's reference, or None."""
        return self.recipe.base_reference(self.folder)


def requested(
    adapters: Asked,
    weights: Weighing | None = None,
    *,
    folder: Path | None = None,
    **fields: Any,
) -> Request:
    """What was asked for, as a recipe.

    Args:
        adapters: see ``Asked``.
        weights: one for each adapter, in order or by name; they replace those that references carry.
        folder: where relative paths in a ``Recipe`` start; a file's start at its own folder.
        fields: a recipe's fields but the adapters; None leaves one out.  A recipe has its own.

    Raises:
        RecipeError: a file is no recipe, or a field makes no sense.
        UsageError: there is no adapter, the weights are not theirs, or a recipe was given with fields beside it.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if isinstance(adapters, Adapter | AdapterHeader):
        adapters = [adapters]
    if isinstance(adapters, str | os.PathLike) and Path(adapters).is_dir():
        raise UsageError(
            f"{os.fspath(adapters)} is a folder, and a recipe a file", "adapters go into a list or a mapping"
        )
    if isinstance(adapters, str | os.PathLike | Recipe):
        if given or weights is not None:
            raise UsageError(
                f"a recipe says all of it, and {', '.join([*given, *(['weights'] if weights is not None else [])])} "
                "was given beside it",
                "write it into the recipe",
            )
        if isinstance(adapters, Recipe):
            sources = tuple(each.reference(folder) for each in adapters.adapters)
            return Request(recipe=adapters, sources=sources, folder=folder)
        file, recipe = Path(adapters), Recipe.load(adapters)
        sources = tuple(each.reference(file.parent) for each in recipe.adapters)
        return Request(recipe=recipe, sources=sources, file=file, folder=file.parent)
    called, sources_given, own = _named(adapters)
    if not called:
        raise UsageError("no adapter was given", "lorahub compose A:0.7 B:0.3 -o FOLDER")
    names = _words(called)
    chosen = _chosen(called, names, own, weights)
    if "base" in given:
        given["base"] = str(replace(as_ref(given["base"], bare=True), name=None, weight=None))
    document = {
        **given,
        "adapters": [
            {"ref": _said(source, name), "name": name, "weight": weight}
            for name, source, weight in zip(names, sources_given, chosen, strict=True)
        ],
    }
    recipe = Recipe.from_document(document, where="this composition")
    return Request(recipe=recipe, sources=tuple(sources_given))


def _named(
    adapters: Mapping[str, Given] | Sequence[Given] | Combination,
) -> tuple[list[str], list[Given], list[float]]:
    """What people call them, the sources, and the weights that these carry themselves."""
    pairs: list[tuple[str, Given, float]]
    if isinstance(adapters, Combination):
        pairs = []
        for number, (each, weight) in enumerate(adapters.terms, start=1):
            if not isinstance(each, Adapter):
                raise UsageError(
                    f"term {number} of the sum is no adapter, but a {type(each).__name__}",
                    "add open adapters: 0.7 * lorahub.load(A) + 0.3 * lorahub.load(B)",
                )
            pairs.append(("", each, weight))
    elif isinstance(adapters, Mapping):
        pairs = [(name, source, 1.0) for name, source in adapters.items()]
    elif isinstance(adapters, Iterable):
        pairs = [("", source, 1.0) for source in adapters]
    else:
        raise UsageError(f"a {type(adapters).__name__} holds no adapters", "give a list, a mapping, a sum or a recipe")
    for _, source, _ in pairs:
        if not isinstance(source, str | os.PathLike | Ref | Adapter | AdapterHeader):
            raise UsageError(
                f"a {type(source).__name__} is no adapter",
                "a sum stands alone; compose it first to use it among others",
            )
    names: list[str] = []
    weights = []
    for name, source, weight in pairs:
        stem, own = name, weight
        if isinstance(source, Adapter | AdapterHeader):
            header = source.header if isinstance(source, Adapter) else source
            stem = name or (Path(header.label).name if header else "adapter")
        else:
            ref = as_ref(source)
            stem = name or ref.name or Path(ref.subpath or ref.repo or ref.path or "").name
            own = weight if ref.weight is None else weight * ref.weight
        names.append(stem)
        weights.append(own)
    return names, [source for _, source, _ in pairs], weights


def _words(called: Sequence[str]) -> list[str]:
    """Names as recipes have them, every one once."""
    names: list[str] = []
    for each in called:
        names.append(_free(as_word(each), names))
    return names


def as_word(text: str) -> str:
    """A name as recipes have them: letters, digits, '_', '-' and '.', beginning with a letter."""
    plain = "".join(each if each.isascii() and (each.isalnum() or each in "_-.") else "-" for each in text)[:60]
    return plain if plain[:1].isalpha() or plain[:1] == "_" else f"a{plain}" if plain else "adapter"


def _free(stem: str, taken: Collection[str]) -> str:
    tries = (stem, *(f"{stem}-{number}" for number in range(2, len(taken) + 3)))
    return next(each for each in tries if each not in taken)


def _chosen(called: Sequence[str], names: Sequence[str], own: Sequence[float], given: Weighing | None) -> list[Any]:
    """The weights; in a mapping an adapter goes by what people call it, or by its name in the recipe."""
    if given is None:
        return list(own)
    given = for_each(given, len(names))
    if isinstance(given, Mapping):
        own_names = {each: place for place, each in enumerate(called) if called.count(each) == 1}
        places = {**{name: place for place, name in enumerate(names)}, **own_names}
        if unknown := sorted(set(given) - places.keys()):
            raise UsageError(
                f"weights name adapters that were not given: {', '.join(unknown)}",
                f"the adapters are {', '.join(names)}",
            )
        chosen: list[Any] = list(own)
        seen: dict[int, str] = {}
        for name, weight in given.items():
            if (place := places[name]) in seen:
                raise UsageError(f"'{seen[place]}' and '{name}' are one adapter", "give it one weight")
            seen[place], chosen[place] = name, _rule(weight)
        return [_rule(weight) for weight in chosen]
    return [_rule(weight) for weight in given]


def _rule(weight: Any) -> Any:
    """A weight as a document has it; numbers of other libraries become plain ones."""
    if isinstance(weight, Mapping):
        return {key: _rule(value) for key, value in weight.items()}
    if isinstance(weight, list | tuple):
        return [_rule(each) for each in weight]
    return float(weight) if isinstance(weight, SupportsFloat) and not isinstance(weight, bool | int) else weight


def _said(source: Given, name: str) -> str:
    """A source as a recipe names it; what was given open has no name but its own."""
    if isinstance(source, Adapter | AdapterHeader):
        return f"./{name}"
    return str(replace(as_ref(source), name=None, weight=None))
