"""What a checkpoint needs so that plain ``from_pretrained`` builds it with a head its base lacked.

The class is chosen by the parameters an adapter brings and by what it says of its task, never guessed: where several
classes remain, there is no edit.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

from lorahub.bases.framework import Created, Edits
from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import JSON
from lorahub_transformers.families import Family, Head
from lorahub_transformers.names import checkpoint_name, is_below, spelling_of

__all__ = ["edits", "untie"]

_DEFAULT_LABELS = 2  # what a configuration without id2label means


def edits(family: Family, index: BaseIndex, created: Created, hints: Mapping[str, JSON]) -> Edits | None:
    """The edits for ``created``, or None where no class of the family, or more than one, has these parameters."""
    if not created:
        return Edits()
    own = _own(family, index)
    head = _choose(family, created, hints, own)
    if head is None:
        return None
    labels = _labels(index, head, created, hints)
    missing = _missing(family, index, created, head)
    if head is own:
        return Edits(config=MappingProxyType(labels), missing=missing)
    removed = tuple(name for name in (*index.parameters, *index.extras) if not _has(family, head, name))
    return Edits(
        config=MappingProxyType({"architectures": [head.name], **labels}),
        removed=removed,
        renamed=MappingProxyType(_renamed(family, index, created, head, frozenset(removed))),
        missing=missing,
    )


def untie(family: Family, index: BaseIndex) -> Edits:
    """The edits that untie: the flag holds for all pairs of a model, so each is then saved on its own."""
    copied = {other: leader for leader, *others in index.tied for other in others}
    renamed = {name: new for name in copied if (new := checkpoint_name(family, name)) != name}
    return Edits(
        config=MappingProxyType({"tie_word_embeddings": False}),
        copied=MappingProxyType(copied),
        renamed=MappingProxyType(renamed),
    )


def _own(family: Family, index: BaseIndex) -> Head | None:
    names = index.config.get("architectures")
    found = [family.head(name) for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return next(filter(None, found), None)


def _choose(family: Family, created: Created, hints: Mapping[str, JSON], own: Head | None) -> Head | None:
    candidates = [head for head in family.heads if set(created) <= {*head.parameters, *_parts(family, head, created)}]
    mapping = hints.get("auto_mapping")
    class_name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    task = hints.get("task_type")
    if isinstance(class_name, str) and family.head(class_name):
        candidates = [head for head in candidates if head.name == class_name]
    elif isinstance(task, str) and any(head.task == task for head in family.heads):
        candidates = [head for head in candidates if head.task == task]
    elif own in candidates:
        candidates = [head for head in candidates if head is own]
    if len(candidates) > 1:
        candidates = [head for head in candidates if set(head.parameters) == set(created)] or candidates
    return candidates[0] if len(candidates) == 1 else None


def _parts(family: Family, head: Head, created: Created) -> list[str]:
    """Created names that are an optional part of the backbone which this class builds (a pooler)."""
    built = [part for part in family.parts if part not in head.without]
    return [name for name in created if is_below(name, built)]


def _has(family: Family, head: Head, name: str) -> bool:
    """Whether the class has a parameter of that name."""
    if name in head.parameters:
        return True
    if is_below(name, head.without):
        return False
    if family.prefix:
        return name.startswith(family.prefix)
    return not any(name in other.parameters for other in family.heads)


def _missing(family: Family, index: BaseIndex, created: Created, head: Head) -> tuple[str, ...]:
    flag = index.config.get("tie_word_embeddings")
    ties = family.tied if flag is None else bool(flag)
    filled = {other for _, other in head.tied} if ties or not family.unties else set()
    there = {*index.parameters, *created}
    lacking = [name for name in head.parameters if name not in there and name not in filled]
    parts = [part for part in family.parts if part not in head.without and not any(is_below(n, [part]) for n in there)]
    return tuple(sorted(lacking + parts))


def _renamed(family: Family, index: BaseIndex, created: Created, head: Head, removed: frozenset[str]) -> dict[str, str]:
    """New stored names: a head stands beside the backbone, so the backbone gets its prefix; nothing else changes."""
    prefix = family.prefix if head.prefix is None else head.prefix
    stored = {**index.extras, **index.parameters}
    spelling = spelling_of(family, [info.stored_as for info in stored.values()])
    renamed = {name: spelling.respelled(info.stored_as, prefix) for name, info in stored.items() if name not in removed}
    renamed = {name: new for name, new in renamed.items() if new != stored[name].stored_as}
    for name in created:
        new = checkpoint_name(family, name)
        if family.prefix and name.startswith(family.prefix):
            new = prefix + new.removeprefix(family.prefix)
        if new != name and name not in stored:
            renamed[name] = new
    return renamed


def _labels(index: BaseIndex, head: Head, created: Created, hints: Mapping[str, JSON]) -> dict[str, JSON]:
    """Configuration that makes ``num_labels`` what the head has; labels that are there stay where their number fits."""
    if head.labels not in created:
        return {}
    count = created[head.labels][0][0]
    given, known = hints.get("id2label"), index.config.get("id2label")
    result: dict[str, JSON] = {}
    if isinstance(given, dict) and len(given) == count:
        names = {str(key): str(value) for key, value in given.items()}
    elif count == (len(known) if isinstance(known, dict) else _DEFAULT_LABELS):
        names = {}
    else:
        names = {str(i): f"LABEL_{i}" for i in range(count)}
    if names:
        result = {
            "id2label": cast("JSON", names),
            "label2id": {label: int(key) for key, label in names.items()},
        }
    if index.config.get("num_labels", count) != count:  # from old releases; transformers refuses the contradiction
        result["num_labels"] = count
    return result
