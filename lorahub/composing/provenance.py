"""What a composed adapter says of itself: the recipe, portable; what its parents' records have in common; hints."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from lorahub.bases.index import BaseIndex
from lorahub.bases.layout import Target
from lorahub.composing.asked import as_word
from lorahub.composing.ingredients import Opened
from lorahub.composition.together import differ
from lorahub.deltas.delta import Delta
from lorahub.deltas.kind import JSON
from lorahub.findings import Finding, Verdict
from lorahub.names import Ref
from lorahub.recipe import Recipe
from lorahub.record_fields import BaseRecord
from lorahub.records import SCHEMA_VERSION, AdapterRecord

__all__ = ["about_bases", "begun", "hints", "portable", "recipe_digest", "settings"]


def settings(recipe: Recipe, accepted: Sequence[str] = ()) -> dict[str, JSON]:
    """Everything of a recipe but its adapters that says what comes of it, without what is at its default.

    Args:
        recipe: the recipe.
        accepted: codes of the findings that had to be accepted.
    """
    document = recipe.model_dump(mode="json", exclude_defaults=True)
    left_out = ("schema_version", "description", "method", "adapters", "seed", "parameters", "base", "allow")
    return {
        **{name: value for name, value in document.items() if name not in left_out},
        **document.get("parameters", {}),
        **({"allow": [*accepted]} if accepted else {}),
    }


def portable(recipe: Recipe, opened: Sequence[Opened], accepted: Sequence[str] = ()) -> str:
    """The recipe as its result carries it: at the commits that were used, and without anybody's folders.

    It allows what had to be accepted, wherever that was said, and nothing else.
    """
    adapters = []
    for label, ingredient, one in zip(recipe.labels(), recipe.adapters, opened, strict=True):
        pin = one.pin
        word = as_word(label)
        ref = str(Ref(repo=pin.repo, selector=pin.commit, subpath=pin.path)) if pin else f"./{word}"
        adapters.append(ingredient.model_copy(update={"ref": ref, "name": word}))
    base = recipe.base_reference()
    local = Path(base.path).name if base and base.path else None
    changes = {"adapters": adapters, "base": f"./{local}" if local else recipe.base, "allow": [*accepted] or None}
    return recipe.changed(**changes).to_toml()


def recipe_digest(text: str, parents: Sequence[Mapping[str, JSON]]) -> str:
    """``sha256:`` over a recipe and the tensors that went in."""
    digests = [str(parent.get("digest", "")) for parent in parents]
    return f"sha256:{hashlib.sha256(chr(10).join([text, *digests]).encode()).hexdigest()}"


def begun(opened: Sequence[Opened], targets: Collection[Target]) -> AdapterRecord | None:
    """What the parents' records say in common: the base, a licence, the words that call them.

    Args:
        opened: the adapters.
        targets: of the result.
    """
    records = [each.record for each in opened if each.record is not None]
    if not records:
        return None
    licences = {record.license for record in records}
    words = tuple(dict.fromkeys(word for record in records for word in record.trigger_words))
    common: dict[str, Any] = {
        "base": _common_base(opened, targets),
        "license": licences.pop() if len(records) == len(opened) and len(licences) == 1 else None,
        "trigger_words": words or None,
        "pipeline_tag": records[0].pipeline_tag or None,
        "language": records[0].language or None,
    }
    return AdapterRecord(schema_version=SCHEMA_VERSION, kinds=("lora",)).changed(
        **{name: value for name, value in common.items() if value}
    )


def _common_base(opened: Sequence[Opened], targets: Collection[Target]) -> BaseRecord | None:
    """The base that adapters record, as far as they agree; None where they do not."""
    bases = [each.record.base for each in opened if each.record is not None and each.record.base]
    if not bases or _differ(opened):
        return None
    several = len({(base.repo_id, base.revision) for base in bases}) > 1
    equal = len({base.weights_digest for base in bases}) == 1 and bases[0].weights_digest
    same = all(each.header is not None and each.header.touches.keys() == {*targets} for each in opened)
    unknown = {"revision": several and not equal, "targets": not same}
    return bases[0].model_copy(update={name: None for name, gone in unknown.items() if gone})


def _differ(opened: Sequence[Opened]) -> bool:
    """Whether two of them say that they were made for different bases."""
    return any(differ(_base(one), _base(other)) for one, other in combinations(opened, 2))


def _base(one: Opened) -> BaseRecord:
    recorded, named = one.record.base if one.record else None, one.hints.get("base_repo")
    if recorded and (recorded.repo_id or recorded.weights_digest):
        return recorded
    return BaseRecord.model_construct(repo_id=named if isinstance(named, str) and named else None)


def about_bases(opened: Sequence[Opened]) -> tuple[Finding, ...]:
    """That the result names no base, where the adapters were made for different ones."""
    if not _differ(opened):
        return ()
    return (
        Finding(
            code="base-left-out",
            axis="base",
            level=Verdict.UNVERIFIED,
            message="the adapters were made for different bases, so the result names none",
            where=tuple(each.label for each in opened),
            remedy="say which it is for: lorahub record FOLDER --base BASE",
        ),
    )


_OWN = frozenset({"kohya_metadata", "compat"})
"""Hints that speak of one adapter's training or result, not of the sum."""


_BASE = frozenset({"base_repo", "base_revision"})
"""Hints that name a base."""


def hints(opened: Sequence[Opened], index: BaseIndex | None, deltas: Mapping[Target, Delta]) -> dict[str, JSON]:
    """What writing wants back: tables and lists of all adapters together, of single facts the first.

    Args:
        opened: the adapters.
        index: the base, which knows its embeddings, what it stores [in, out], and its config; a change that had no
            factors before has no role of its own, and a new value is [out, in] where its base was known.
        deltas: the result's changes by target.
    """
    left_out = _OWN | _BASE if _differ(opened) else _OWN
    result: dict[str, JSON] = {}
    for each in opened:
        for name, value in each.hints.items():
            before = result.get(name)
            if name in left_out:
                continue
            if isinstance(before, dict) and isinstance(value, dict):
                result[name] = {**value, **before}
            elif isinstance(before, list) and isinstance(value, list):
                result[name] = [*before, *(one for one in value if one not in before)]
            elif before is None:
                result[name] = value
    return result if index is None else {**result, **_of_base(index, deltas, result)}


def _of_base(index: BaseIndex, deltas: Mapping[Target, Delta], said: Mapping[str, JSON]) -> dict[str, JSON]:
    """What the base adds to hints, or puts right in them."""
    known = {target: index.parameters[target.name] for target in deltas if target.name in index.parameters}
    embeddings: dict[str, JSON] = {target.name: each.role for target, each in known.items() if each.role == "embedding"}
    roles = said.get("roles")
    turned: list[JSON] = [
        target.name for target, each in known.items() if each.transposed and deltas[target].replacement() is not None
    ]
    found: dict[str, JSON] = {
        "roles": {**embeddings, **(roles if isinstance(roles, dict) else {})} if embeddings else {},
        "transposed": turned,
        "base_config": dict(index.config),
    }
    return {name: value for name, value in found.items() if value}
