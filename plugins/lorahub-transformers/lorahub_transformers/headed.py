"""What a checkpoint of an architecture outside the table needs so that plain ``from_pretrained`` builds it with a head.

The class is found among those that transformers has for the architecture, by what an adapter says of its task or
class, and built on the meta device with as many labels as the head has rows.  What it needs and neither base nor
adapters have is said; where no class would do, or several, or loading rearranges tensors, there is no edit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, cast

from lorahub.bases.framework import Created, Edits
from lorahub.bases.index import BaseIndex
from lorahub.bases.torch_module import live_entries
from lorahub.deltas.kind import JSON
from lorahub_transformers.building import build
from lorahub_transformers.classes import TASKS
from lorahub_transformers.converting import Shape, converted, stored_shapes

__all__ = ["headed"]

_DEFAULT_LABELS = 2  # what a configuration without id2label means


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """A class that has the base's parameters and the adapter's head.

    Attributes:
        config: what must be said of it.
        live: index name -> the class's own name, of the base's parameters that it has.
        stored: the class's own name -> what its checkpoints say.
        missing: what neither has.
    """

    config: Mapping[str, JSON]
    live: Mapping[str, str]
    stored: Mapping[str, str]
    missing: tuple[str, ...]


def headed(index: BaseIndex, created: Created, hints: Mapping[str, JSON]) -> Edits | None:
    """The edits for ``created``, or None where no class of the architecture, or more than one, has these parameters.

    Args:
        index: of files or of a live model, known from its class.
        created: what adapters bring.
        hints: what an adapter says of its task and class.
    """
    fits = [fit for name in _candidates(index, hints) for fit in _fits(index, created, hints, name)]
    if len(fits) != 1:
        return None
    (fit,) = fits
    everything = {**index.extras, **index.parameters}
    renamed = {name: new for name, live in fit.live.items() if (new := fit.stored[live]) != everything[name].stored_as}
    renamed |= {name: new for name in created if (new := fit.stored[name]) != name}
    return Edits(
        config=fit.config,
        removed=tuple(name for name in everything if name not in fit.live and name not in created),
        renamed=MappingProxyType(renamed),
        missing=fit.missing,
    )


def _candidates(index: BaseIndex, hints: Mapping[str, JSON]) -> Iterator[str]:
    """Names of classes that the adapter may mean."""
    mapping, task, kind = hints.get("auto_mapping"), hints.get("task_type"), index.config.get("model_type")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if isinstance(named, str):
        yield named
        return
    own = index.config.get("architectures")
    if isinstance(task, str) and task in TASKS:
        try:
            auto: Any = import_module("transformers.models.auto.modeling_auto")
        except ModuleNotFoundError:
            return
        found = getattr(auto, TASKS[task])._model_mapping._model_mapping.get(kind)  # noqa: SLF001 - names by type
        yield from [found] if isinstance(found, str) else found or ()
    elif isinstance(own, list):
        yield from (each for each in own if isinstance(each, str))


def _fits(index: BaseIndex, created: Created, hints: Mapping[str, JSON], name: str) -> Iterator[_Fit]:
    """The class with the number of labels that the head has, if it has that head."""
    everything = {**index.extras, **index.parameters}
    held = {info.stored_as: (each, info.shape) for each, info in everything.items()}
    for labels in _labels(index, created, hints):
        config: dict[str, JSON] = {"architectures": cast("JSON", [name]), **labels}
        model = build({**index.config, **config}, list(held))
        if model is None:
            return
        entries, groups = live_entries(model, leaders=set(getattr(model, "all_tied_weights_keys", {}).values()))
        shapes: dict[str, Shape] = {each: info.shape for each, info in entries.items()}
        if any(shapes.get(each) != tuple(shape) for each, (shape, _) in created.items()):
            continue
        whole = shapes | {each: shapes[first] for first, *others in groups for each in others}
        there = converted(model, {stored: shape for stored, (_, shape) in held.items()}, whole)
        back = converted(model, stored_shapes(model, shapes), whole)
        if there.within or there.rearranged or back.within or back.rearranged:
            return
        live = {held[stored][0]: new for stored, new in there.live.items() if shapes.get(new) == held[stored][1]}
        live = {each: new for each, new in live.items() if each not in created and new not in created}
        stored = {new: old for old, new in back.live.items()}
        lacking = shapes.keys() - set(live.values()) - created.keys()
        if len(set(live.values())) != len(live) or not live or not stored.keys() >= {*live.values(), *created}:
            return
        yield _Fit(config=MappingProxyType(config), live=live, stored=stored, missing=tuple(sorted(lacking)))
        return


def _labels(index: BaseIndex, created: Created, hints: Mapping[str, JSON]) -> Iterator[dict[str, JSON]]:
    """What may be said of labels: those that the adapter names, those that are there, as many as there are rows."""
    given, known = hints.get("id2label"), index.config.get("id2label")
    if isinstance(given, dict) and given:
        yield _named({str(key): str(value) for key, value in given.items()})
    yield {}
    for count in sorted({shape[0] for shape, _ in created.values() if shape}):
        if count != (len(known) if isinstance(known, dict) else _DEFAULT_LABELS):
            yield _named({str(each): f"LABEL_{each}" for each in range(count)})


def _named(names: Mapping[str, str]) -> dict[str, JSON]:
    return {
        "id2label": cast("JSON", dict(names)),
        "label2id": cast("JSON", {label: int(key) for key, label in names.items()}),
    }
