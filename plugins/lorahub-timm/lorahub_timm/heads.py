"""What a checkpoint needs so that timm builds it with the classes an adapter brings.

timm keeps the number of classes in the configuration, and which module gives them in ``pretrained_cfg.classifier``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import cast

from lorahub.bases.framework import Created, Edits
from lorahub.bases.index import BaseIndex
from lorahub.deltas.kind import JSON
from lorahub_timm.configs import Described

__all__ = ["edits", "head_parameters"]


def head_parameters(about: Described) -> tuple[str, ...]:
    """Canonical names of the parameters of all heads."""
    return tuple(f"{module}.{parameter}" for module in about.classifier for parameter in ("weight", "bias"))


def edits(about: Described, index: BaseIndex, created: Created, hints: Mapping[str, JSON]) -> Edits | None:
    """The edits for ``created``, or None where it is no head of this architecture, or one that contradicts itself."""
    if not created:
        return Edits()
    counts = {shape[0] for shape, _ in created.values() if shape}
    if not set(created) <= set(head_parameters(about)) or len(counts) != 1:
        return None
    count = counts.pop()
    missing = []
    for module in about.classifier:
        weight, bias = f"{module}.weight", f"{module}.bias"
        had = index.parameters.get(weight)
        if weight not in created and (had is None or had.shape[0] != count):
            missing.append(weight)
        needs_bias = bias in index.parameters or had is None
        if needs_bias and bias not in created and (had is None or had.shape[0] != count):
            missing.append(bias)
    return Edits(
        config=MappingProxyType(_config(index.config, count, hints)),
        removed=tuple(name for name in missing if name in index.parameters),
        missing=tuple(sorted(missing)),
    )


def _config(config: Mapping[str, JSON], count: int, hints: Mapping[str, JSON]) -> dict[str, JSON]:
    """The number of classes wherever it stands, and names of classes only where they are this many."""
    changed: dict[str, JSON] = {"num_classes": count}
    for key in ("model_args", "pretrained_cfg"):
        inner = config.get(key)
        if isinstance(inner, dict) and "num_classes" in inner:
            changed[key] = {**_relabelled(inner, count), "num_classes": count}
    given = hints.get("id2label")
    if isinstance(given, dict) and len(given) == count:
        order = sorted(given, key=lambda key: (not key.isdigit(), int(key) if key.isdigit() else 0, key))
        changed["label_names"] = cast("JSON", [str(given[key]) for key in order])
    changed |= {key: None for key in _stale(config, count) if key not in changed}
    return changed


def _relabelled(config: Mapping[str, JSON], count: int) -> dict[str, JSON]:
    stale = _stale(config, count)
    return {key: value for key, value in config.items() if key not in stale}


def _stale(config: Mapping[str, JSON], count: int) -> set[str]:
    """What speaks of classes that there are no more."""
    names = config.get("label_names")
    if "num_classes" in config and config["num_classes"] == count:
        return set()
    if isinstance(names, list | dict) and len(names) == count:
        return {"label_offset"} & config.keys()
    return {"label_names", "label_descriptions", "label_offset"} & config.keys()
