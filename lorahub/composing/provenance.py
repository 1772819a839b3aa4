"""What a composed adapter says of itself: the recipe, portable; what its parents' records have in common; hints."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.composing.asked import as_word
from lorahub.composing.ingredients import Opened
from lorahub.deltas.kind import JSON
from lorahub.names import Ref
from lorahub.recipe import Recipe
from lorahub.records import SCHEMA_VERSION, AdapterRecord

__all__ = ["begun", "hints", "portable", "recipe_digest", "settings"]


def settings(recipe: Recipe) -> dict[str, JSON]:
    """Everything of a recipe but its adapters that says what comes of it, without what is at its default."""
    document = recipe.model_dump(mode="json", exclude_defaults=True)
    left_out = ("schema_version", "description", "method", "adapters", "seed", "parameters", "base", "allow")
    return {
        **{name: value for name, value in document.items() if name not in left_out},
        **document.get("parameters", {}),
    }


def portable(recipe: Recipe, opened: Sequence[Opened]) -> str:
    """The recipe as its result carries it: at the commits that were used, and without anybody's folders."""
    adapters = []
    for label, ingredient, one in zip(recipe.labels(), recipe.adapters, opened, strict=True):
        pin = one.pin
        word = as_word(label)
        ref = str(Ref(repo=pin.repo, selector=pin.commit, subpath=pin.path)) if pin else f"./{word}"
        adapters.append(ingredient.model_copy(update={"ref": ref, "name": word}))
    base = recipe.base_reference()
    local = Path(base.path).name if base and base.path else None
    changes = {"adapters": adapters, "base": f"./{local}" if local else recipe.base}
    return recipe.changed(**changes).to_toml()


def recipe_digest(text: str, parents: Sequence[Mapping[str, JSON]]) -> str:
    """``sha256:`` over a recipe and the tensors that went in."""
    digests = [str(parent.get("digest", "")) for parent in parents]
    return f"sha256:{hashlib.sha256(chr(10).join([text, *digests]).encode()).hexdigest()}"


def begun(opened: Sequence[Opened]) -> AdapterRecord | None:
    """What the parents' records say in common: the base, a licence, the words that call them."""
    records = [each.record for each in opened if each.record is not None]
    if not records:
        return None
    bases = [record.base for record in records if record.base]
    licences = {record.license for record in records}
    words = tuple(dict.fromkeys(word for record in records for word in record.trigger_words))
    common: dict[str, Any] = {
        "base": bases[0] if bases else None,
        "license": licences.pop() if len(records) == len(opened) and len(licences) == 1 else None,
        "trigger_words": words or None,
        "pipeline_tag": records[0].pipeline_tag or None,
        "language": records[0].language or None,
    }
    return AdapterRecord(schema_version=SCHEMA_VERSION, kinds=("lora",)).changed(
        **{name: value for name, value in common.items() if value}
    )


_OWN = frozenset({"kohya_metadata", "compat"})
"""Hints that speak of one adapter's training or result, not of the sum."""


def hints(opened: Sequence[Opened], index: BaseIndex | None, deltas: Collection[Target]) -> dict[str, JSON]:
    """What writing wants back: tables and lists of all adapters together, of single facts the first.

    Args:
        opened: the adapters.
        index: the base, which knows its embeddings; a change that had no factors before has no role of its own.
        deltas: the targets of the result.
    """
    result: dict[str, JSON] = {}
    for each in opened:
        for name, value in each.hints.items():
            before = result.get(name)
            if name in _OWN:
                continue
            if isinstance(before, dict) and isinstance(value, dict):
                result[name] = {**value, **before}
            elif isinstance(before, list) and isinstance(value, list):
                result[name] = [*before, *(one for one in value if one not in before)]
            elif before is None:
                result[name] = value
    known = index.parameters if index else {}
    embeddings = [each.name for each in deltas if each.name in known and known[each.name].role == "embedding"]
    if embeddings:
        own = result.get("roles")
        result["roles"] = {**dict.fromkeys(embeddings, "embedding"), **(own if isinstance(own, dict) else {})}
    return result
